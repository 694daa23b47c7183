#include "zcore/unpack_signs.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

static void unpack_whole(const std::uint8_t* ZCORE_RESTRICT signs, std::size_t bytes, std::uint32_t scale,
                         float* ZCORE_RESTRICT values) {
    for (std::size_t at = 0; at < bytes; ++at) {
        for (std::uint32_t bit = 0; bit < 8; ++bit) {
            const std::uint32_t sign = (signs[at] & (1u << bit)) != 0u ? 0x80000000u : 0u;
            values[8 * at + bit] = float_of_bits(scale | sign);
        }
    }
}

// Blocks [begin, end).
void unpack_part(const std::uint8_t* signs, const float* scales, const SignsLayout& layout, Flat out,
                 std::size_t begin, std::size_t end) {
    alignas(64) float buffer[block_numel];
    for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * layout.block_size, rest = layout.numel - first;
        const std::size_t stop = first + (rest < layout.block_size ? rest : layout.block_size);
        const std::uint32_t scale = bits_of_float(scales[block]);
        for (std::size_t at = first; at < stop; at += block_numel) {
            const std::size_t count = block_at(at, stop);
            float* const values = out.type == Type::f32 ? static_cast<float*>(out.data) + at : buffer;
            unpack_whole(signs + at / 8, count / 8, scale, values);
            for (std::size_t last = count - count % 8; last < count; ++last) {
                const std::uint32_t sign = static_cast<std::uint32_t>(signs[(at + last) / 8]) >> (last % 8) << 31;
                values[last] = float_of_bits(scale | sign);
            }
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
