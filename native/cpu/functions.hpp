// exp and what is made of it, of fp32, without branches or calls, so that the compiler can make vectors of a loop of them,
// which it cannot of libm's without -ffast-math. For code that is compiled once for each instruction set, as blocks.hpp.
//
// tests/functions_test.cpp walks over every fp32 number: exp is within 2 units in the last place of the true value, and has
// NaN, infinities, underflow and overflow as libm has them.
#pragma once

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

static inline float magnitude_of(float value) { return float_of_bits(bits_of_float(value) & 0x7fffffffu); }

// x = i ln(2) + f, |f| <= ln(2) / 2, and `power` = exp(f): a minimax polynomial of degree 6 in f, whose error is a tenth
// of a unit. ln(2) is split in two, the larger with so few bits that i times it is exact.
struct Exponential {
    float power;
    std::int32_t i;
};

static inline Exponential exponential_of(float x) {
    const float shifted = 1.44269504f * x + 12582912.0f;  // 1.5 2^23: rounds to an integer
    const float whole = shifted - 12582912.0f;
    const float f = (x - whole * 6.93145752e-1f) - whole * 1.42860677e-6f;
    float r = 1.37805939e-3f;
    r = r * f + 8.37312452e-3f;
    r = r * f + 4.16695364e-2f;
    r = r * f + 1.66664720e-1f;
    r = r * f + 4.99999851e-1f;
    r = r * f + 1.0f;
    r = r * f + 1.0f;
    return {r, static_cast<std::int32_t>(bits_of_float(shifted)) - 0x4b400000};
}

// 2^i is made of two factors, since i itself may be out of a number's range while the result is not.
static inline float exp_of(float x) {
    const float bounded = x < -104.0f ? -104.0f : x > 89.0f ? 89.0f : x;  // beyond: 0 and infinity; NaN passes
    const Exponential found = exponential_of(bounded);
    const std::int32_t half = found.i >> 1;
    const float first = float_of_bits(static_cast<std::uint32_t>(half + 127) << 23);
    const float second = float_of_bits(static_cast<std::uint32_t>(found.i - half + 127) << 23);
    return found.power * first * second;
}

// The same for |x| <= 80, where i can be added to the exponent: half of the work of the ends.
static inline float exp_between(float x) {
    const Exponential found = exponential_of(x);
    return float_of_bits(bits_of_float(found.power) + (static_cast<std::uint32_t>(found.i) << 23));
}

static inline float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(-x)); }

// What the normal distribution has above x >= 0: exp(q(x)) with a polynomial q of degree 8, whose error of at most 8e-9
// of the result's own scale was fitted on [0, 6]. Beyond, q falls faster than the truth, which is below 1e-9 there.
static inline float normal_tail_of(float x) {
    float q = -1.92153698e-6f;
    q = q * x + 2.67708729e-5f;
    q = q * x - 1.26536412e-4f;
    q = q * x - 1.01101257e-4f;
    q = q * x + 4.90433443e-3f;
    q = q * x - 3.63937058e-2f;
    q = q * x - 3.18296582e-1f;
    q = q * x - 7.97885716e-1f;
    q = q * x - 6.93147182e-1f;
    const float bounded = q < -80.0f ? -80.0f : q;
    const float tail = exp_between(bounded);
    return q < -80.0f ? 0.0f : tail;
}

}  // namespace zcore::ZCORE_ISA
