#include "zcore/dequantize_blockwise.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/codes.hpp"

namespace zcore::ZCORE_ISA {

// Blocks [begin, end).
void dequantize_part(const Quantized& from, const QuantizedLayout& layout, Flat out, std::size_t begin,
                     std::size_t end) {
    alignas(64) float buffer[block_numel];
    const std::size_t together = blocks_together(layout.block_size);
    for (std::size_t block = begin; block < end; block += together) {
        const Group group = group_at(layout.numel, layout.block_size, block, end, together);
        const std::size_t stop = group.begin + group.count;
        for (std::size_t at = group.begin; at < stop; at += block_numel) {
            const std::size_t count = block_at(at, stop);
            float* const values = out.type == Type::f32 ? static_cast<float*>(out.data) + at : buffer;
            dequantize_chunk<false>(from, layout, block, at, count, values);
            store_block(out, at, count, values);
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void dequantize_part(const Quantized&, const QuantizedLayout&, Flat, std::size_t, std::size_t))

void dequantize_blockwise(const Quantized& from, const QuantizedLayout& layout, Flat out, int threads) {
    const auto dequantize = ZCORE_CHOOSE(dequantize_part);
    parallel_for(layout.num_blocks(), blocks_grain(layout.block_size), threads, [&](std::size_t begin, std::size_t end) {
        dequantize(from, layout, out, begin, end);
    });
}

}  // namespace zcore

#endif
