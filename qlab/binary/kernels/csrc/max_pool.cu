// The maximum of -1 and +1 over a window is -1 only where all are -1: an AND of bits, 64 channels at a time.
#include "common.cuh"

// x (batch, height, width, words) -> out (batch, out_height, out_width, words): a thread an output word. Positions outside the
// picture are ignored (the host refuses windows that lie wholly outside).
extern "C" __global__ void max_pool(const u64* __restrict__ x, u64* __restrict__ out, int batch, int height, int width,
                                    int words, int kernel_h, int kernel_w, int stride_h, int stride_w, int pad_h, int pad_w,
                                    int out_height, int out_width) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (long long)batch * out_height * out_width * words) return;
    long long word = i % words, position = i / words, n = position / out_width / out_height;
    int top = (int)(position / out_width % out_height) * stride_h - pad_h, left = (int)(position % out_width) * stride_w - pad_w;
    u64 bits = ~0ull;
    for (int h = top < 0 ? 0 : top; h < top + kernel_h && h < height; ++h)
        for (int v = left < 0 ? 0 : left; v < left + kernel_w && v < width; ++v)
            bits &= x[((n * height + h) * width + v) * words + word];
    out[i] = bits;
}
