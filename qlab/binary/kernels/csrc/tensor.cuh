// The instructions of 1-bit tensor cores and of the copies that feed them. On the CPU the shim defines the same functions.
//
// Rows of a tile are 128 bytes, 1024 bits, in 8 chunks of 16 bytes; chunk c of row r lies at place c xor (r mod 8). So 8 rows of
// one chunk lie in 8 different groups of banks, and it is the "128-byte swizzle" that wgmma reads.
#pragma once
#include "common.cuh"

constexpr int ROW_BYTES = 128;
constexpr int ROW_WORDS = 16;
constexpr int STEPS = 4;  // of 256 bits in a row of a tile

__device__ __forceinline__ u32 chunk_place(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4); }

#ifdef __CUDA_ARCH__

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

#if __CUDA_ARCH__ >= 800

// Copy BYTES (8 or 16) to shared memory in the background; `bytes` of them from `from`, the rest zero.
template <int BYTES>
__device__ __forceinline__ void copy_async(u32 to, const void* from, int bytes) {
    if (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(BYTES), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Wait until at most PENDING of this thread's groups of copies are under way.
template <int PENDING>
__device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 16-byte matrices; lane l gives the address of row l mod 8 of matrix l / 8 and gets bytes 4 (l mod 4) ... of row l / 4.
__device__ __forceinline__ void load_matrices(u32 (&d)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// c (16, 8) += popc(a (16, 256 bits) and b (8, 256 bits)). Of lane l, g = l / 4, t = l mod 4: a = rows g, g + 8, g, g + 8 at bits
// 32 t, 32 t, 128 + 32 t, 128 + 32 t; b = row g at 32 t, 128 + 32 t; c = (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
__device__ __forceinline__ void mma_and_popc(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
#endif

// Start copying ROWS rows of 16 words from `first_word` on into a tile; what lies outside the matrix becomes 0.
// BYTES is 16 where every row of the matrix begins at a multiple of 16 bytes, else 8.
template <int ROWS, int THREADS, int BYTES>
__device__ __forceinline__ void copy_tile(u32 tile, const u64* matrix, long long first_row, long long rows, int first_word,
                                          int words) {
    constexpr int WORDS = BYTES / 8, PER_ROW = ROW_WORDS / WORDS;
    static_assert(ROWS * PER_ROW % THREADS == 0, "every thread copies as much");
#pragma unroll
    for (int n = 0; n < ROWS * PER_ROW / THREADS; ++n) {
        int i = n * THREADS + threadIdx.x, r = i / PER_ROW, word = i % PER_ROW * WORDS;
        bool inside = first_row + r < rows && first_word + word < words;
        const u64* from = inside ? matrix + (first_row + r) * words + first_word + word : matrix;
        copy_async<BYTES>(tile + chunk_place(r, word / 2) + word % 2 * 8, from, inside ? BYTES : 0);
    }
}
