#include "zcore/quantize_blockwise.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/codes.hpp"

namespace zcore::ZCORE_ISA {

// Blocks [begin, end).
void quantize_part(Flat values, const Quantized& out, const QuantizedLayout& layout, const Rounding& rounding,
                   std::size_t begin, std::size_t end) {
    alignas(64) float buffer[largest_block_size];
    const std::size_t together = blocks_measured(layout.block_size);
    for (std::size_t block = begin; block < end; block += together) {
        const Group group = group_at(layout.numel, layout.block_size, block, end, together);
        quantize_group(load_block(values, group.begin, group.count, buffer), group, block, out, layout, rounding);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void quantize_part(Flat, const Quantized&, const QuantizedLayout&, const Rounding&, std::size_t,
                                     std::size_t))

void quantize_blockwise(Flat values, const Quantized& out, const QuantizedLayout& layout, const Rounding& rounding,
                        int threads) {
    const auto quantize = ZCORE_CHOOSE(quantize_part);
    parallel_for(layout.num_blocks(), blocks_grain(layout.block_size), threads, [&](std::size_t begin, std::size_t end) {
        quantize(values, out, layout, rounding, begin, end);
    });
}

}  // namespace zcore

#endif
