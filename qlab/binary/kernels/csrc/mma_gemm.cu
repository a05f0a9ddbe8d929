// Binary matrix product on the 1-bit tensor cores of compute capability 8.0 to 9.0 (mma.sync m16n8k256, AND + popcount).
//
// A block forms BM x BN results, a warp WM x WN of them. Shared memory holds STAGES pairs of tiles of 1024 bits of K; while one
// pair is multiplied, the copies of the next STAGES - 1 are under way. Per 256 bits a warp loads its fragments by ldmatrix and
// issues WM/16 x WN/8 instructions. The popcounts of the rows finish the product (fragment.cuh).
#include "common.cuh"
#include "fragment.cuh"
#include "tensor.cuh"

#ifndef BM
#define BM 128
#endif
#ifndef BN
#define BN 128
#endif
#ifndef WM
#define WM 64
#endif
#ifndef WN
#define WN 32
#endif
#ifndef STAGES
#define STAGES 3
#endif
#ifndef CHUNK
#define CHUNK 16
#endif

constexpr int WARP_ROWS = BM / WM;
constexpr int THREADS = BM / WM * (BN / WN) * 32;
constexpr int STAGE_BYTES = (BM + BN) * ROW_BYTES;
static_assert(BM % WM == 0 && BN % WN == 0 && WM % 16 == 0 && WN % 32 == 0, "whole instructions, whole words");

extern "C" __global__ void __launch_bounds__(THREADS)
    mma_gemm(const u64* __restrict__ a, const u64* __restrict__ b, int rows, int columns, int words, int k,
             const int* __restrict__ a_popcounts, const int* __restrict__ b_popcounts, void* out, const int* threshold,
             const u32* flip) {
    DYNAMIC_SHARED(memory);
    u32 shared = shared_address(memory);
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int warp_row = warp % WARP_ROWS * WM, warp_column = warp / WARP_ROWS * WN;
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

    int c[WM / 16][WN / 8][4] = {};
    for (int tile = 0; tile < STAGES - 1; ++tile) start(tile);
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<STAGES - 2>();
        __syncthreads();  // every thread's part of this tile is there, and nobody reads the previous one any more
        start(tile + STAGES - 1);
        u32 stage_a = shared + tile % STAGES * STAGE_BYTES, stage_b = stage_a + BM * ROW_BYTES;
        int steps = divide_up(words - tile * ROW_WORDS, 4);
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            if (step >= steps) break;
            u32 fa[WM / 16][4], fb[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; ++i)  // matrices: rows 0-7 and 8-15 of the first 128 bits, then of the second
                load_matrices(fa[i], stage_a + chunk_place(warp_row + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < WN / 16; ++j)  // matrices: both halves of rows 0-7, then of rows 8-15
                load_matrices(fb[j], stage_b + chunk_place(warp_column + j * 16 + lane / 16 * 8 + lane % 8,
                                                           step * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < WM / 16; ++i)
#pragma unroll
                for (int j = 0; j < WN / 8; ++j) mma_and_popc(c[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
    copy_wait<0>();

    Finish finish = {{out, threshold, flip, columns}, a_popcounts, b_popcounts, rows, k};
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            finish.store(c[i], half * 2, row0 + warp_row + i * 16 + half * 8 + lane / 4, column0 + warp_column, lane);
}
