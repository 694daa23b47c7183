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

// Each value is a quotient of whole numbers, rounded once: the same wherever it is computed.
constexpr DynamicCode make(bool is_signed) {
    DynamicCode code{};
    constexpr int decades = 7;
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
    return code;
}

}  // namespace

constexpr DynamicCode signed_dynamic_code = make(true), unsigned_dynamic_code = make(false);

}  // namespace zcore
