#include "cpu/dynamic_code.hpp"

#include <bit>
#include <limits>

namespace zcore {

namespace {

constexpr int advance(const DynamicCode& code, int at, float value) {
    while (value > code.bounds[at]) {
        ++at;
    }
    return at;
}

constexpr int decades = 7;

constexpr DynamicLines make_lines(const DynamicCode& code, bool is_signed) {
    DynamicLines lines{};
    lines.is_signed = is_signed;
    lines.place_of_first = is_signed ? -127.5f : 1.5f;
    const int zero = is_signed ? code_count / 2 - 1 : 0, first_count = is_signed ? 1 : 2;
    const auto set_inverse = [&](int exponent, double less, double divisor) {
        const int at = (exponent + 7) % 8;
        lines.less[at] = static_cast<float>(-less);
        lines.inverse[at] = static_cast<float>(1.0 / divisor);
        lines.inverse_rest[at] = static_cast<float>(1.0 / divisor - static_cast<double>(lines.inverse[at]));
    };
    constexpr double one = 1 << DynamicLines::fraction_bits, shift = one / 2.0 + 2.0;
    const auto set_line = [&](int decade, double slope, double start, double last) {
        lines.slope[decade] = static_cast<float>(slope * one);
        lines.start[decade] = static_cast<float>(start * one + shift);
        lines.last[decade] = static_cast<float>(last * one + shift);
    };
    double shrink = 1e6;
    int last = 0, exponent = is_signed ? 0 : 1;
    for (int decade = 0; decade < decades; ++decade, ++exponent, shrink /= 10.0) {
        const int count = first_count << decade;
        set_inverse(exponent, 16.0 * count, 20.0 * count * shrink);
        set_line(decade, shrink * count / 0.9, last + 0.5 - count / 9.0, last + count);
        last += count;
        lines.end[decade] = code.bounds[zero + last];
    }
    set_line(decades, 0.0, last + 1, last + 1);
    lines.end[decades] = std::numeric_limits<float>::infinity();
    if (is_signed) {
        set_inverse(exponent, 16.0 * 128.0, 18.0 * 128.5 - 16.0 * 128.0);
        // Below 0 the first decade has no value, and ends before that above 0 does. What lies between is in doubt: its
        // line stops at a half.
        constexpr double zero_end = 0.275e-6, end_below_zero = 1.6e-6, slope = 1.0 / (end_below_zero - zero_end);
        set_line(0, slope, 0.5 - zero_end * slope, 1.5);
    } else {
        set_inverse(exponent, 18.0 * 1.5, 18.0 * (256.5 - 1.5));  // shared by codes 0, where it gives 0, and 255
    }
    lines.smallest = 0x1p-25f;
    for (std::uint32_t cell = 0; cell < 16; ++cell) {
        const float lowest = std::bit_cast<float>((cell + 0x30u) << 24);
        while (lines.end[lines.first_decade[cell]] < lowest) {
            ++lines.first_decade[cell];
        }
    }
    return lines;
}

// Each value is a quotient of whole numbers, rounded once: the same wherever it is computed.
constexpr DynamicCode make(bool is_signed) {
    DynamicCode code{};
    int above = is_signed ? code_count / 2 - 1 : 0;  // the place of zero
    code.values[above++] = 0.0f;
    double shrink = 1e6;  // 10^6 in the last decade, 1 in the first
    for (int decade = 0; decade < decades; ++decade, shrink /= 10.0) {
        const int count = 1 << (is_signed ? decade : decade + 1);
        for (int each = 0; each < count; ++each) {  // the middle of each of `count` equal parts of [0.1, 1]
            const double value = (2 * count + 9 * (2 * each + 1)) / (20.0 * count * shrink);
            if (is_signed) {
                code.values[code_count - 1 - above] = static_cast<float>(-value);  // the first, on zero, is undone
            }
            code.values[above++] = static_cast<float>(value);
        }
    }
    code.values[above] = 1.0f;
    if (is_signed) {
        code.values[0] = -1.0f;
        code.values[code_count / 2 - 1] = 0.0f;
    }
    for (int each = 0; each < code_count - 1; ++each) {
        const double sum = static_cast<double>(code.values[each]) + static_cast<double>(code.values[each + 1]);
        code.bounds[each] = static_cast<float>(sum / 2.0);
    }
    if (!is_signed) {
        code.bounds[0] = 0.0f;  // what is above 0 stays so
    }
    code.bounds[code_count - 1] = std::numeric_limits<float>::infinity();
    constexpr std::uint32_t sign = 0x8000, end = 0x7f80;  // of finite values
    int at = 0;
    for (std::uint32_t upper = sign + end - 1; upper >= sign; --upper) {  // from the lowest value to the highest
        at = advance(code, at, std::bit_cast<float>(upper << 16 | 0xffffu));
        code.lowest[upper] = static_cast<std::uint8_t>(at);
    }
    for (std::uint32_t upper = 0; upper < end; ++upper) {
        at = advance(code, at, std::bit_cast<float>(upper << 16));
        code.lowest[upper] = static_cast<std::uint8_t>(at);
    }
    code.lines = make_lines(code, is_signed);
    return code;
}

}  // namespace

constexpr DynamicCode signed_dynamic_code = make(true), unsigned_dynamic_code = make(false);

}  // namespace zcore
