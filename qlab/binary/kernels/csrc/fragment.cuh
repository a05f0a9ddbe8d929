// The end of the tensor-core kernels: z = K - 2 popc(a xor b) from popc(a and b) and the popcounts of the rows,
//     popc(a xor b) = popc(a) + popc(b) - 2 popc(a and b).
#pragma once
#include "epilogue.cuh"

struct Finish {
    Epilogue epilogue;
    const int* a_popcounts;  // (rows,)
    const int* b_popcounts;  // (columns,)
    long long rows;
    int k;

    // One row of NT neighbouring 8-column tiles from column `first` on, a multiple of 32; lane t = lane mod 4 holds columns 2t and
    // 2t + 1 of each tile, in c[tile][at] and c[tile][at + 1]. All lanes of the warp come here.
    template <int NT>
    __device__ __forceinline__ void store(const int (&c)[NT][4], int at, long long row, int first, int lane) const {
        int t = lane % 4, base = row < rows ? k - 2 * a_popcounts[row] : 0;
#pragma unroll
        for (int part = 0; part < NT / 4; ++part) {
            [[maybe_unused]] u32 bits = 0;
#pragma unroll
            for (int tile = part * 4; tile < part * 4 + 4; ++tile)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    int column = first + tile * 8 + 2 * t + e;
                    if (row >= rows || column >= epilogue.columns) continue;
                    int z = base - 2 * b_popcounts[column] + 4 * c[tile][at + e];
#if PACKED
                    bits |= (u32)epilogue.below(column, z) << (tile % 4 * 8 + 2 * t + e);
#else
                    ((int*)epilogue.out)[row * epilogue.columns + column] = z;
#endif
                }
#if PACKED  // the four lanes of a row hold different bits of its 32
            bits |= __shfl_xor_sync(ALL_LANES, bits, 1);
            bits |= __shfl_xor_sync(ALL_LANES, bits, 2);
            if (t == 0 && row < rows) epilogue.store_bits(row, first + part * 32, bits);
#endif
        }
    }
};
