// What racecheck knows of a barrier of phases: 128 threads write a row of shared memory, 256 others read it.
//
//     nvcc -O1 -lineinfo -gencode=arch=compute_90a,code=sm_90a -o handoff handoff.cu
//     compute-sanitizer --tool racecheck ./handoff
//
// Only form 0 is a race. On an H200 (CUDA 13.0) racecheck reports forms 0 and 1 with early readers, 508 bytes of 512 for
// form 1, and nothing else: it misses form 0 with late readers. Form 1 is how the roles of a Gluon kernel hand over.
#include <cstdio>

__device__ void init(unsigned bar, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ void arrive(unsigned bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }

__device__ void wait(unsigned bar, unsigned parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n@!done bra.uni AGAIN;\n}" ::"r"(bar),
        "r"(parity)
        : "memory");
}

__device__ void spin() {
    for (long long begun = clock64(); clock64() - begun < 200000;) {
    }
}

// 0: nothing. 1: one thread arrives behind a barrier of the writers. 2: every writer arrives. 3: a barrier of all threads.
// 4: as 1, and the readers meet after the wait. LATE: readers come later, by way of a barrier of their own.
template <int FORM, bool LATE>
__global__ void handoff(float *out, const float *in) {
    __shared__ float row[128];
    __shared__ unsigned long long phases;
    unsigned bar = static_cast<unsigned>(__cvta_generic_to_shared(&phases));
    if (threadIdx.x == 0) init(bar, FORM == 2 ? 128 : 1);
    __syncthreads();
    if (threadIdx.x < 128) {
        if (!LATE) spin();
        row[threadIdx.x] = in[threadIdx.x];
        if (FORM == 1 || FORM == 4) {
            asm volatile("bar.sync 2, 128;" ::: "memory");
            if (threadIdx.x == 0) arrive(bar);
        }
        if (FORM == 2) arrive(bar);
        if (FORM == 3) asm volatile("bar.sync 1, 384;" ::: "memory");
    } else {
        if (LATE) {
            spin();
            asm volatile("bar.sync 3, 256;" ::: "memory");
        }
        if (FORM == 1 || FORM == 2 || FORM == 4) wait(bar, 0);
        if (FORM == 3) asm volatile("bar.sync 1, 384;" ::: "memory");
        if (FORM == 4) asm volatile("bar.sync 3, 256;" ::: "memory");
        out[threadIdx.x - 128] = row[threadIdx.x & 127];
    }
}

template <int FORM, bool LATE>
void run(float *out, float *in) {
    handoff<FORM, LATE><<<1, 384>>>(out, in);
    printf("form %d, readers %s: %s\n", FORM, LATE ? "late" : "early", cudaGetErrorString(cudaDeviceSynchronize()));
    fflush(stdout);
}

int main() {
    float *out, *in;
    cudaMalloc(&out, 1024);
    cudaMalloc(&in, 512);
    cudaMemset(in, 1, 512);
    run<0, false>(out, in);
    run<1, false>(out, in);
    run<2, false>(out, in);
    run<3, false>(out, in);
    run<4, false>(out, in);
    run<0, true>(out, in);
    run<1, true>(out, in);
    run<2, true>(out, in);
    run<3, true>(out, in);
}
