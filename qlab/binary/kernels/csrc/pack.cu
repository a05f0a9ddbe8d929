// Floats to words and back. bit = x < 0, so that 0, -0 and NaN are +1.
#include "common.cuh"

#ifndef ELEMENT
#define ELEMENT float
#endif

// x (rows, columns) -> out (rows, 2 ceil(columns / 64)) of 32 bits: a warp reads 32 neighbours, a ballot packs them.
// Launch one warp for each 32-bit word of the output.
extern "C" __global__ void pack_rows(const ELEMENT* __restrict__ x, u32* __restrict__ out, long long rows, int columns) {
    int halves = 2 * divide_up(columns, 64), lane = threadIdx.x % 32;
    long long half = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (half >= rows * halves) return;  // whole warps
    int column = (int)(half % halves) * 32 + lane;
    bool negative = column < columns && x[half / halves * columns + column] < 0;
    u32 bits = __ballot_sync(ALL_LANES, negative);
    if (lane == 0) out[half] = bits;
}

// x (batch, channels, pixels) -> out (batch, pixels, ceil(channels / 64)): a thread gathers the 64 channels of a word, and the
// threads of a warp read neighbouring pixels, so that every read of a warp is one stretch of memory.
extern "C" __global__ void pack_channels(const ELEMENT* __restrict__ x, u64* __restrict__ out, long long batch, int channels,
                                         int pixels) {
    int words = divide_up(channels, 64);
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= batch * words * pixels) return;
    long long pixel = i % pixels, word = i / pixels % words, n = i / pixels / words;
    u64 bits = 0;
    for (int c = 0; c < 64 && word * 64 + c < channels; ++c)
        bits |= (u64)(x[(n * channels + word * 64 + c) * pixels + pixel] < 0) << c;
    out[(n * pixels + pixel) * words + word] = bits;
}

// words (rows, ceil(columns / 64)) -> out (rows, columns) of -1 and +1: a thread an element.
extern "C" __global__ void unpack_rows(const u64* __restrict__ words, signed char* __restrict__ out, long long rows,
                                       int columns) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= rows * columns) return;
    int column = (int)(i % columns);
    u64 word = words[i / columns * divide_up(columns, 64) + column / 64];
    out[i] = (word >> (column % 64)) & 1 ? -1 : 1;
}

// words (pixels, ceil(groups channels / 64)) packed over all channels -> out (pixels, groups, ceil(channels / 64)), every group
// starting at a word of its own: a thread an output word.
extern "C" __global__ void align_groups(const u64* __restrict__ words, u64* __restrict__ out, long long pixels, int groups,
                                        int channels) {
    int in_words = divide_up(groups * channels, 64), group_words = divide_up(channels, 64);
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pixels * groups * group_words) return;
    int word = (int)(i % group_words), group = (int)(i / group_words % groups);
    const u64* pixel = words + i / group_words / groups * in_words;
    int first = group * channels + word * 64, count = channels - word * 64, shift = first % 64;
    u64 bits = pixel[first / 64] >> shift;
    if (shift && first / 64 + 1 < in_words) bits |= pixel[first / 64 + 1] << (64 - shift);
    out[i] = count < 64 ? bits & ((1ull << count) - 1) : bits;
}

// words (rows, count) -> out (rows,): the number of ones of a row, a warp a row.
extern "C" __global__ void row_popcounts(const u64* __restrict__ words, int* __restrict__ out, long long rows, int count) {
    int lane = threadIdx.x % 32;
    long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    if (row >= rows) return;  // whole warps
    int sum = 0;
    for (int i = lane; i < count; i += 32) sum += __popcll(words[row * count + i]);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    if (lane == 0) out[row] = sum;
}
