// A device of one card in host memory, for tests: just what torch-npu asks of AscendCL to allocate, copy and capture.
// Kernels do not run here: the tests put them behind the vendor's operators, and keep what a graph has captured.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int Result; // aclError: 0 is success
enum { ALIGNMENT = 512 };

static int device = 0;
static int capturing = 0;
static void *graph = 0;

static void *handle(void) { return calloc(1, 64); }
static Result allocate(void **p, size_t n) { return posix_memalign(p, ALIGNMENT, n ? n : ALIGNMENT); }

// the device
Result aclInit(const char *config) { return 0; }
Result aclFinalize(void) { return 0; }
Result aclrtGetDeviceCount(uint32_t *count) { *count = 1; return 0; }
Result aclrtGetDevice(int32_t *id) { *id = device; return 0; }
Result aclrtSetDevice(int32_t id) { device = id; return 0; }
const char *aclrtGetSocName(void) { return "Ascend910B1"; }
Result aclrtGetMemInfo(int kind, size_t *free_, size_t *total) { *free_ = 8ull << 30; *total = 16ull << 30; return 0; }
Result aclrtGetCurrentContext(void **context) { *context = (void *)1; return 0; }
Result aclrtGetPrimaryCtxState(int id, uint32_t *flags, int *active) { if (flags) *flags = 0; *active = 1; return 0; }
Result aclrtDeviceCanAccessPeer(int32_t *can, int a, int b) { *can = 0; return 0; }
Result aclrtGetDeviceSatMode(int *mode) { *mode = 0; return 0; }
Result aclGetDeviceCapability(uint32_t id, int what, int64_t *value) { *value = 0; return 0; }
Result aclrtGetDeviceInfo(uint32_t id, int what, int64_t *value) { *value = 24; return 0; }
const char *aclGetRecentErrMsg(void) { return ""; }
Result aclrtGetVersion(int *a, int *b, int *c) { *a = 1; *b = 0; *c = 0; return 0; }

size_t aclGetCompileoptSize(int option) { return 1; }
Result aclGetCompileopt(int option, char *value, size_t n) { if (n) value[0] = 0; return 0; }

// memory
Result aclrtMalloc(void **p, size_t n, int policy) { return allocate(p, n); }
Result aclrtMallocAlign32(void **p, size_t n, int policy) { return allocate(p, n); }
Result aclrtFree(void *p) { free(p); return 0; }
Result aclrtMallocHost(void **p, size_t n) { return allocate(p, n); }
Result aclrtFreeHost(void *p) { free(p); return 0; }
Result aclrtMemcpy(void *to, size_t room, const void *from, size_t n, int kind) { memmove(to, from, n); return 0; }
Result aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t n, int kind, void *stream) { memmove(to, from, n); return 0; }
Result aclrtMemset(void *to, size_t room, int value, size_t n) { memset(to, value, n); return 0; }
Result aclrtMemsetAsync(void *to, size_t room, int value, size_t n, void *stream) { memset(to, value, n); return 0; }

// streams and events
Result aclrtCreateStream(void **stream) { *stream = handle(); return 0; }
Result aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flags) { *stream = handle(); return 0; }
Result aclrtCreateStreamV2(void **stream, void *config) { *stream = handle(); return 0; }
Result aclrtStreamQuery(void *stream, int *status) { *status = 1; return 0; }
Result aclrtGetStreamId(void *stream, int32_t *id) { *id = 0; return 0; }
Result aclrtCreateEvent(void **event) { *event = handle(); return 0; }
Result aclrtCreateEventWithFlag(void **event, uint32_t flag) { *event = handle(); return 0; }
Result aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = handle(); return 0; }
Result aclrtEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return 0; }
Result aclrtQueryEventStatus(void *event, int *status) { *status = 1; return 0; }
Result aclrtQueryEventWaitStatus(void *event, int *status) { *status = 1; return 0; }

// graphs: the vendor's NPUGraph calls these in order, and so we see that it does. What a graph holds, the tests keep:
// they are told of each call while it is made.
static char journal[1 << 16];
static void note(const char *what) { if (strlen(journal) + 32 < sizeof journal) { strcat(journal, what); strcat(journal, ";"); } }
const char *fake_journal(void) { return journal; }
void fake_journal_clear(void) { journal[0] = 0; }

typedef void (*Listener)(const char *what, uint64_t where, uint64_t value);
static Listener listener = 0;
void fake_listen(Listener told) { listener = told; }
static Result tell(const char *what, void *where, uint64_t value) {
    note(what);
    if (listener) listener(what, (uint64_t)where, value);
    return 0;
}

Result aclmdlRICaptureBegin(void *stream, int mode) { capturing = 1; graph = handle(); return tell("capture_begin", graph, 0); }
Result aclmdlRICaptureEnd(void *stream, void **made) { capturing = 0; *made = graph; return tell("capture_end", graph, 0); }
Result aclmdlRICaptureGetInfo(void *stream, int *status, void **made) {
    *status = capturing;
    if (made) *made = capturing ? graph : 0;
    return 0;
}
Result aclmdlRICaptureThreadExchangeMode(int *mode) { return 0; }
Result aclmdlRICaptureTaskGrpBegin(void *stream) { return tell("group_begin", 0, 0); }
Result aclmdlRICaptureTaskGrpEnd(void *stream, void **group) { *group = handle(); return tell("group_end", *group, 0); }
Result aclmdlRICaptureTaskUpdateBegin(void *stream, void *group) { return tell("update_begin", group, 0); }
Result aclmdlRICaptureTaskUpdateEnd(void *stream) { return tell("update_end", 0, 0); }
Result aclmdlRIExecuteAsync(void *made, void *stream) { return tell("replay", made, 0); }
Result aclmdlRIDestroy(void *made) { return 0; }

// an external event is a word in memory that the graph waits for, and that is then set back
Result aclrtValueWait(void *word, uint64_t value, uint32_t flag, void *stream) { return tell("wait", word, value); }
Result aclrtValueWrite(void *word, uint64_t value, uint32_t flag, void *stream) {
    if (!capturing) *(uint64_t *)word = value;
    return tell(value ? "record" : "reset", word, value);
}
// other events order streams, and here everything is done in the order in which it is asked for
Result aclrtRecordEvent(void *event, void *stream) { note("stream_event"); return 0; }
Result aclrtStreamWaitEvent(void *stream, void *event) { note("stream_wait"); return 0; }
Result aclrtResetEvent(void *event, void *stream) { return 0; }
