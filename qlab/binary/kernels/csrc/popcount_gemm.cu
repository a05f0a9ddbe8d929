// Binary matrix product on any GPU: z[m, n] = base[m] - 2 popc(a[m] xor b[n]) with base = K,
// or with DIGITS = 1 and base[m] = popc(a[m]):  z[m, n] = sum_k a[m, k] b[n, k] for digits a in {0, 1} and signs b.
//
// Steps of a block: (1) copy BK words of its rows of a and b to shared memory, 0 outside; (2) every thread adds its TM x TN
// popcounts; (3) after the last words, the epilogue. 0 outside is exact: 0 xor 0 and 0 and 0 have no bits.
#include "common.cuh"
#include "epilogue.cuh"
#include "popcount_tile.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    popcount_gemm(const u64* __restrict__ a, const u64* __restrict__ b, int rows, int columns, int words, int k,
                  const int* __restrict__ row_base, void* out, const int* threshold, const u32* flip) {
    __shared__ Tile tile;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    long long row0 = (long long)blockIdx.x * BM;
    int column0 = blockIdx.y * BN;
    Sums sums;
    sums.clear();
    for (int first = 0; first < words; first += BK) {
        for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
            int r = i / BK, w = i % BK;
            bool inside = row0 + r < rows && first + w < words;
            tile.a[r][w] = inside ? a[(row0 + r) * words + first + w] : 0;
        }
        for (int i = threadIdx.x; i < BN * BK; i += THREADS) {
            int c = i / BK, w = i % BK;
            bool inside = column0 + c < columns && first + w < words;
            tile.b[c][w] = inside ? b[(long long)(column0 + c) * words + first + w] : 0;
        }
        __syncthreads();
        sums.add(tile, words - first < BK ? words - first : BK, warp, lane);
        __syncthreads();
    }
    Epilogue epilogue = {out, threshold, flip, columns};
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        long long row = row0 + warp * TM + i;
        if (row >= rows) break;  // the same for all lanes of the warp
        int base = row_base ? row_base[row] : k;
#pragma unroll
        for (int j = 0; j < TN; ++j) epilogue.store_lanes(row, column0 + j * 32, lane, base - 2 * sums.total(i, j));
    }
}
