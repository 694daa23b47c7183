// Blocks in fp32 to codes and back, a chunk at a time, by what elements/codes.hpp says of one element. For code that is
// compiled once for each instruction set: everything is `static`, and in the namespace of that set.
#pragma once

#include "cpu/groups.hpp"
#include "cpu/noise.hpp"
#include "elements/codes.hpp"
#include "zcore/quantized.hpp"

namespace zcore::ZCORE_ISA {

// Where codes of `format` for the element `at` lie, which is even where two share a byte.
static inline std::uint8_t* codes_at(const Quantized& of, Format format, std::size_t at) {
    return static_cast<std::uint8_t*>(of.codes) + (format == Format::int4 ? at / 2 : at);
}

static inline Range magnitude_of(const float* values, std::size_t count) {
    std::int32_t largest = 0;
    for (std::size_t at = 0; at < count; ++at) {
        const std::int32_t bits = magnitude_bits(values[at]);
        largest = bits > largest ? bits : largest;
    }
    return range_of_magnitude(largest);
}

static inline Range range_of(const float* values, std::size_t count) {
    std::int32_t low = 0, high = 0;
    for (std::size_t at = 0; at < count; ++at) {
        const std::int32_t value = ordered_bits(values[at]);
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    return range_of_ordered(low, high);
}

template <bool is_stochastic>
static inline void encode_integers(const float* ZCORE_RESTRICT values, const std::uint16_t* ZCORE_RESTRICT noise,
                                   std::size_t count, float inverse, Integers range, std::int32_t zero_point,
                                   std::uint32_t* ZCORE_RESTRICT codes) {
    const float lowest = range.lowest - static_cast<float>(zero_point);
    const float highest = range.highest - static_cast<float>(zero_point);
    for (std::size_t at = 0; at < count; ++at) {
        codes[at] = code_of_integer<is_stochastic>(values[at] * inverse, is_stochastic ? noise[at] : 0u, lowest,
                                                   highest, zero_point);
    }
}

template <typename Float, bool is_stochastic>
static inline void encode_floats(const float* ZCORE_RESTRICT values, const std::uint16_t* ZCORE_RESTRICT noise,
                                 std::size_t count, float inverse, float largest, std::uint32_t* ZCORE_RESTRICT codes) {
    for (std::size_t at = 0; at < count; ++at) {
        codes[at] = code_of_float<Float, is_stochastic>(values[at] * inverse, is_stochastic ? noise[at] : 0u, largest);
    }
}

// The part of one block that lies in a chunk, to codes of 32 bits: they are narrowed a chunk at a time.
template <bool is_stochastic>
static inline void encode(const float* values, const std::uint16_t* noise, std::size_t count, float scale,
                          bool is_symmetric, std::int32_t zero_point, Format format, std::uint32_t* codes) {
    if (scale != scale) {
        std::memset(codes, 0, count * sizeof *codes);
        return;
    }
    const float inverse = 1.0f / scale, largest = largest_of(format);
    switch (format) {
        case Format::e4m3: encode_floats<E4m3, is_stochastic>(values, noise, count, inverse, largest, codes); return;
        case Format::e5m2: encode_floats<E5m2, is_stochastic>(values, noise, count, inverse, largest, codes); return;
        default: {
            Integers range = integers_of(format);
            range.lowest += is_symmetric ? 1.0f : 0.0f;
            encode_integers<is_stochastic>(values, noise, count, inverse, range, zero_point, codes);
        }
    }
}

static inline void narrow_bytes(const std::uint32_t* ZCORE_RESTRICT codes, std::size_t count,
                                std::uint8_t* ZCORE_RESTRICT out) {
    for (std::size_t at = 0; at < count; ++at) {
        out[at] = static_cast<std::uint8_t>(codes[at]);
    }
}

// Two to a byte; the last of an odd `count` has a zero for a neighbour.
static inline void narrow_halves(const std::uint32_t* codes, std::size_t count, std::uint8_t* ZCORE_RESTRICT out) {
    alignas(64) std::uint16_t pairs[block_numel / 2];
    narrow_bytes(codes, count, reinterpret_cast<std::uint8_t*>(pairs));
    for (std::size_t at = 0; at < count / 2; ++at) {
        out[at] = static_cast<std::uint8_t>((pairs[at] & 0x0fu) | ((pairs[at] >> 4) & 0xf0u));
    }
    if (count % 2 != 0) {
        out[count / 2] = static_cast<std::uint8_t>(codes[count - 1] & 0x0fu);
    }
}

// Finds and stores the scale of a block, and its zero point if it has one.
static inline void measure_block(const float* values, std::size_t count, std::size_t block, const Quantized& out,
                                 Format format) {
    const bool is_symmetric = out.zero_points == nullptr;
    const Range extent = is_symmetric ? magnitude_of(values, count) : range_of(values, count);
    const BlockCode code = code_of_block(extent, is_symmetric, format);
    out.scales[block] = code.scale;
    if (!is_symmetric) {
        out.zero_points[block] = static_cast<std::int8_t>(code.zero_point);
    }
}

// Quantises the values of a group, whose first block is `block`.
static inline void quantize_group(const float* values, Group group, std::size_t block, const Quantized& out,
                                  const QuantizedLayout& layout, const Rounding& rounding) {
    const bool is_symmetric = out.zero_points == nullptr;
    for_each_block(block, group.count, layout.block_size, [&](std::size_t each, std::size_t start, std::size_t size) {
        measure_block(values + start, size, each, out, layout.format);
    });
    alignas(64) std::uint32_t codes[block_numel];
    alignas(64) std::uint16_t noise[block_numel];
    const std::size_t step = chunk_numel(layout.block_size);
    for (std::size_t at = 0; at < group.count; at += step) {
        const std::size_t chunk = group.count - at < step ? group.count - at : step;
        const std::size_t first = block + at / layout.block_size;
        if (rounding.is_stochastic) {
            fill_noise(rounding.seed, rounding.offset + group.begin + at, chunk, noise);
        }
        for_each_block(first, chunk, layout.block_size, [&](std::size_t each, std::size_t start, std::size_t size) {
            const auto encode_block = rounding.is_stochastic ? encode<true> : encode<false>;
            encode_block(values + at + start, noise + start, size, out.scales[each], is_symmetric,
                         is_symmetric ? 0 : out.zero_points[each], layout.format, codes + start);
        });
        std::uint8_t* const to = codes_at(out, layout.format, group.begin + at);
        if (layout.format == Format::int4) {
            narrow_halves(codes, chunk, to);
        } else {
            narrow_bytes(codes, chunk, to);
        }
    }
}

static inline void widen_bytes(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count,
                               float* ZCORE_RESTRICT values) {
    for (std::size_t at = 0; at < count; ++at) {
        values[at] = value_of_byte(codes[at]);
    }
}

static inline void widen_halves(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count,
                                float* ZCORE_RESTRICT values) {
    alignas(64) std::uint16_t pairs[block_numel / 2];
    for (std::size_t at = 0; at < (count + 1) / 2; ++at) {
        const std::uint32_t both = codes[at];
        pairs[at] = static_cast<std::uint16_t>((both & 0x0fu) | (both & 0xf0u) << 4);
    }
    const auto* const halves = reinterpret_cast<const std::uint8_t*>(pairs);
    for (std::size_t at = 0; at < count; ++at) {
        values[at] = value_of_half(halves[at]);
    }
}

#if defined(__F16C__)
// fp16 has the exponent of e5m2 and eight less than that of e4m3 (times 2^8, then), and hardware that reads it.
static inline void widen_e5m2(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count,
                              float* ZCORE_RESTRICT values) {
    alignas(64) std::uint16_t halves[block_numel];
    for (std::size_t at = 0; at < count; ++at) {
        halves[at] = static_cast<std::uint16_t>(codes[at] << 8);
    }
    floats_of_f16(halves, values, count);
}

static inline void widen_e4m3(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count,
                              float* ZCORE_RESTRICT values) {
    alignas(64) std::uint16_t halves[block_numel];
    for (std::size_t at = 0; at < count; ++at) {
        const std::uint32_t magnitude = codes[at] & 0x7fu, sign = codes[at] & 0x80u;
        const std::uint32_t special = magnitude == E4m3::special ? 0x7c00u : 0u;
        halves[at] = static_cast<std::uint16_t>(sign << 8 | magnitude << 7 | special);
    }
    floats_of_f16(halves, values, count);
    for (std::size_t at = 0; at < count; ++at) {
        values[at] *= 256.0f;
    }
}
#else
template <typename Float>
static inline void widen_floats(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count,
                                float* ZCORE_RESTRICT values) {
    for (std::size_t at = 0; at < count; ++at) {
        values[at] = value_of_float<Float>(codes[at]);
    }
}

static inline void widen_e5m2(const std::uint8_t* codes, std::size_t count, float* values) {
    widen_floats<E5m2>(codes, count, values);
}

static inline void widen_e4m3(const std::uint8_t* codes, std::size_t count, float* values) {
    widen_floats<E4m3>(codes, count, values);
}
#endif

// What codes stand for before zero point and scale.
static inline void widen(const std::uint8_t* codes, std::size_t count, Format format, float* values) {
    switch (format) {
        case Format::int8: widen_bytes(codes, count, values); return;
        case Format::int4: widen_halves(codes, count, values); return;
        case Format::e4m3: widen_e4m3(codes, count, values); return;
        default: widen_e5m2(codes, count, values);
    }
}

template <bool adds>
static inline void scale_values(const float* ZCORE_RESTRICT values, std::size_t count, float scale, float zero_point,
                                float* ZCORE_RESTRICT out) {
    for (std::size_t at = 0; at < count; ++at) {
        const float value = (values[at] - zero_point) * scale;
        out[at] = adds ? out[at] + value : value;
    }
}

// Elements [at, at + count) of `from`, the first of which is one of `block`: written, or added to what is in `out`.
template <bool adds>
static inline void dequantize_chunk(const Quantized& from, const QuantizedLayout& layout, std::size_t block,
                                    std::size_t at, std::size_t count, float* out) {
    alignas(64) float values[block_numel];
    widen(codes_at(from, layout.format, at), count, layout.format, values);
    for_each_block(block, count, layout.block_size, [&](std::size_t each, std::size_t start, std::size_t size) {
        const float zero_point = from.zero_points == nullptr ? 0.0f : static_cast<float>(from.zero_points[each]);
        scale_values<adds>(values + start, size, from.scales[each], zero_point, out + start);
    });
}

}  // namespace zcore::ZCORE_ISA
