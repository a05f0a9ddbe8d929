// A first layer on bytes: x = sum_n 2^n plane_n, so that 8 products of bits replace one product of bytes.
#include "common.cuh"

// x (rows, columns) bytes -> out (8, rows, 2 ceil(columns / 64)) of 32 bits; plane n holds bit n, and here bit 1 is the digit 1.
// A warp reads 32 neighbours and packs each plane by a ballot. Launch one warp for each 32-bit word of a plane.
extern "C" __global__ void bitplanes(const unsigned char* __restrict__ x, u32* __restrict__ out, long long rows, int columns) {
    int halves = 2 * divide_up(columns, 64), lane = threadIdx.x % 32;
    long long half = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (half >= rows * halves) return;  // whole warps
    int column = (int)(half % halves) * 32 + lane;
    u32 byte = column < columns ? x[half / halves * columns + column] : 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        u32 bits = __ballot_sync(ALL_LANES, (byte >> n) & 1);
        if (lane == 0) out[n * rows * halves + half] = bits;
    }
}
