// The inner part of the popcount kernels, matrix product and convolution alike: a block of 8 warps forms a tile of
// 8 TM rows by 32 TN columns; a warp owns TM rows, a lane one column in 32, so that a row's 32 neighbouring columns meet in a warp
// and a ballot packs them.
//
// The popcount unit gives 16 results per multiprocessor and clock, the logic unit 64. A carry-save adder therefore halves the
// popcounts: with `ones` the bits seen an odd number of times,
//     ones + lo + hi = 2 carry + ones',   carry = majority(ones, lo, hi),   ones' = ones xor lo xor hi   (bit by bit),
// a 64-bit word costs one popcount of 32 bits instead of two, and the total is 2 sum popc(carry) + popc(ones).
#pragma once
#include "common.cuh"

#ifndef TM
#define TM 4
#endif
#ifndef TN
#define TN 4
#endif
#ifndef DIGITS  // 1: popcounts of a and b, for digits 0 and 1 times signs; 0: of a xor b, for signs times signs
#define DIGITS 0
#endif

constexpr int WARPS = 8;
constexpr int THREADS = 32 * WARPS;
constexpr int BM = WARPS * TM;
constexpr int BN = 32 * TN;
constexpr int BK = 8;           // words of a tile
constexpr int STRIDE = BK + 1;  // odd: 64-bit loads of 32 neighbouring rows fall into different banks

// Sum and carry of three bits in every place. One instruction each: written in C++ the compiler spreads them over six.
__device__ __forceinline__ u32 add_sum(u32 a, u32 b, u32 c) {
#ifdef __CUDA_ARCH__
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return a ^ b ^ c;
#endif
}
__device__ __forceinline__ u32 add_carry(u32 a, u32 b, u32 c) {
#ifdef __CUDA_ARCH__
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xe8;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
#else
    return (a & b) | (c & (a | b));
#endif
}

struct Tile {
    u64 a[BM][STRIDE];
    u64 b[BN][STRIDE];
};

struct Sums {
    u32 ones[TM][TN];
    int twos[TM][TN];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < TM; ++i)
#pragma unroll
            for (int j = 0; j < TN; ++j) ones[i][j] = twos[i][j] = 0;
    }

    __device__ __forceinline__ void add(const Tile& tile, int depth, int warp, int lane) {
#pragma unroll 2
        for (int k = 0; k < depth; ++k) {
            u64 a[TM], b[TN];
#pragma unroll
            for (int i = 0; i < TM; ++i) a[i] = tile.a[warp * TM + i][k];
#pragma unroll
            for (int j = 0; j < TN; ++j) b[j] = tile.b[j * 32 + lane][k];
#pragma unroll
            for (int i = 0; i < TM; ++i)
#pragma unroll
                for (int j = 0; j < TN; ++j) {
                    u64 x = DIGITS ? a[i] & b[j] : a[i] ^ b[j];
                    u32 lo = (u32)x, hi = (u32)(x >> 32), old = ones[i][j];
                    twos[i][j] += __popc(add_carry(old, lo, hi));
                    ones[i][j] = add_sum(old, lo, hi);
                }
        }
    }

    __device__ __forceinline__ int total(int i, int j) const { return 2 * twos[i][j] + __popc(ones[i][j]); }
};
