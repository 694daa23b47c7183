// One bit an element, and the mean magnitude of a block, by the formulas of pack_signs.hpp.
#pragma once

#include <cstddef>

#include "elements/floats.hpp"

namespace zcore::ZCORE_ISA {

// A block is summed in so many partial sums, element i in that of i % 16, and these by halves: one order for all.
constexpr std::size_t sign_lanes = 16;

ZCORE_EACH double magnitude_of(float value) {
    return static_cast<double>(float_of_bits(bits_of_float(value) & 0x7fffffffu));
}

// The sum of a block is this at most where all of it is finite: it has 2^14 numbers of fp32 or fewer.
constexpr double largest_sum = 0x1p200;

// NaN where the sum is not finite.
ZCORE_EACH float mean_magnitude(double sum, std::size_t count) {
    return sum <= largest_sum ? static_cast<float>(sum / static_cast<double>(count)) : float_of_bits(0x7fc00000u);
}

// What a sign and a scale stand for; bit 31 of `signed_bits` is the sign, and no other is looked at.
ZCORE_EACH float with_sign(float scale, std::uint32_t signed_bits) {
    return float_of_bits(bits_of_float(scale) | (signed_bits & 0x80000000u));
}

// What is lost of `sum`.
ZCORE_EACH float error_left(float sum, float scale) { return sum - with_sign(scale, bits_of_float(sum)); }

}  // namespace zcore::ZCORE_ISA
