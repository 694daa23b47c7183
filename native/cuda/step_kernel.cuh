// The kernel of all steps, and its launches: thread blocks of 8 warps, one for each chunk of 16,384 elements, each warp
// a tile at a time.
//
// Sums go into one slot of scratch for each chunk, and a second kernel adds the slots of each piece: in one order, so
// that they are equal from run to run.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/lane.hpp"
#include "cuda/launch.hpp"
#include "cuda/pieces.hpp"
#include "cuda/steps.hpp"
#include "zcore/cuda/stream.hpp"

namespace zcore::cuda {

constexpr unsigned block_warps = 8, block_threads = block_warps * lanes;
static_assert(block_threads == num_codes);  // a thread fills one entry of the tables

static __device__ __forceinline__ std::uint32_t largest_of_warp(std::uint32_t value) {
    ZCORE_UNROLL
    for (unsigned half = lanes / 2; half > 0; half /= 2) {
        value = max(value, __shfl_xor_sync(0xffffffffu, value, half));
    }
    return value;
}

static __device__ __forceinline__ double sum_of_warp(double value) {
    ZCORE_UNROLL
    for (unsigned half = lanes / 2; half > 0; half /= 2) {
        value += __shfl_down_sync(0xffffffffu, value, half);
    }
    return value;
}

// The sum over a block, in its first thread; `slots` has one for each warp.
static __device__ __forceinline__ double sum_of_block(double value, double* slots) {
    value = sum_of_warp(value);
    if (threadIdx.x % lanes == 0) {
        slots[threadIdx.x / lanes] = value;
    }
    __syncthreads();
    double total = 0.0;
    if (threadIdx.x == 0) {
        for (unsigned warp = 0; warp < block_warps; ++warp) {
            total += slots[warp];
        }
    }
    __syncthreads();  // before the slots are used again
    return total;
}

template <typename Step>
__global__ void __launch_bounds__(block_threads) step_kernel(const __grid_constant__ Arguments<Step> arguments) {
    constexpr int num_states = Step::num_states;
    __shared__ DynamicTables tables[at_least_one<Step>];
    const auto& pieces = arguments.pieces;
    const Part part = pieces.part_of(blockIdx.x);
    if constexpr (num_states > 0) {
        ZCORE_UNROLL
        for (int each = 0; each < num_states; ++each) {
            const Type type = pieces.state(each, part.piece).type;
            if (is_of_codes(type)) {
                fill_entry(tables[each], static_cast<int>(threadIdx.x), type == Type::signed_code);
            }
        }
        __syncthreads();
    }
    Step step = arguments.step;
    step.begin(part.piece);
    const unsigned lane = threadIdx.x % lanes, warp = threadIdx.x / lanes;
    double sums[Step::num_sums == 0 ? 1 : Step::num_sums] = {};
    for (std::size_t tile = part.begin + warp; tile < part.end; tile += block_warps) {
        LaneTile<Step> share;
        share.load(pieces, part.piece, tile, lane);
        share.step(step, pieces, part.piece, tile, lane, tables, sums);
        std::uint32_t largest[at_least_one<Step>] = {};
        if constexpr (Step::writes_states) {
            ZCORE_UNROLL
            for (int each = 0; each < num_states; ++each) {
                if (is_of_codes(pieces.state(each, part.piece).type)) {  // the same for all lanes
                    largest[each] = largest_of_warp(share.largest(each));
                }
            }
        }
        share.store(pieces, part.piece, tile, lane, tables, largest);
    }
    if constexpr (Step::num_sums > 0) {
        __shared__ double slots[block_warps];
        ZCORE_UNROLL
        for (int each = 0; each < Step::num_sums; ++each) {
            const double total = sum_of_block(sums[each], slots);
            if (threadIdx.x == 0) {
                arguments.sums[static_cast<std::size_t>(blockIdx.x) * Step::num_sums + each] = total;
            }
        }
    }
}

// Adds the slots of each piece, a block for each: `totals` has `num_sums` for each piece of the launch.
template <typename Step, typename Total>
__global__ void __launch_bounds__(block_threads)
    total_kernel(const __grid_constant__ Arguments<Step> arguments, Total* totals) {
    __shared__ double slots[block_warps];
    const std::uint32_t begin = arguments.pieces.first_chunk[blockIdx.x];
    const std::uint32_t end = arguments.pieces.first_chunk[blockIdx.x + 1];
    for (int each = 0; each < Step::num_sums; ++each) {
        double sum = 0.0;
        for (std::size_t chunk = begin + threadIdx.x; chunk < end; chunk += block_threads) {
            sum += arguments.sums[chunk * Step::num_sums + each];
        }
        const double total = sum_of_block(sum, slots);
        if (threadIdx.x == 0) {
            totals[static_cast<std::size_t>(blockIdx.x) * Step::num_sums + each] = static_cast<Total>(total);
        }
    }
}

// Launches a step over `pieces`, as many at a time as the arguments of a launch hold. before(arguments, first) sets
// what depends on the place of the first piece in the list; after(arguments, first) follows a launch.
template <typename Step, typename Piece, typename Before, typename After>
void launch_steps(const char* op, std::span<const Piece> pieces, const Step& step, Stream stream, const Before& before,
                  const After& after) {
    static_assert(sizeof(Arguments<Step>) + sizeof(void*) <= argument_bytes);
    for (std::size_t first = 0; first < pieces.size(); first += Arguments<Step>::capacity) {
        Arguments<Step> arguments{{}, step, nullptr};
        for (const Piece& piece : pieces.subspan(first).first(std::min<std::size_t>(
                 pieces.size() - first, Arguments<Step>::capacity))) {
            arguments.pieces.add(operands_of(piece));
        }
        before(arguments, first);
        const std::uint32_t chunks = arguments.pieces.first_chunk[arguments.pieces.count];
        if (chunks > 0) {
            step_kernel<Step><<<chunks, block_threads, 0, stream>>>(arguments);
            check_launch(op);
        }
        after(arguments, first);
    }
}

template <typename Step, typename Piece>
void launch_steps(const char* op, std::span<const Piece> pieces, const Step& step, Stream stream) {
    const auto nothing = [](const Arguments<Step>&, std::size_t) {};
    launch_steps(op, pieces, step, stream, nothing, nothing);
}

}  // namespace zcore::cuda
