// wgmma: a warpgroup (4 warps) multiplies 64 rows of a with N rows of b, 256 bits deep, both read from shared memory in the
// background. Capability 9.0 only (sm_90a).
#pragma once
#include "tensor.cuh"

// Where a tile of 128-byte rows begins (a multiple of 1024, plus 32 bytes per 256 bits of depth): bits 0-13 the address / 16,
// 16-29 the leading offset (unused here, 1), 32-45 the bytes / 16 from 8 rows to the next 8, 62-63 the 128-byte swizzle.
__device__ __forceinline__ u64 tile_descriptor(u32 address) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)(8 * ROW_BYTES >> 4) << 32 | (u64)1 << 62;
}

#ifdef __CUDA_ARCH__

// What the threads wrote to shared memory becomes visible to wgmma, which reads through another path.
__device__ __forceinline__ void wgmma_sees_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Before the first instruction that uses registers the thread has written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most PENDING of the committed groups are under way.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Tells the compiler that the accumulators have changed by now: without it, it reads them before the wait, notices, and
// serialises all products of the loop.
template <int TILES>
__device__ __forceinline__ void wgmma_arrived(int (&c)[TILES][4]) {
#pragma unroll
    for (int i = 0; i < TILES; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) asm volatile("" : "+r"(c[i][e])::"memory");
}

// Operand lists "%0, %1, ..." and "+r"(c[0][0]), ... of the instruction.
#define TEN(d) "%" d "0, %" d "1, %" d "2, %" d "3, %" d "4, %" d "5, %" d "6, %" d "7, %" d "8, %" d "9"
#define R4(i) "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3])
#define R16(i) R4(i), R4(i + 1), R4(i + 2), R4(i + 3)
#define R64(i) R16(i), R16(i + 4), R16(i + 8), R16(i + 12)
#define WGMMA(n, operands, a, b, ...)                                                                           \
    asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, 0, 0;\n"                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" n "k256.s32.b1.b1.and.popc {" operands "}, %" a ", %" b ", p;\n}\n" \
                 : __VA_ARGS__                                                                                       \
                 : "l"(descriptor_a), "l"(descriptor_b))

// Start c += popc(a and b); c[tile] is laid out as in mma_and_popc, and warp w of the group has the
// rows 16 w ... 16 w + 15. c must not be touched before wgmma_wait.
__device__ __forceinline__ void wgmma_and_popc(int (&c)[8][4], u64 descriptor_a, u64 descriptor_b) {
    WGMMA("64", TEN("") ", " TEN("1") ", " TEN("2") ", %30, %31", "32", "33", R16(0), R16(4));
}
__device__ __forceinline__ void wgmma_and_popc(int (&c)[16][4], u64 descriptor_a, u64 descriptor_b) {
    WGMMA("128", TEN("") ", " TEN("1") ", " TEN("2") ", " TEN("3") ", " TEN("4") ", " TEN("5") ", %60, %61, %62, %63", "64", "65",
          R64(0));
}
__device__ __forceinline__ void wgmma_and_popc(int (&c)[32][4], u64 descriptor_a, u64 descriptor_b) {
    WGMMA("256",
          TEN("") ", " TEN("1") ", " TEN("2") ", " TEN("3") ", " TEN("4") ", " TEN("5") ", " TEN("6") ", " TEN("7") ", " TEN(
              "8") ", " TEN("9") ", " TEN("10") ", " TEN("11") ", %120, %121, %122, %123, %124, %125, %126, %127",
          "128", "129", R64(0), R64(16));
}

#endif
