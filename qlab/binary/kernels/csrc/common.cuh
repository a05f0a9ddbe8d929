// Names that every kernel of this folder uses.
//
// Bit 1 means -1, bit 0 means +1; bit i of the 64-bit word j holds element 64 j + i; padding bits are 0. On a little-endian
// machine the two 32-bit halves of a word are 32-bit words of the same convention: kernels use whichever width suits them.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr u32 ALL_LANES = 0xffffffffu;

__device__ __forceinline__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// The bits of a 32-bit word that starts at column `first` and belong to one of `columns` columns; the others are padding.
__device__ __forceinline__ u32 valid_bits(int first, int columns) {
    int left = columns - first;
    return left >= 32 ? ~0u : left <= 0 ? 0u : (1u << left) - 1u;
}
