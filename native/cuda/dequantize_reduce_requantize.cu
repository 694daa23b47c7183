#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/codes.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

namespace {

// Travels with the launch, whether it is full or not: so there is a small one.
template <std::size_t capacity>
struct Shards {
    Quantized each[capacity];
    std::uint32_t count;
};
constexpr std::size_t few = 16;

template <std::size_t capacity>
__global__ void __launch_bounds__(most_threads)
    reduce_kernel(const __grid_constant__ Shards<capacity> shards, float factor, Quantized out, Format format,
                  Rounding rounding, Tiling plan) {
    const Tile tile = this_tile(plan);
    Held held;
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            held.values[each][at] = -0.0f;  // what is added to it keeps all its bits, which +0 would not
        }
    }
#pragma unroll 1
    for (std::uint32_t shard = 0; shard < shards.count; ++shard) {
        dequantize_tile<true>(shards.each[shard], tile, plan, format, held);
    }
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            held.values[each][at] = first_of(each) + at < tile.count ? held.values[each][at] * factor : 0.0f;
        }
    }
    quantize_tile(held, tile, plan, out, format, rounding);
}

template <std::size_t capacity>
void reduce(std::span<const Quantized> shards, float factor, const Quantized& out, const QuantizedLayout& layout,
            const Rounding& rounding, Stream stream) {
    Shards<capacity> given{};
    std::copy(shards.begin(), shards.end(), given.each);
    given.count = static_cast<std::uint32_t>(shards.size());
    const Tiling plan = plan_tiles(layout.numel, layout.block_size);
    launch("dequantize_reduce_requantize", reduce_kernel<capacity>, plan.num_tiles, plan.threads, 0, stream, given,
           factor, out, layout.format, rounding, plan);
}

}  // namespace

void dequantize_reduce_requantize(std::span<const Quantized> shards, float factor, const Quantized& out,
                                  const QuantizedLayout& layout, const Rounding& rounding, Stream stream) {
    if (shards.empty() || shards.size() > largest_num_shards) {
        throw std::invalid_argument("dequantize_reduce_requantize got " + std::to_string(shards.size()) +
                                    " shards; expected 1 to " + std::to_string(largest_num_shards) + ".");
    }
    if (shards.size() <= few) {
        reduce<few>(shards, factor, out, layout, rounding, stream);
    } else {
        reduce<largest_num_shards>(shards, factor, out, layout, rounding, stream);
    }
}

}  // namespace zcore::cuda
