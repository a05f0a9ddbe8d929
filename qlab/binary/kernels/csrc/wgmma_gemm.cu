// Binary matrix product on the warpgroup tensor cores of Hopper (wgmma m64nNk256, AND + popcount), capability 9.0.
//
// A block forms BM x BN results; each of its BM / 64 warpgroups owns 64 rows and all BN columns. The tensor cores read the tiles
// from shared memory themselves, so a thread only copies, waits and keeps its accumulators. Order of one step, for tile t:
//     its copies are done -> barrier (by then every warpgroup has finished tile t - 2) -> start the products of tile t
//     -> wait for those of tile t - 1 -> start the copies of tile t + STAGES - 2 into the place that tile t - 2 has left.
// With 3 stages that would be right too, but the assembler then serialises the products.
#include "common.cuh"
#include "fragment.cuh"
#include "tensor.cuh"
#include "wgmma.cuh"

#ifndef BM
#define BM 128
#endif
#ifndef BN
#define BN 256
#endif
#ifndef STAGES
#define STAGES 4
#endif
#ifndef CHUNK
#define CHUNK 16
#endif

constexpr int THREADS = BM / 64 * 128;
constexpr int STAGE_BYTES = (BM + BN) * ROW_BYTES;
static_assert(BM % 64 == 0 && (BN == 64 || BN == 128 || BN == 256) && STAGES >= 4, "shapes of the instruction");

extern "C" __global__ void __launch_bounds__(THREADS)
    wgmma_gemm(const u64* __restrict__ a, const u64* __restrict__ b, int rows, int columns, int words, int k,
               const int* __restrict__ a_popcounts, const int* __restrict__ b_popcounts, void* out, const int* threshold,
               const u32* flip) {
    DYNAMIC_SHARED(memory);
    u32 shared = shared_address(memory);
    int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    long long row0 = (long long)blockIdx.x * BM;
    int column0 = blockIdx.y * BN, tiles = divide_up(words, ROW_WORDS);

    auto start = [&](int tile) {
        if (tile < tiles) {
            u32 stage = shared + tile % STAGES * STAGE_BYTES;
            copy_tile<BM, THREADS, CHUNK>(stage, a, row0, rows, tile * ROW_WORDS, words);
            copy_tile<BN, THREADS, CHUNK>(stage + BM * ROW_BYTES, b, column0, columns, tile * ROW_WORDS, words);
        }
        copy_commit();  // an empty group too, so that group n is always tile n
    };

    int c[BN / 8][4] = {};
    for (int tile = 0; tile < STAGES - 2; ++tile) start(tile);
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<STAGES - 3>();
        wgmma_sees_shared();
        __syncthreads();
        u32 stage = shared + tile % STAGES * STAGE_BYTES;
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
            wgmma_and_popc(c, tile_descriptor(stage + group * 64 * ROW_BYTES + step * 32),
                           tile_descriptor(stage + BM * ROW_BYTES + step * 32));
        wgmma_commit();
        wgmma_wait<1>();
        start(tile + STAGES - 2);
    }
    wgmma_wait<0>();
    wgmma_arrived(c);
    copy_wait<0>();

    Finish finish = {{out, threshold, flip, columns}, a_popcounts, b_popcounts, rows, k};
#pragma unroll
    for (int half = 0; half < 2; ++half)
        finish.store(c, half * 2, row0 + group * 64 + warp * 16 + half * 8 + lane / 4, column0, lane);
}
