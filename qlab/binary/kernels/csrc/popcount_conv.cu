// Binary convolution, direct, on channels-last words: x (N, H, W, G, Wg), w (O, kh, kw, Wg), z (N, OH, OW, O) with O = G Og.
//
// It is the product of popcount_gemm.cu with a = the taps of an output position, gathered while a tile is copied: word q of a row
// is word q mod Wg of tap q div Wg. A tap outside the picture is copied as 0, which means +1: that is padding "one".
// Padding "zero" takes those taps out again: with p[o, t] = popc(w[o, t]), what a tap of zeros had counted, and V valid taps,
//     z = V C/G - 2 (popcount - sum over taps t outside of p[o, t]).
// Only positions at the border do this. blockIdx.z is the group.
//
// With DIGITS = 1, x holds digits {0, 1} and 0 outside pads exactly: z = popc(a) - 2 popc(a and w), popc(a) counted while a is
// copied.
#include "common.cuh"
#include "epilogue.cuh"
#include "popcount_tile.cuh"

// Of TAPS taps with step `dilation`, the first one at `start`: [low, high) is the range inside [0, size).
__device__ __forceinline__ void valid_taps(int start, int dilation, int taps, int size, int& low, int& high) {
    low = start < 0 ? divide_up(-start, dilation) : 0;
    high = start >= size ? 0 : divide_up(size - start, dilation);
    if (high > taps) high = taps;
    if (low > high) low = high;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    popcount_conv(const u64* __restrict__ x, const u64* __restrict__ w, const int* __restrict__ tap_popcounts, int batch,
                  int height, int width, int groups, int group_words, int group_channels, int group_outputs, int kernel_h,
                  int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w, int dilation_h, int dilation_w,
                  int out_height, int out_width, void* out, const int* threshold, const u32* flip) {
    __shared__ Tile tile;
    __shared__ long long image[BM];        // first word of the row's picture
    __shared__ int top[BM], left[BM];      // where the row's first tap lies
#if DIGITS
    __shared__ int digits[BM];
#endif
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int taps = kernel_h * kernel_w, words = taps * group_words, pixel_words = groups * group_words;
    long long row0 = (long long)blockIdx.x * BM, rows = (long long)batch * out_height * out_width;
    int column0 = blockIdx.y * BN, group = blockIdx.z;
    const u64* group_w = w + (long long)group * group_outputs * words;

    for (int r = threadIdx.x; r < BM; r += THREADS) {
        long long row = row0 + r;
        int position = (int)(row % ((long long)out_height * out_width));
        image[r] = row / ((long long)out_height * out_width) * height * width * pixel_words;
        top[r] = row < rows ? position / out_width * stride_h - pad_h : height;  // a row too many has no tap inside
        left[r] = position % out_width * stride_w - pad_w;
#if DIGITS
        digits[r] = 0;
#endif
    }
    __syncthreads();

    Sums sums;
    sums.clear();
    for (int first = 0; first < words; first += BK) {
#pragma unroll 2  // two divisions by variables: more copies of them only cost registers
        for (int i = threadIdx.x; i < BM * BK; i += THREADS) {
            int r = i / BK, q = first + i % BK;
            u64 value = 0;
            if (q < words) {
                int tap = q / group_words;
                int h = top[r] + tap / kernel_w * dilation_h, v = left[r] + tap % kernel_w * dilation_w;
                if (h >= 0 && h < height && v >= 0 && v < width)
                    value = x[image[r] + ((long long)h * width + v) * pixel_words + group * group_words + q % group_words];
            }
            tile.a[r][i % BK] = value;
#if DIGITS
            atomicAdd(&digits[r], __popcll(value));
#endif
        }
        for (int i = threadIdx.x; i < BN * BK; i += THREADS) {
            int c = i / BK, q = first + i % BK;
            bool inside = column0 + c < group_outputs && q < words;
            tile.b[c][i % BK] = inside ? group_w[(long long)(column0 + c) * words + q] : 0;
        }
        __syncthreads();
        sums.add(tile, words - first < BK ? words - first : BK, warp, lane);
        __syncthreads();
    }

#if PACKED  // groups = 1: the host packs a grouped convolution in a second pass
    Epilogue epilogue = {out, threshold, flip, group_outputs};
#endif
#pragma unroll
    for (int i = 0; i < TM; ++i) {
        int r = warp * TM + i;
        long long row = row0 + r;
        if (row >= rows) break;
        int h0 = 0, h1 = kernel_h, w0 = 0, w1 = kernel_w;
        if (tap_popcounts) {
            valid_taps(top[r], dilation_h, kernel_h, height, h0, h1);
            valid_taps(left[r], dilation_w, kernel_w, width, w0, w1);
        }
        int valid = (h1 - h0) * (w1 - w0);
#pragma unroll
        for (int j = 0; j < TN; ++j) {
            int column = column0 + j * 32 + lane, count = sums.total(i, j);
            if (valid < taps && column < group_outputs)
                for (int t = 0; t < taps; ++t) {
                    int th = t / kernel_w, tw = t % kernel_w;
                    if (th < h0 || th >= h1 || tw < w0 || tw >= w1)
                        count -= tap_popcounts[((long long)group * group_outputs + column) * taps + t];
                }
#if DIGITS
            int z = digits[r] - 2 * count;
#else
            int z = valid * group_channels - 2 * count;
#endif
#if PACKED
            epilogue.store_lanes(row, column0 + j * 32, lane, z);
#else
            if (column < group_outputs)
                ((int*)out)[row * groups * group_outputs + (long long)group * group_outputs + column] = z;
#endif
        }
    }
}
