// One block in fp32 to codes and back, by the formulas of quantize_blockwise.hpp. For code that is compiled once for each
// instruction set: everything is `static`, and in the namespace of that set.
//
// All sets give the same bits: each operation below rounds once (no product is fused with a sum, see CMakeLists.txt),
// extremes are found among integers that are ordered as the floats are, and no sum depends on how it is cut.
#pragma once

#include "cpu/blocks.hpp"
#include "cpu/noise.hpp"
#include "zcore/quantized.hpp"

namespace zcore::ZCORE_ISA {

constexpr float smallest_scale = 0x1p-126f;
constexpr std::int32_t infinity_bits = 0x7f800000;
constexpr float to_integer = 0x1.8p23f;  // added to |x| < 2^22 it leaves x, rounded to the nearest, in the lowest bits

// What integers of a format hold. Symmetric blocks leave the lowest out.
struct Integers {
    float lowest, highest;
};

static inline Integers integers_of(Format format) {
    return format == Format::int4 ? Integers{-8.0f, 7.0f} : Integers{-128.0f, 127.0f};
}

static inline float largest_of(Format format) {
    switch (format) {
        case Format::int8: return 127.0f;
        case Format::int4: return 7.0f;
        case Format::e4m3: return 448.0f;
        default: return 57344.0f;
    }
}

// Where codes of `format` for the element `at` lie, which is even where two share a byte.
static inline std::uint8_t* codes_at(const Quantized& of, Format format, std::size_t at) {
    return static_cast<std::uint8_t*>(of.codes) + (format == Format::int4 ? at / 2 : at);
}

// ---- The extremes of a block

struct Range {
    float low, high;  // zero lies between
    bool is_finite;
};

static inline Range magnitude_of(const float* values, std::size_t count) {
    std::int32_t largest = 0;  // the bits of a NaN exceed those of an infinity, and these all others
    for (std::size_t at = 0; at < count; ++at) {
        const auto bits = static_cast<std::int32_t>(bits_of_float(values[at]) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    return {0.0f, float_of_bits(static_cast<std::uint32_t>(largest)), largest < infinity_bits};
}

// Turns the bits of a float into an integer of the same order, and back.
static inline std::int32_t ordered(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

static inline float float_of_ordered(std::int32_t value) {
    return float_of_bits(static_cast<std::uint32_t>(ordered(value)));
}

static inline Range range_of(const float* values, std::size_t count) {
    std::int32_t low = 0, high = 0;
    for (std::size_t at = 0; at < count; ++at) {
        const std::int32_t value = ordered(static_cast<std::int32_t>(bits_of_float(values[at])));
        low = value < low ? value : low;
        high = value > high ? value : high;
    }
    const std::int32_t minus_infinity = ordered(static_cast<std::int32_t>(0xff800000u));
    return {float_of_ordered(low), float_of_ordered(high), low > minus_infinity && high < infinity_bits};
}

// ---- Rounding to codes, a chunk of at most block_numel at a time

// An integer near |value| < 2^22: the nearest, or one of its neighbours by `noise`.
template <bool is_stochastic>
static inline std::int32_t integer_near(float value, std::uint32_t noise) {
    const float shifted = value + to_integer;
    const auto nearest = static_cast<std::int32_t>(bits_of_float(shifted) - bits_of_float(to_integer));
    if constexpr (is_stochastic) {
        const float whole = shifted - to_integer;
        const float floor = whole > value ? whole - 1.0f : whole;
        const std::int32_t below = nearest - (whole > value ? 1 : 0);
        return below + (unit_of(noise) < value - floor ? 1 : 0);
    }
    return nearest;
}

template <bool is_stochastic>
static inline void encode_integers(const float* ZCORE_RESTRICT values, const std::uint32_t* ZCORE_RESTRICT noise,
                                   std::size_t count, float inverse, Integers range, std::int32_t zero_point,
                                   std::uint8_t* ZCORE_RESTRICT codes) {
    const float lowest = range.lowest - static_cast<float>(zero_point);
    const float highest = range.highest - static_cast<float>(zero_point);
    for (std::size_t at = 0; at < count; ++at) {
        float value = values[at] * inverse;
        value = value < lowest ? lowest : value;
        value = value > highest ? highest : value;
        const std::int32_t code = integer_near<is_stochastic>(value, is_stochastic ? noise[at] : 0u) + zero_point;
        codes[at] = static_cast<std::uint8_t>(code);
    }
}

// fp8 with `mantissa` bits, whose exponent is 0 at `bias`. Above the smallest normal number, 2^(1 - bias), bits of fp32
// are dropped; below, numbers are multiples of 2^(1 - bias - mantissa).
template <int mantissa, int bias>
struct Float8 {
    static constexpr int dropped = 23 - mantissa;
    static constexpr std::uint32_t rebias = static_cast<std::uint32_t>(127 - bias) << 23;
    static constexpr float smallest_normal = 1.0f / static_cast<float>(1 << (bias - 1));
    static constexpr float quantum = smallest_normal / static_cast<float>(1 << mantissa);
};
using E4m3 = Float8<3, 7>;
using E5m2 = Float8<2, 15>;

template <typename Float, bool is_stochastic>
static inline void encode_floats(const float* ZCORE_RESTRICT values, const std::uint32_t* ZCORE_RESTRICT noise,
                                 std::size_t count, float inverse, float largest, std::uint8_t* ZCORE_RESTRICT codes) {
    constexpr std::uint32_t half = 1u << (Float::dropped - 1);
    constexpr float per_quantum = 1.0f / Float::quantum;
    for (std::size_t at = 0; at < count; ++at) {
        const std::uint32_t all = bits_of_float(values[at] * inverse), sign = (all >> 24) & 0x80u;
        float magnitude = float_of_bits(all & 0x7fffffffu);
        magnitude = magnitude > largest ? largest : magnitude;
        const std::uint32_t bits = bits_of_float(magnitude);
        const std::uint32_t random = is_stochastic ? noise[at] : 0u;
        const std::uint32_t added =
            is_stochastic ? random >> (32 - Float::dropped) : half - 1u + ((bits >> Float::dropped) & 1u);
        const std::uint32_t normal = (bits + added - Float::rebias) >> Float::dropped;
        const bool is_small = magnitude < Float::smallest_normal;
        const float multiple = is_small ? magnitude * per_quantum : 0.0f;
        const auto small = static_cast<std::uint32_t>(integer_near<is_stochastic>(multiple, random));
        codes[at] = static_cast<std::uint8_t>(sign | (is_small ? small : normal));
    }
}

// `count` bytes with a number of 4 bits each, the last of which may lack its neighbour, into half as many.
static inline void pack_halves(const std::uint16_t* ZCORE_RESTRICT pairs, std::size_t count,
                               std::uint8_t* ZCORE_RESTRICT codes) {
    const std::size_t whole = count / 2;
    for (std::size_t at = 0; at < whole; ++at) {
        codes[at] = static_cast<std::uint8_t>((pairs[at] & 0x0fu) | ((pairs[at] >> 4) & 0xf0u));
    }
    if (count % 2 != 0) {
        codes[whole] = static_cast<std::uint8_t>(pairs[whole] & 0x0fu);
    }
}

template <bool is_stochastic>
static inline void encode_chunk(const float* values, const std::uint32_t* noise, std::size_t count, float inverse,
                                bool is_symmetric, std::int32_t zero_point, Format format, std::uint8_t* codes) {
    Integers range = integers_of(format);
    range.lowest += is_symmetric ? 1.0f : 0.0f;
    const float largest = largest_of(format);
    switch (format) {
        case Format::int8:
            encode_integers<is_stochastic>(values, noise, count, inverse, range, zero_point, codes);
            return;
        case Format::int4: {
            alignas(64) std::uint16_t pairs[block_numel / 2];
            auto* const bytes = reinterpret_cast<std::uint8_t*>(pairs);
            encode_integers<is_stochastic>(values, noise, count, inverse, range, zero_point, bytes);
            pack_halves(pairs, count, codes);
            return;
        }
        case Format::e4m3:
            encode_floats<E4m3, is_stochastic>(values, noise, count, inverse, largest, codes);
            return;
        default: encode_floats<E5m2, is_stochastic>(values, noise, count, inverse, largest, codes);
    }
}

// Quantises `count` values, the block `block` of `out`.
static inline void quantize_block(const float* values, std::size_t count, std::size_t block, const Quantized& out,
                                  const QuantizedLayout& layout, const Rounding& rounding) {
    const bool is_symmetric = out.zero_points == nullptr;
    const Integers range = integers_of(layout.format);
    const Range extent = is_symmetric ? magnitude_of(values, count) : range_of(values, count);
    const float levels = range.highest - range.lowest;
    float scale = is_symmetric ? extent.high / largest_of(layout.format)
                               : extent.high / levels - extent.low / levels;  // the difference itself may overflow
    const std::size_t begin = block * layout.block_size;
    std::uint8_t* const codes = codes_at(out, layout.format, begin);
    if (!extent.is_finite) {
        out.scales[block] = float_of_bits(0x7fc00000u);
        if (!is_symmetric) {
            out.zero_points[block] = 0;
        }
        std::memset(codes, 0, layout.format == Format::int4 ? (count + 1) / 2 : count);
        return;
    }
    scale = scale < smallest_scale ? smallest_scale : scale;
    const float inverse = 1.0f / scale;
    std::int32_t zero_point = 0;
    if (!is_symmetric) {
        float place = range.lowest - extent.low * inverse;
        place = place > range.highest ? range.highest : place;
        zero_point = integer_near<false>(place, 0u);
        out.zero_points[block] = static_cast<std::int8_t>(zero_point);
    }
    out.scales[block] = scale;
    alignas(64) std::uint32_t noise[block_numel];
    for (std::size_t at = 0; at < count; at += block_numel) {
        const std::size_t chunk = block_at(at, count);
        std::uint8_t* const to = codes + (layout.format == Format::int4 ? at / 2 : at);
        if (rounding.is_stochastic) {
            fill_noise(rounding.seed, rounding.offset + begin + at, chunk, noise);
            encode_chunk<true>(values + at, noise, chunk, inverse, is_symmetric, zero_point, layout.format, to);
        } else {
            encode_chunk<false>(values + at, noise, chunk, inverse, is_symmetric, zero_point, layout.format, to);
        }
    }
}

// ---- Reading codes, a chunk of at most block_numel at a time

static inline void decode_integers(const std::int8_t* ZCORE_RESTRICT codes, std::size_t count, float scale,
                                   std::int32_t zero_point, float* ZCORE_RESTRICT values) {
    for (std::size_t at = 0; at < count; ++at) {
        values[at] = static_cast<float>(codes[at] - zero_point) * scale;
    }
}

// `count` numbers of 4 bits into a byte each, from 0 to 15: 8 more than they are, as a borrow would cross bytes.
static inline void unpack_halves(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count,
                                 std::uint16_t* ZCORE_RESTRICT pairs) {
    for (std::size_t at = 0; at < (count + 1) / 2; ++at) {
        const std::uint32_t both = codes[at];
        pairs[at] = static_cast<std::uint16_t>(((both & 0x0fu) | (both & 0xf0u) << 4) ^ 0x0808u);
    }
}

template <typename Float, std::uint32_t first_special, std::uint32_t special_bits>
static inline void decode_floats(const std::uint8_t* ZCORE_RESTRICT codes, std::size_t count, float scale,
                                 float* ZCORE_RESTRICT values) {
    constexpr std::uint32_t first_normal = 1u << (23 - Float::dropped);
    for (std::size_t at = 0; at < count; ++at) {
        const std::uint32_t code = codes[at], magnitude = code & 0x7fu;
        const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * Float::quantum;
        std::uint32_t bits = (magnitude << Float::dropped) + Float::rebias;
        bits = magnitude < first_normal ? bits_of_float(small) : bits;
        bits = magnitude == first_special ? special_bits : bits;
        bits = magnitude > first_special ? 0x7fc00000u : bits;
        values[at] = float_of_bits(bits | (code & 0x80u) << 24) * scale;
    }
}

static inline void decode_chunk(const std::uint8_t* codes, std::size_t count, float scale, std::int32_t zero_point,
                                Format format, float* values) {
    switch (format) {
        case Format::int8:
            decode_integers(reinterpret_cast<const std::int8_t*>(codes), count, scale, zero_point, values);
            return;
        case Format::int4: {
            alignas(64) std::uint16_t pairs[block_numel / 2];
            unpack_halves(codes, count, pairs);
            decode_integers(reinterpret_cast<const std::int8_t*>(pairs), count, scale, zero_point + 8, values);
            return;
        }
        case Format::e4m3: decode_floats<E4m3, 0x7fu, 0x7fc00000u>(codes, count, scale, values); return;
        default: decode_floats<E5m2, 0x7cu, 0x7f800000u>(codes, count, scale, values);
    }
}

// The elements [at, at + count) of `from`, all of one block, and `at` a multiple of block_numel after its first.
static inline void dequantize_chunk(const Quantized& from, const QuantizedLayout& layout, std::size_t block,
                                    std::size_t at, std::size_t count, float* values) {
    const std::int32_t zero_point = from.zero_points == nullptr ? 0 : from.zero_points[block];
    decode_chunk(codes_at(from, layout.format, at), count, from.scales[block], zero_point, layout.format, values);
}

}  // namespace zcore::ZCORE_ISA
