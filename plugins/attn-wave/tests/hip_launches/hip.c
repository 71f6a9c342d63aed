/* The functions of libamdhip64 that Wave's runtime calls, handed on to whoever registers: a card that is not here. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef int (*load_t)(const char *path);
typedef int (*function_t)(intptr_t module, const char *name);
typedef int (*launch_t)(intptr_t function, const uint32_t *sizes, uint32_t shared, intptr_t stream, const void *arguments,
                        size_t size);

static load_t on_load;
static function_t on_function;
static launch_t on_launch;

void register_card(load_t load, function_t function, launch_t launch) {
    on_load = load;
    on_function = function;
    on_launch = launch;
}

/* Handles are what the card gives, from 1; less is an error. */
int hipModuleLoad(intptr_t *module, const char *path) {
    *module = on_load ? on_load(path) : 0;
    return *module > 0 ? 0 : 301;
}

int hipModuleGetFunction(intptr_t *function, intptr_t module, const char *name) {
    *function = on_function ? on_function(module, name) : 0;
    return *function > 0 ? 0 : 500;
}

int hipModuleUnload(intptr_t module) { return module > 0 ? 0 : 400; }

int hipModuleLaunchKernel(intptr_t function, uint32_t gx, uint32_t gy, uint32_t gz, uint32_t bx, uint32_t by, uint32_t bz,
                          uint32_t shared, intptr_t stream, void **parameters, void **extra) {
    const uint32_t sizes[6] = {gx, gy, gz, bx, by, bz};
    const void *arguments = NULL;
    size_t size = 0;
    if (parameters != NULL || extra == NULL) return 1;
    /* pairs of a key and a value, until key 3 */
    for (; (intptr_t)*extra != 3; extra += 2) {
        if ((intptr_t)*extra == 1) arguments = extra[1];
        else if ((intptr_t)*extra == 2) memcpy(&size, extra[1], sizeof size);
        else return 1;
    }
    return on_launch ? on_launch(function, sizes, shared, stream, arguments, size) : 3;
}

const char *hipGetErrorName(int error) { return error ? "hipErrorOfTheFakeCard" : "hipSuccess"; }
const char *hipGetErrorString(int error) { return error ? "the fake card refused" : "no error"; }
