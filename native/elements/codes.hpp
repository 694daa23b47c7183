// Codes of 8 and 4 bits: the scale of a block, and what one element becomes, by the formulas of quantize_blockwise.hpp.
//
// Each operation rounds once (no product is fused with a sum, see CMakeLists.txt), and extremes are found among
// integers that are ordered as the floats are, so that they do not depend on who compares them in which order.
#pragma once

#include "elements/floats.hpp"
#include "zcore/quantized.hpp"

namespace zcore::ZCORE_ISA {

constexpr float smallest_scale = 0x1p-126f;
constexpr std::int32_t infinity_bits = 0x7f800000;
constexpr float to_integer = 0x1.8p23f;  // added to |x| < 2^22 it leaves x, rounded to the nearest, in the lowest bits

// What integers of a format hold. Symmetric blocks leave the lowest out.
struct Integers {
    float lowest, highest;
};

ZCORE_EACH Integers integers_of(Format format) {
    return format == Format::int4 ? Integers{-8.0f, 7.0f} : Integers{-128.0f, 127.0f};
}

ZCORE_EACH float largest_of(Format format) {
    switch (format) {
        case Format::int8: return 127.0f;
        case Format::int4: return 7.0f;
        case Format::e4m3: return 448.0f;
        default: return 57344.0f;
    }
}

// The bits of |value|: those of a NaN exceed those of an infinity, and these all others.
ZCORE_EACH std::int32_t magnitude_bits(float value) {
    return static_cast<std::int32_t>(bits_of_float(value) & 0x7fffffffu);
}

// Turns the bits of a float into an integer of the same order, and back.
ZCORE_EACH std::int32_t ordered(std::int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

ZCORE_EACH std::int32_t ordered_bits(float value) { return ordered(static_cast<std::int32_t>(bits_of_float(value))); }

// The extremes of a block.
struct Range {
    float low, high;  // zero lies between
    bool is_finite;
};

// From the largest magnitude_bits.
ZCORE_EACH Range range_of_magnitude(std::int32_t largest) {
    return {0.0f, float_of_bits(static_cast<std::uint32_t>(largest)), largest < infinity_bits};
}

// From the least and the largest ordered_bits, and zero.
ZCORE_EACH Range range_of_ordered(std::int32_t low, std::int32_t high) {
    const std::int32_t minus_infinity = ordered(static_cast<std::int32_t>(0xff800000u));
    return {float_of_bits(static_cast<std::uint32_t>(ordered(low))),
            float_of_bits(static_cast<std::uint32_t>(ordered(high))), low > minus_infinity && high < infinity_bits};
}

// An integer near |value| < 2^14: the nearest, or one of its neighbours by 16 bits of noise, which are added to as many
// bits after the point; what lies beyond these is less than fp32 shows of the largest number in a block.
template <bool is_stochastic>
ZCORE_EACH std::int32_t integer_near(float value, std::uint32_t noise) {
    if constexpr (is_stochastic) {
        return (static_cast<std::int32_t>(value * 0x1p16f) + static_cast<std::int32_t>(noise)) >> 16;
    }
    return static_cast<std::int32_t>(bits_of_float(value + to_integer) - bits_of_float(to_integer));
}

// What all codes of a block share.
struct BlockCode {
    float scale;  // NaN where the block is not finite
    std::int32_t zero_point;
};

ZCORE_EACH BlockCode code_of_block(const Range& extent, bool is_symmetric, Format format) {
    const Integers range = integers_of(format);
    const float levels = range.highest - range.lowest;
    float scale = is_symmetric ? extent.high / largest_of(format)
                               : extent.high / levels - extent.low / levels;  // the difference itself may overflow
    scale = scale < smallest_scale ? smallest_scale : scale;
    float place = is_symmetric ? 0.0f : range.lowest - extent.low * (1.0f / scale);
    place = place > range.highest ? range.highest : place;
    return {extent.is_finite ? scale : float_of_bits(0x7fc00000u),
            extent.is_finite ? integer_near<false>(place, 0u) : 0};
}

// The code of an integer for a value over its scale; `lowest` and `highest` are counted from the zero point.
template <bool is_stochastic>
ZCORE_EACH std::uint32_t code_of_integer(float value, std::uint32_t noise, float lowest, float highest,
                                            std::int32_t zero_point) {
    value = value < lowest ? lowest : value;
    value = value > highest ? highest : value;
    return static_cast<std::uint32_t>(integer_near<is_stochastic>(value, noise) + zero_point);
}

// fp8 with `mantissa` bits, whose exponent is 0 at `bias`. Above the smallest normal number, 2^(1 - bias), bits of fp32
// are dropped; below, numbers are multiples of 2^(1 - bias - mantissa). From `special` on codes are no finite numbers.
template <int mantissa, int bias, std::uint32_t special_code>
struct Float8 {
    static constexpr int dropped = 23 - mantissa;
    static constexpr std::uint32_t rebias = static_cast<std::uint32_t>(127 - bias) << 23;
    static constexpr std::uint32_t first_normal = 1u << mantissa;
    static constexpr std::uint32_t special = special_code;
    static constexpr float smallest_normal = 1.0f / static_cast<float>(1 << (bias - 1));
    static constexpr float quantum = smallest_normal / static_cast<float>(1 << mantissa);
};
using E4m3 = Float8<3, 7, 0x7f>;
using E5m2 = Float8<2, 15, 0x7c>;

// The code of fp8 for a value over its scale.
template <typename Float, bool is_stochastic>
ZCORE_EACH std::uint32_t code_of_float(float value, std::uint32_t noise, float largest) {
    constexpr std::uint32_t half = 1u << (Float::dropped - 1);
    constexpr float per_quantum = 1.0f / Float::quantum;
    const std::uint32_t all = bits_of_float(value), sign = (all >> 24) & 0x80u;
    float magnitude = float_of_bits(all & 0x7fffffffu);
    magnitude = magnitude > largest ? largest : magnitude;
    const std::uint32_t bits = bits_of_float(magnitude);
    const std::uint32_t added = is_stochastic ? (2u * noise + 1u) << (Float::dropped - 17)
                                              : half - 1u + ((bits >> Float::dropped) & 1u);
    const std::uint32_t normal = (bits + added - Float::rebias) >> Float::dropped;
    const bool is_small = magnitude < Float::smallest_normal;
    const float multiple = is_small ? magnitude * per_quantum : 0.0f;
    const auto small = static_cast<std::uint32_t>(integer_near<is_stochastic>(multiple, noise));
    return sign | (is_small ? small : normal);
}

ZCORE_EACH float value_of_byte(std::uint32_t code) { return static_cast<float>(static_cast<std::int8_t>(code)); }

ZCORE_EACH float value_of_half(std::uint32_t code) {
    return static_cast<float>(static_cast<std::int32_t>(code ^ 8u) - 8);
}

template <typename Float>
ZCORE_EACH float value_of_float(std::uint32_t code) {
    const std::uint32_t magnitude = code & 0x7fu;
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * Float::quantum;
    std::uint32_t bits = (magnitude << Float::dropped) + Float::rebias;
    bits = magnitude < Float::first_normal ? bits_of_float(small) : bits;
    bits |= magnitude >= Float::special ? 0x7f800000u : 0u;
    return float_of_bits(bits | (code & 0x80u) << 24);
}

}  // namespace zcore::ZCORE_ISA
