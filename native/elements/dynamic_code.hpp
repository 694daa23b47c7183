// The block-wise dynamic code of cpu/dynamic_code.hpp for one element, without its table of 65,536: values and bounds are
// computed, in the same double arithmetic, and a code is guessed and then found between its bounds. It has the table's
// codes and values to the bit.
#pragma once

#include <cstdint>

#include "elements/floats.hpp"

namespace zcore::ZCORE_ISA {

constexpr int num_codes = 256, middle_code = num_codes / 2 - 1, num_decades = 7;

// Of code `above` the middle or zero, counted from 1, as a part of the scale; the last is not among them, which is 1.
ZCORE_EACH float dynamic_value_above(int above, bool is_signed) {
    int count = is_signed ? 1 : 2, first = 1;
    double shrink = 1e6;  // 10^6 in the last decade, 1 in the first
    while (above >= first + count) {
        first += count;
        count *= 2;
        shrink /= 10.0;
    }
    const int twice = 2 * (above - first) + 1;
    return static_cast<float>((2 * count + 9 * twice) / (20.0 * count * shrink));
}

ZCORE_EACH float dynamic_value(int code, bool is_signed) {
    const int above = is_signed ? code - middle_code : code;
    if (above == 0) {
        return 0.0f;
    }
    if (code == num_codes - 1) {
        return 1.0f;
    }
    if (code == 0) {
        return -1.0f;  // signed: an unsigned 0 is above == 0
    }
    return above > 0 ? dynamic_value_above(above, is_signed) : -dynamic_value_above(1 - above, is_signed);
}

// Code n stands for what is above bound n - 1 and not above bound n.
ZCORE_EACH float dynamic_bound(int code, bool is_signed) {
    if (code == num_codes - 1) {
        return float_of_bits(0x7f800000u);
    }
    if (code == 0 && !is_signed) {
        return 0.0f;  // what is above 0 stays so
    }
    const double sum = static_cast<double>(dynamic_value(code, is_signed)) +
                       static_cast<double>(dynamic_value(code + 1, is_signed));
    return static_cast<float>(sum / 2.0);
}

// Near the code of `relative`, from -1 to 1: within a decade values are equally spaced.
ZCORE_EACH int guess_dynamic_code(float relative, bool is_signed) {
    const float x = relative < 0.0f ? -relative : relative;
    float power = 1e6f;
    int count = is_signed ? 1 : 2, first = 1;
    const auto enter = [&](float from, float next) {
        const bool is_above = x > from;
        power = is_above ? next : power;
        first = is_above ? first + count : first;
        count = is_above ? count * 2 : count;
    };
    enter(1e-6f, 1e5f);
    enter(1e-5f, 1e4f);
    enter(1e-4f, 1e3f);
    enter(1e-3f, 1e2f);
    enter(1e-2f, 1e1f);
    enter(1e-1f, 1.0f);
    const int within = static_cast<int>((x * power - 0.1f) * (static_cast<float>(count) * (1.0f / 0.9f)));
    const int above = first + (within < 0 ? 0 : within);
    if (!is_signed) {
        return above;
    }
    return relative < 0.0f ? middle_code + 1 - above : middle_code + above;
}

// bounds: of all codes. A guess is one off at most.
ZCORE_EACH std::uint32_t dynamic_code_between(float relative, bool is_signed, const float* bounds) {
    int code = guess_dynamic_code(relative, is_signed);
    code = code < 0 ? 0 : code > num_codes - 1 ? num_codes - 1 : code;
    while (relative > bounds[code]) {
        ++code;
    }
    while (code > 0 && relative <= bounds[code - 1]) {
        --code;
    }
    return static_cast<std::uint32_t>(code);
}

}  // namespace zcore::ZCORE_ISA
