// CUDA's words for plain C++, so that the files of cuda/ can be compiled and run on the CPU: each thread of a thread
// block is a fiber, and they take turns wherever they wait for each other. Included before everything else in such a
// file.
//
// It shows what a kernel computes, and where it reads and writes; not how fast it is, and of races only such as show
// when threads go on upwards in one thread block and downwards in the next. What waits for threads that have ended, or
// that wait in another place, ends the program.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "zcore/cuda/stream.hpp"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) ushort4 {
    unsigned short x, y, z, w;
};

namespace cuda_on_host {

struct Index {
    unsigned x;
};
inline Index thread_index, block_index, block_size;

constexpr unsigned warp_size = 32;
constexpr std::size_t stack_bytes = 64 << 10;

// Holds `count` threads until all of them have come.
struct Barrier {
    unsigned count = 0, arrived = 0, generation = 0;
};

struct Fiber {
    ucontext_t context;
    std::unique_ptr<std::byte[]> stack = std::make_unique<std::byte[]>(stack_bytes);
    bool is_done = false;
    unsigned num_shuffles = 0;
};

// What one thread block runs on. Fibers are kept for the next one.
struct Multiprocessor {
    std::vector<Fiber> fibers;
    std::vector<std::byte> shared;
    std::vector<Barrier> warps;
    std::vector<std::uint64_t> words;  // that lanes show each other, twice as many: the next shuffle may have begun
    Barrier block;
    ucontext_t home;
    const void* home_stack = nullptr;
    std::size_t home_bytes = 0;
    unsigned threads = 0, current = 0, num_done = 0, num_blocks = 0;
    unsigned idle = 0;  // turns since something went on
    void (*body)(void*) = nullptr;
    void* context = nullptr;

    void enter([[maybe_unused]] const void* stack, [[maybe_unused]] std::size_t bytes, ucontext_t* from,
               ucontext_t* to) {
#if defined(__SANITIZE_ADDRESS__)
        void* fake = nullptr;
        __sanitizer_start_switch_fiber(&fake, stack, bytes);
        swapcontext(from, to);
        __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
        swapcontext(from, to);
#endif
    }

    bool is_upward() const { return num_blocks % 2 == 0; }
    unsigned first() const { return is_upward() ? 0 : threads - 1; }

    // Lets the next thread go on that has not ended; returns when it is this one's turn again.
    void yield() {
        if (++idle > 4 * threads) {
            std::fputs("A kernel waits for threads that have ended, or that wait elsewhere.\n", stderr);
            std::abort();
        }
        const unsigned self = current;
        do {
            current = (current + (is_upward() ? 1 : threads - 1)) % threads;
        } while (fibers[current].is_done);
        if (current != self) {
            thread_index.x = current;
            enter(fibers[current].stack.get(), stack_bytes, &fibers[self].context, &fibers[current].context);
        }
    }

    void wait(Barrier& barrier) {
        const unsigned generation = barrier.generation;
        if (++barrier.arrived == barrier.count) {
            barrier.arrived = 0;
            ++barrier.generation;
            idle = 0;
        }
        while (generation == barrier.generation) {
            yield();
        }
    }

    static void start() {
        Multiprocessor& self = here();
#if defined(__SANITIZE_ADDRESS__)
        const bool is_first = self.current == self.first();  // the others come from a fiber
        __sanitizer_finish_switch_fiber(nullptr, is_first ? &self.home_stack : nullptr,
                                        is_first ? &self.home_bytes : nullptr);
#endif
        self.body(self.context);
        self.fibers[self.current].is_done = true;
        self.idle = 0;
        if (++self.num_done < self.threads) {
            self.yield();  // for good
        }
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(nullptr, self.home_stack, self.home_bytes);
#endif
        setcontext(&self.home);
    }

    void run(unsigned count, std::size_t shared_bytes) {
        threads = count;
        if (fibers.size() < threads) {
            fibers = std::vector<Fiber>(threads);
        }
        shared.assign(shared_bytes, std::byte{0x7e});
        words.assign(2 * threads, 0);
        warps.assign(threads / warp_size, Barrier{warp_size});
        block = Barrier{threads};
        idle = num_done = 0;
        for (unsigned each = 0; each < threads; ++each) {
            Fiber& fiber = fibers[each];
            fiber.is_done = false;
            fiber.num_shuffles = 0;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = stack_bytes;
            makecontext(&fiber.context, &Multiprocessor::start, 0);
        }
        ++num_blocks;
        current = thread_index.x = first();
        enter(fibers[current].stack.get(), stack_bytes, &home, &fibers[current].context);
    }

    // The word of another lane; every lane of the warp comes here.
    std::uint64_t shuffled(std::uint64_t word, unsigned lane) {
        const unsigned warp = current / warp_size, turn = fibers[current].num_shuffles++ % 2;
        words[turn * threads + current] = word;
        wait(warps[warp]);
        return words[turn * threads + warp * warp_size + lane];
    }

    static Multiprocessor& here() {
        static Multiprocessor only;
        return only;
    }
};

template <typename Value>
Value shuffle(Value value, unsigned lane) {
    static_assert(sizeof value <= sizeof(std::uint64_t));
    std::uint64_t word = 0;
    std::memcpy(&word, &value, sizeof value);
    word = Multiprocessor::here().shuffled(word, lane);
    std::memcpy(&value, &word, sizeof value);
    return value;
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index
#define blockDim cuda_on_host::block_size

inline void __syncthreads() {
    auto& here = cuda_on_host::Multiprocessor::here();
    here.wait(here.block);
}

template <typename Value>
Value __shfl_xor_sync(unsigned, Value value, unsigned distance) {
    return cuda_on_host::shuffle(value, threadIdx.x % cuda_on_host::warp_size ^ distance);
}

// Within `width` lanes; who would read beyond them keeps its own.
template <typename Value>
Value __shfl_down_sync(unsigned, Value value, unsigned distance, unsigned width = cuda_on_host::warp_size) {
    const unsigned lane = threadIdx.x % cuda_on_host::warp_size;
    return cuda_on_host::shuffle(value, lane % width + distance < width ? lane + distance : lane);
}

inline int atomicMax(int* address, int value) {
    const int before = *address;
    *address = before > value ? before : value;
    return before;
}

inline int atomicMin(int* address, int value) {
    const int before = *address;
    *address = before < value ? before : value;
    return before;
}

namespace zcore::cuda {

template <typename Element>
Element* shared_memory() {
    return reinterpret_cast<Element*>(cuda_on_host::Multiprocessor::here().shared.data());
}

template <typename... Parameters, typename... Arguments>
void launch(const char*, void (*kernel)(Parameters...), std::size_t blocks, unsigned threads, std::size_t shared_bytes,
            Stream, const Arguments&... arguments) {
    auto call = [&] { kernel(arguments...); };
    auto& here = cuda_on_host::Multiprocessor::here();
    here.body = [](void* context) { (*static_cast<decltype(call)*>(context))(); };
    here.context = &call;
    blockDim.x = threads;
    for (std::size_t block = 0; block < blocks; ++block) {
        blockIdx.x = static_cast<unsigned>(block);
        here.run(threads, shared_bytes);
    }
}

}  // namespace zcore::cuda
