// Memory for quantised blocks, and the value of each code in double, straight from the definitions of the formats.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "zcore/flat.hpp"
#include "zcore/quantized.hpp"

namespace quantized_blocks {

using zcore::Format;

constexpr Format formats[] = {Format::int8, Format::int4, Format::e4m3, Format::e5m2};

inline bool is_integer(Format format) { return format == Format::int8 || format == Format::int4; }

// Codes that lie `shift` bytes past an aligned address.
struct Blocks {
    zcore::QuantizedLayout layout;
    std::size_t shift;
    std::vector<std::uint8_t> codes;
    std::vector<float> scales;
    std::vector<std::int8_t> zero_points;

    Blocks(zcore::QuantizedLayout of, bool is_symmetric, std::size_t shifted = 0)
        : layout(of),
          shift(shifted),
          codes(shifted + (of.format == Format::int4 ? (of.numel + 1) / 2 : of.numel), 0xee),
          scales(of.num_blocks(), -1.0f),
          zero_points(is_symmetric ? 0 : of.num_blocks(), 99) {}

    zcore::Quantized view() {
        return {codes.data() + shift, scales.data(), zero_points.empty() ? nullptr : zero_points.data()};
    }

    bool operator==(const Blocks& other) const {  // bit for bit: a NaN equals itself
        return codes == other.codes && zero_points == other.zero_points && scales.size() == other.scales.size() &&
               (scales.empty() || std::memcmp(scales.data(), other.scales.data(), scales.size() * sizeof(float)) == 0);
    }

    int code(std::size_t at) const {
        if (layout.format != Format::int4) {
            return codes[shift + at];
        }
        return at % 2 == 0 ? codes[shift + at / 2] & 15 : codes[shift + at / 2] >> 4;
    }
};

inline double value_of(Format format, int code) {
    if (format == Format::int8) {
        return code < 128 ? code : code - 256;
    }
    if (format == Format::int4) {
        return code < 8 ? code : code - 16;
    }
    const int mantissa = format == Format::e4m3 ? 3 : 2, bias = format == Format::e4m3 ? 7 : 15;
    const int magnitude = code & 127, exponent = magnitude >> mantissa, fraction = magnitude & ((1 << mantissa) - 1);
    const double sign = code < 128 ? 1.0 : -1.0;
    if (format == Format::e4m3 && magnitude == 127) {
        return std::numeric_limits<double>::quiet_NaN();
    }
    if (format == Format::e5m2 && exponent == 31) {
        return fraction == 0 ? sign * std::numeric_limits<double>::infinity() : std::numeric_limits<double>::quiet_NaN();
    }
    if (exponent == 0) {
        return sign * std::ldexp(fraction, 1 - bias - mantissa);
    }
    return sign * std::ldexp((1 << mantissa) + fraction, exponent - bias - mantissa);
}

inline int num_codes(Format format) { return format == Format::int4 ? 16 : 256; }

// Numbers of magnitudes from about 2^-12 to 2^6, shifted off zero where `mean` says so.
inline std::vector<float> random_values(std::size_t numel, unsigned seed, float mean = 0.0f) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::uniform_int_distribution<int> exponent(-12, 6);
    std::vector<float> values(numel);
    for (float& each : values) {
        each = mean + std::ldexp(normal(random), exponent(random));
    }
    return values;
}

}  // namespace quantized_blocks
