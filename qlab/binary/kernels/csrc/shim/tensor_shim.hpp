// The asynchronous copies and the 1-bit matrix instructions of tensor.cuh and wgmma.cuh, in plain C++, after the PTX manual: which
// lane holds which bits, and how a matrix descriptor addresses shared memory. Addresses in shared memory are offsets, as there.
#pragma once

#ifndef EAGER_COPIES
#define EAGER_COPIES 0
#endif

namespace shim {

inline unsigned char* at(unsigned address, unsigned bytes) {
    if (address + bytes > SHARED_LIMIT) throw std::runtime_error("an address outside of shared memory");
    return dynamic_memory + address;
}

inline void Copy::run() const {
    std::memset(at(to, size), 0, size);
    std::memcpy(at(to, size), from, bytes);
}

}  // namespace shim

inline unsigned shared_address(const void* p) { return unsigned(static_cast<const unsigned char*>(p) - shim::dynamic_memory); }

template <int BYTES>
void copy_async(unsigned to, const void* from, int bytes) {
    if (to % BYTES || reinterpret_cast<uintptr_t>(from) % BYTES) throw std::runtime_error("cp.async of an unaligned address");
    shim::Copy copy = {to, BYTES, unsigned(bytes), from};
    if (EAGER_COPIES)
        copy.run();
    else
        shim::self().copies.open.push_back(copy);
}
inline void copy_commit() { shim::self().copies.commit(); }
template <int PENDING>
void copy_wait() {
    shim::self().copies.wait(PENDING);
}

// ldmatrix.m8n8.x4.b16: lane l names row l mod 8 of matrix l / 8; lane l receives, of each matrix, 4 bytes of row l / 4.
inline void load_matrices(unsigned (&d)[4], unsigned address) {
    if (address % 16) throw std::runtime_error("ldmatrix of an unaligned row");
    auto& rows = shim::meet_warp<1>({address});
    unsigned lane = threadIdx.x % shim::WARP;
    for (unsigned matrix = 0; matrix < 4; ++matrix)
        std::memcpy(&d[matrix], shim::at(unsigned(rows[matrix * 8 + lane / 4][0]), 16) + lane % 4 * 4, 4);
}

// mma.m16n8k256.b1.and.popc. Of lane l, g = l / 4, t = l mod 4. Bits 32 t ... of row g: a[0], of row g + 8: a[1]; bits
// 128 + 32 t ...: a[2], a[3]. b the same with its 8 rows. c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
inline void mma_and_popc(int (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    uint64_t low = a[0] | uint64_t(a[1]) << 32, high = a[2] | uint64_t(a[3]) << 32;
    auto& all = shim::meet_warp<3>({low, high, b0 | uint64_t(b1) << 32});
    unsigned lane = threadIdx.x % shim::WARP;
    for (unsigned e = 0; e < 4; ++e) {
        unsigned row = lane / 4, column = lane % 4 * 2 + e % 2, shift = e / 2 * 32;
        for (unsigned t = 0; t < 4; ++t) {
            const auto& of_a = all[row * 4 + t];
            uint64_t of_b = all[column * 4 + t][2];
            c[e] += __builtin_popcount(unsigned(of_a[0] >> shift) & unsigned(of_b));
            c[e] += __builtin_popcount(unsigned(of_a[1] >> shift) & unsigned(of_b >> 32));
        }
    }
}

namespace shim {

// 8 bytes of row `row` at byte `byte` (a multiple of 8) of a K-major operand with the 128-byte swizzle.
inline uint64_t operand(uint64_t descriptor, unsigned row, unsigned byte) {
    unsigned start = unsigned(descriptor & 0x3fff) << 4, stride = unsigned(descriptor >> 32 & 0x3fff) << 4;
    unsigned address = start + row / 8 * stride + row % 8 * 128 + byte;
    address ^= (address >> 7 & 7) << 4;
    uint64_t word;
    std::memcpy(&word, at(address, 8), 8);
    return word;
}

inline void Product::run() const {
    for (unsigned i = 0; i < tiles * 4; ++i)
        for (unsigned byte = 0; byte < 32; byte += 8)
            sums[i] += __builtin_popcountll(operand(descriptor_a, warp * 16 + i % 4 / 2 * 8 + lane / 4, byte) &
                                            operand(descriptor_b, i / 4 * 8 + lane % 4 * 2 + i % 2, byte));
}

}  // namespace shim

inline void wgmma_sees_shared() {}
inline void wgmma_fence() {}
inline void wgmma_commit() { shim::self().products.commit(); }
template <int PENDING>
void wgmma_wait() {
    shim::self().products.wait(PENDING);
}
template <int TILES>
void wgmma_arrived(int (&)[TILES][4]) {}

template <int TILES>
void wgmma_and_popc(int (&c)[TILES][4], uint64_t descriptor_a, uint64_t descriptor_b) {
    if (descriptor_a >> 62 != 1 || descriptor_b >> 62 != 1) throw std::runtime_error("the shim knows the 128-byte swizzle only");
    shim::self().products.open.push_back(
        {&c[0][0], TILES, threadIdx.x / 32 % 4, threadIdx.x % 32, descriptor_a, descriptor_b});
}
