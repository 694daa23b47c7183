#include "zcore/pack_signs.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/signs.hpp"
#include "zcore/quantized.hpp"

#if defined(__SSE2__)
#include <immintrin.h>  // after vectors.hpp, which quiets GCC about it
#endif

namespace zcore::ZCORE_ISA {

// Bit i of the result: the sign of values[i], of 8.
static inline std::uint8_t signs_of(const float* values) {
#if defined(__AVX__)
    return static_cast<std::uint8_t>(_mm256_movemask_ps(_mm256_loadu_ps(values)));
#elif defined(__SSE2__)
    const int low = _mm_movemask_ps(_mm_loadu_ps(values)), high = _mm_movemask_ps(_mm_loadu_ps(values + 4));
    return static_cast<std::uint8_t>(low | high << 4);
#else
    std::uint32_t signs = 0;
    for (std::uint32_t bit = 0; bit < 8; ++bit) {
        signs |= bits_of_float(values[bit]) >> 31 << bit;
    }
    return static_cast<std::uint8_t>(signs);
#endif
}

static void add_error(const float* ZCORE_RESTRICT values, const float* ZCORE_RESTRICT error, std::size_t count,
                      float* ZCORE_RESTRICT sums) {
    for (std::size_t at = 0; at < count; ++at) {
        sums[at] = values[at] + error[at];
    }
}

static double sum_of_magnitudes(const float* values, std::size_t count) {
    double sums[sign_lanes] = {};
    const std::size_t whole = count - count % sign_lanes;
    for (std::size_t row = 0; row < whole; row += sign_lanes) {
        for (std::size_t lane = 0; lane < sign_lanes; ++lane) {
            sums[lane] += magnitude_of(values[row + lane]);
        }
    }
    for (std::size_t rest = whole; rest < count; ++rest) {
        sums[rest - whole] += magnitude_of(values[rest]);
    }
    for (std::size_t half = sign_lanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) {
            sums[lane] += sums[lane + half];
        }
    }
    return sums[0];
}

static void keep_error(const float* ZCORE_RESTRICT sums, std::size_t count, float scale, float* ZCORE_RESTRICT error) {
    for (std::size_t at = 0; at < count; ++at) {
        error[at] = error_left(sums[at], scale);
    }
}

// Blocks [begin, end).
void pack_part(Flat values, float* error, std::uint8_t* signs, float* scales, const SignsLayout& layout,
               std::size_t begin, std::size_t end) {
    alignas(64) float buffer[largest_block_size], sums[largest_block_size];
    for (std::size_t block = begin; block < end; ++block) {
        const std::size_t first = block * layout.block_size, rest = layout.numel - first;
        const std::size_t count = rest < layout.block_size ? rest : layout.block_size;
        add_error(load_block(values, first, count, buffer), error + first, count, sums);
        const float scale = mean_magnitude(sum_of_magnitudes(sums, count), count);
        scales[block] = scale;
        if (scale == scale) {
            keep_error(sums, count, scale, error + first);
        }
        std::size_t at = 0;
        for (; at + 8 <= count; at += 8) {
            signs[(first + at) / 8] = signs_of(sums + at);
        }
        if (at < count) {
            std::uint32_t last = 0;
            for (std::size_t bit = 0; at + bit < count; ++bit) {
                last |= bits_of_float(sums[at + bit]) >> 31 << bit;
            }
            signs[(first + at) / 8] = static_cast<std::uint8_t>(last);
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void pack_part(Flat, float*, std::uint8_t*, float*, const SignsLayout&, std::size_t, std::size_t))

void pack_signs(Flat values, float* error, std::uint8_t* signs, float* scales, const SignsLayout& layout, int threads) {
    const auto pack = ZCORE_CHOOSE(pack_part);
    parallel_for(layout.num_blocks(), blocks_grain(layout.block_size), threads, [&](std::size_t begin, std::size_t end) {
        pack(values, error, signs, scales, layout, begin, end);
    });
}

}  // namespace zcore

#endif
