// A CUDA device on the CPU, as small as the kernels of this lab need: what a kernel says is executed as it is written.
//
// The blocks of a grid run one after the other. The threads of a block are coroutines on one thread of the operating system: each
// runs until it must wait for the others (__syncthreads, a warp's ballot, shuffle or matrix instruction); a coroutine that waits
// for a partner which never comes is an error, not a hang. Nothing here is faster or more forgiving than it must be:
//   * dynamic shared memory starts as garbage;
//   * work in the background (copies by cp.async, products by wgmma) happens as late as it may, at the wait that demands it, so
//     that a missing wait gives wrong numbers here too; with EAGER_COPIES = 1 copies happen at once, so that a tile which is
//     overwritten while others still read it does.
// Not modelled: the memory model between threads (coroutines see every write at once), and anything of time.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

#define __global__
#define __device__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)
#define DYNAMIC_SHARED(name) unsigned char* name = shim::dynamic_memory

namespace shim {

constexpr unsigned WARP = 32, STACK_BYTES = 64 * 1024, SHARED_LIMIT = 227 * 1024;

enum class Waits { nothing, block, warp, finished };

template <typename Work>
struct Background {  // work that waits to be done, in groups
    std::vector<Work> open;
    std::vector<std::vector<Work>> groups;
    void commit() { groups.push_back(std::exchange(open, {})); }
    void wait(size_t pending) {
        for (; groups.size() > pending; groups.erase(groups.begin()))
            for (const Work& work : groups.front()) work.run();
    }
};

struct Copy {
    unsigned to, size, bytes;
    const void* from;
    void run() const;
};

struct Product {
    int* sums;
    unsigned tiles, warp, lane;
    uint64_t descriptor_a, descriptor_b;
    void run() const;
};

struct Thread {
    ucontext_t context;
    std::vector<unsigned char> stack = std::vector<unsigned char>(STACK_BYTES);
    Waits waits = Waits::nothing;
    unsigned exchanges = 0;  // how many times it has met its warp
    Background<Copy> copies;
    Background<Product> products;
};

struct Warp {
    uint64_t slots[2][WARP][4];  // of the even and the odd exchanges
};

alignas(1024) inline unsigned char dynamic_memory[SHARED_LIMIT];
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline ucontext_t scheduler;
inline void (*body)(void** arguments);
inline void** body_arguments;
inline std::exception_ptr failure;

inline Thread& self() { return threads[threadIdx.x]; }

inline void wait_for(Waits what) {
    Thread& thread = self();
    unsigned index = threadIdx.x;
    thread.waits = what;
    swapcontext(&thread.context, &scheduler);
    threadIdx.x = index;
}

// Give `values` to the warp, wait for all its lanes, and return everyone's.
template <size_t N>
uint64_t (&meet_warp(const uint64_t (&values)[N]))[WARP][4] {
    auto& slots = warps[threadIdx.x / WARP].slots[self().exchanges++ % 2];
    std::copy(values, values + N, slots[threadIdx.x % WARP]);
    wait_for(Waits::warp);
    return slots;
}

inline void enter() {
    try {
        body(body_arguments);
    } catch (...) {
        failure = std::current_exception();
    }
    self().waits = Waits::finished;
    swapcontext(&self().context, &scheduler);  // never resumed
}

inline void resume(unsigned index) {
    threadIdx.x = index;
    threads[index].waits = Waits::nothing;
    swapcontext(&scheduler, &threads[index].context);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

// Run the threads [first, last) until each waits for the block or has finished; the lanes of a warp meet on the way.
inline void run_warp(unsigned first, unsigned last) {
    for (;;) {
        unsigned at_warp = 0, alive = 0;
        for (unsigned i = first; i < last; ++i) {
            if (threads[i].waits == Waits::nothing) resume(i);
            alive += threads[i].waits != Waits::finished;
            at_warp += threads[i].waits == Waits::warp;
        }
        if (at_warp == 0) return;
        if (at_warp != WARP) throw std::runtime_error("a warp instruction that only some lanes reach");
        for (unsigned i = first; i < last; ++i) threads[i].waits = Waits::nothing;
    }
}

inline void run_block(unsigned size) {
    std::memset(dynamic_memory, 0xa5, SHARED_LIMIT);
    for (unsigned i = 0; i < size; ++i) {
        Thread& thread = threads[i];
        thread.waits = Waits::nothing;
        thread.exchanges = 0;
        thread.copies = {};
        thread.products = {};
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = STACK_BYTES;
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, enter, 0);
    }
    for (;;) {
        unsigned waiting = 0, finished = 0;
        for (unsigned first = 0; first < size; first += WARP) run_warp(first, first + WARP);
        for (unsigned i = 0; i < size; ++i) {
            waiting += threads[i].waits == Waits::block;
            finished += threads[i].waits == Waits::finished;
        }
        if (finished == size) return;
        if (waiting != size) throw std::runtime_error("a __syncthreads that only some threads of the block reach");
        for (unsigned i = 0; i < size; ++i) threads[i].waits = Waits::nothing;
    }
}

template <auto KERNEL, typename... Arguments, size_t... I>
void call(void (*)(Arguments...), void** arguments, std::index_sequence<I...>) {
    KERNEL(*static_cast<Arguments*>(arguments[I])...);
}

// As cudaLaunchKernel, but that the arguments come with their sizes, to be checked. Returns the text of an error, or null.
// One launch at a time: the caller sees to that.
template <auto KERNEL, typename... Arguments>
const char* launch(void (*)(Arguments...), const unsigned* grid, unsigned block, unsigned shared, unsigned count,
                   const unsigned* sizes, void** arguments) {
    static std::string error;
    try {
        constexpr unsigned expected[] = {sizeof(Arguments)...};
        if (count != sizeof...(Arguments)) throw std::runtime_error("not as many arguments as the kernel has");
        for (unsigned i = 0; i < count; ++i)
            if (sizes[i] != expected[i]) throw std::runtime_error("argument " + std::to_string(i) + " is not of the kernel's type");
        if (block % WARP) throw std::runtime_error("the block is not made of whole warps");
        if (shared > SHARED_LIMIT) throw std::runtime_error("more shared memory than a block can have");
        if (threads.size() < block) threads.resize(block);
        warps.resize(block / WARP);
        body = [](void** values) { call<KERNEL>(KERNEL, values, std::index_sequence_for<Arguments...>{}); };
        body_arguments = arguments;
        gridDim = {grid[0], grid[1], grid[2]};
        blockDim = {block, 1, 1};
        for (blockIdx.z = 0; blockIdx.z < grid[2]; ++blockIdx.z)
            for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
                for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x) run_block(block);
        return nullptr;
    } catch (const std::exception& e) {
        error = e.what();
        return error.c_str();
    }
}

}  // namespace shim

#define SHIM_LAUNCHER(kernel)                                                                                    \
    extern "C" const char* launch_##kernel(const unsigned* grid, unsigned block, unsigned shared, unsigned count, \
                                           const unsigned* sizes, void** arguments) {                            \
        return shim::launch<kernel>(kernel, grid, block, shared, count, sizes, arguments);                               \
    }

// ---- what CUDA C++ has -------------------------------------------------------------------------------------------------

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }

inline void __syncthreads() { shim::wait_for(shim::Waits::block); }

inline void demand_all_lanes(unsigned mask) {
    if (mask != ~0u) throw std::runtime_error("the shim knows warp instructions of all 32 lanes only");
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    demand_all_lanes(mask);
    auto& all = shim::meet_warp<1>({predicate});
    unsigned bits = 0;
    for (unsigned lane = 0; lane < shim::WARP; ++lane) bits |= unsigned(all[lane][0]) << lane;
    return bits;
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    demand_all_lanes(mask);
    uint64_t word = 0;
    std::memcpy(&word, &value, sizeof(T));
    uint64_t theirs = shim::meet_warp<1>({word})[(threadIdx.x % shim::WARP) ^ lane_mask][0];
    std::memcpy(&value, &theirs, sizeof(T));
    return value;
}

inline int atomicAdd(int* p, int value) { return std::exchange(*p, *p + value); }

#include "tensor_shim.hpp"
