// exp, tanh and erf of fp32 without branches or calls, so that the compiler can make vectors of a loop of them, which it
// cannot of libm's without -ffast-math. For code that is compiled once for each instruction set, as blocks.hpp.
//
// Each is within 2 units in the last place of the true value for every fp32 number (tests/functions_test.cpp walks over
// them), and has NaN, infinities, underflow and overflow as libm has them.
#pragma once

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

static inline float magnitude_of(float value) { return float_of_bits(bits_of_float(value) & 0x7fffffffu); }

static inline float with_sign_of(float magnitude, float sign) {
    return float_of_bits(bits_of_float(magnitude) | (bits_of_float(sign) & 0x80000000u));
}

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

// Near zero an odd polynomial (Cephes, tanhf.c); elsewhere 1 - 2 / (exp(2 |x|) + 1), which loses no digits there.
static inline float tanh_of(float x) {
    const float size = magnitude_of(x), square = x * x;
    float r = -5.70498872745e-3f;
    r = r * square + 2.06390887954e-2f;
    r = r * square - 5.37397155531e-2f;
    r = r * square + 1.33314422036e-1f;
    r = r * square - 3.33332819422e-1f;
    const float near = r * square * x + x;
    const float bounded = size > 20.0f ? 20.0f : size;  // beyond: 1
    const float far = with_sign_of(1.0f - 2.0f / (exp_between(2.0f * bounded) + 1.0f), x);
    return size >= 0.625f ? far : near;  // NaN is near
}

// Near zero an odd polynomial; elsewhere 1 - exp(q(|x|)) with a polynomial q, whose error the exponential shrinks.
static inline float erf_of(float x) {
    const float size = magnitude_of(x), square = x * x;
    float q = -1.72853470e-5f * size + 3.83197126e-4f;
    q = q * square + (-3.88396438e-3f * size + 2.42546219e-2f);
    q = q * size - 1.06777877e-1f;
    q = q * size - 6.34846687e-1f;
    q = q * size - 1.28717512e-1f;
    q = q * size - size;
    const float bounded = q < -20.0f ? -20.0f : q;  // beyond: 1
    const float far = with_sign_of(1.0f - exp_between(bounded), x);
    float r = -5.96761703e-4f;
    r = r * square + 4.99119423e-3f;
    r = r * square - 2.67681349e-2f;
    r = r * square + 1.12819925e-1f;
    r = r * square - 3.76125336e-1f;
    r = r * square + 1.28379166e-1f;
    const float near = r * x + x;
    return size > 0.927734375f ? far : near;  // NaN is near
}

}  // namespace zcore::ZCORE_ISA
