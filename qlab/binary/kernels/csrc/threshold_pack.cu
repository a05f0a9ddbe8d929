// Integers to bits: bit = (z < threshold[column]) xor flip[column], the sign of a batch-normalised sum in one comparison.
#define PACKED 1
#include "common.cuh"
#include "epilogue.cuh"

// z (rows, columns) -> out (rows, 2 ceil(columns / 64)) of 32 bits. Launch one warp for each 32-bit word of the output.
extern "C" __global__ void threshold_pack(const int* __restrict__ z, const int* threshold, const u32* flip, u32* out,
                                          long long rows, int columns) {
    Epilogue epilogue = {out, threshold, flip, columns};
    int halves = epilogue.halves(), lane = threadIdx.x % 32;
    long long half = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (half >= rows * halves) return;  // whole warps
    long long row = half / halves;
    int first = (int)(half % halves) * 32;
    epilogue.store_lanes(row, first, lane, first + lane < columns ? z[row * columns + first + lane] : 0);
}
