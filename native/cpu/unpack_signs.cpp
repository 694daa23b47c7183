#include "zcore/unpack_signs.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/groups.hpp"
#include "elements/signs.hpp"

namespace zcore::ZCORE_ISA {

static void spread_signs(const std::uint8_t* ZCORE_RESTRICT signs, std::size_t bytes,
                         std::uint32_t* ZCORE_RESTRICT bits) {
    for (std::size_t at = 0; at < bytes; ++at) {
        for (std::uint32_t bit = 0; bit < 8; ++bit) {
            bits[8 * at + bit] = (signs[at] & (1u << bit)) != 0u ? 0x80000000u : 0u;
        }
    }
}

static void scale_signs(const std::uint32_t* ZCORE_RESTRICT bits, std::size_t count, float scale,
                        float* ZCORE_RESTRICT values) {
    for (std::size_t at = 0; at < count; ++at) {
        values[at] = with_sign(scale, bits[at]);
    }
}

// Blocks [begin, end).
void unpack_part(const std::uint8_t* signs, const float* scales, const SignsLayout& layout, Flat out,
                 std::size_t begin, std::size_t end) {
    alignas(64) float buffer[block_numel];
    alignas(64) std::uint32_t bits[block_numel];
    const std::size_t together = blocks_together(layout.block_size);
    for (std::size_t block = begin; block < end; block += together) {
        const Group group = group_at(layout.numel, layout.block_size, block, end, together);
        const std::size_t stop = group.begin + group.count;
        for (std::size_t at = group.begin; at < stop; at += block_numel) {
            const std::size_t count = block_at(at, stop);
            float* const values = out.type == Type::f32 ? static_cast<float*>(out.data) + at : buffer;
            spread_signs(signs + at / 8, (count + 7) / 8, bits);
            for_each_block(block, count, layout.block_size, [&](std::size_t each, std::size_t start, std::size_t size) {
                scale_signs(bits + start, size, scales[each], values + start);
            });
            store_block(out, at, count, values);
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void unpack_part(const std::uint8_t*, const float*, const SignsLayout&, Flat, std::size_t, std::size_t))

void unpack_signs(const std::uint8_t* signs, const float* scales, const SignsLayout& layout, Flat out, int threads) {
    const auto unpack = ZCORE_CHOOSE(unpack_part);
    parallel_for(layout.num_blocks(), blocks_grain(layout.block_size), threads, [&](std::size_t begin, std::size_t end) {
        unpack(signs, scales, layout, out, begin, end);
    });
}

}  // namespace zcore

#endif
