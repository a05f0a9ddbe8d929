// What happens to an integer z once it is known: stored as int32, or, where PACKED is 1, compared with its column's threshold
// and stored as one bit,
//     bit = (z < threshold[column]) xor flip[column],
// which is convolution + batch norm + sign in one comparison. Padding bits are written as 0.
#pragma once
#include "common.cuh"

#ifndef PACKED
#define PACKED 0
#endif

struct Epilogue {
    void* out;             // int32 (rows, columns), or words (rows, 2 ceil(columns / 64)) of 32 bits
    const int* threshold;  // (columns,), PACKED only
    const u32* flip;       // 32-bit words over the columns, PACKED only
    int columns;

    __device__ __forceinline__ bool below(int column, int z) const { return column < columns && z < threshold[column]; }

    __device__ __forceinline__ int halves() const { return 2 * divide_up(columns, 64); }

    // Store 32 bits that start at `column`, a multiple of 32.
    __device__ __forceinline__ void store_bits(long long row, int column, u32 bits) const {
        int half = column / 32;
        if (half < halves())
            ((u32*)out)[row * halves() + half] = (bits ^ flip[half]) & valid_bits(column, columns);
    }

    // The 32 lanes of a warp hold 32 neighbouring columns of one row; all lanes must come here.
    __device__ __forceinline__ void store_lanes(long long row, int first, int lane, int z) const {
#if PACKED
        u32 bits = __ballot_sync(ALL_LANES, below(first + lane, z));
        if (lane == 0) store_bits(row, first, bits);
#else
        if (first + lane < columns) ((int*)out)[row * columns + first + lane] = z;
#endif
    }
};
