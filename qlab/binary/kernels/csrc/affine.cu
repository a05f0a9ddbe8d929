// Batch norm of what came out of a layer: z times alpha plus beta, in float32, each column with its own alpha and beta.
// FUSED 1 rounds once (fused multiply-add), 0 rounds the product and the sum. The intrinsics are never contracted.
#include "common.cuh"

#ifndef ELEMENT
#define ELEMENT float
#endif
#ifndef FUSED
#define FUSED 1
#endif

__device__ __forceinline__ float scaled(float z, float alpha, float beta) {
    return FUSED ? __fmaf_rn(z, alpha, beta) : __fadd_rn(__fmul_rn(z, alpha), beta);
}

// z (rows, columns) -> out of the same shape: a thread an element.
extern "C" __global__ void affine(const ELEMENT* __restrict__ z, const float* __restrict__ alpha,
                                  const float* __restrict__ beta, float* __restrict__ out, long long rows, int columns) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < rows * columns) out[i] = scaled((float)z[i], alpha[i % columns], beta[i % columns]);
}

// z (rows, columns) -> out (rows, 2 ceil(columns / 64)) of 32 bits, the signs. Launch one warp for each of them.
extern "C" __global__ void affine_pack(const ELEMENT* __restrict__ z, const float* __restrict__ alpha,
                                       const float* __restrict__ beta, u32* __restrict__ out, long long rows, int columns) {
    int halves = 2 * divide_up(columns, 64), lane = threadIdx.x % 32;
    long long half = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (half >= rows * halves) return;  // whole warps
    int column = (int)(half % halves) * 32 + lane;
    bool negative = column < columns && scaled((float)z[half / halves * columns + column], alpha[column], beta[column]) < 0;
    u32 bits = __ballot_sync(ALL_LANES, negative);
    if (lane == 0) out[half] = bits;
}
