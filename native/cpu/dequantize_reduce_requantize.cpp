#include "zcore/dequantize_reduce_requantize.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/codes.hpp"

namespace zcore::ZCORE_ISA {

static void multiply(float* values, std::size_t count, float factor) {
    for (std::size_t at = 0; at < count; ++at) {
        values[at] *= factor;
    }
}

// Blocks [begin, end).
void reduce_part(const Quantized* shards, std::size_t num_shards, float factor, const Quantized& out,
                 const QuantizedLayout& layout, const Rounding& rounding, std::size_t begin, std::size_t end) {
    alignas(64) float sums[largest_block_size];
    const std::size_t step = chunk_numel(layout.block_size);
    const std::size_t together = blocks_measured(layout.block_size);
    for (std::size_t block = begin; block < end; block += together) {
        const Group group = group_at(layout.numel, layout.block_size, block, end, together);
        for (std::size_t at = 0; at < group.count; at += step) {
            const std::size_t chunk = group.count - at < step ? group.count - at : step;
            const std::size_t first = block + at / layout.block_size;
            dequantize_chunk<false>(shards[0], layout, first, group.begin + at, chunk, sums + at);
            for (std::size_t shard = 1; shard < num_shards; ++shard) {
                dequantize_chunk<true>(shards[shard], layout, first, group.begin + at, chunk, sums + at);
            }
            multiply(sums + at, chunk, factor);
        }
        quantize_group(sums, group, block, out, layout, rounding);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include <stdexcept>

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void reduce_part(const Quantized*, std::size_t, float, const Quantized&, const QuantizedLayout&,
                                   const Rounding&, std::size_t, std::size_t))

void dequantize_reduce_requantize(std::span<const Quantized> shards, float factor, const Quantized& out,
                                  const QuantizedLayout& layout, const Rounding& rounding, int threads) {
    if (shards.empty()) {
        throw std::invalid_argument("dequantize_reduce_requantize got no shards; expected one or more.");
    }
    const auto reduce = ZCORE_CHOOSE(reduce_part);
    parallel_for(layout.num_blocks(), blocks_grain(layout.block_size), threads, [&](std::size_t begin, std::size_t end) {
        reduce(shards.data(), shards.size(), factor, out, layout, rounding, begin, end);
    });
}

}  // namespace zcore

#endif
