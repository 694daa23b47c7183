// One byte for an element of an optimizer's state, and one fp32 scale for a block: the block-wise dynamic code of
// arXiv 2110.02861, secs. 1.3 and 2.
//
//     x = values[code] * scale                         scale = the largest |x| of the block
//
//     values    |x| / scale                     signed, for a first moment    unsigned, for a second
//     1         1                               2: -1 as well                 1
//     top       (0.1, 1)                        64 each of + and -            128
//     next      (0.01, 0.1)                     32                            64
//     ...       seven decades, halved each time
//     0         0                               1                             1
//
// Linear code of a byte would lose what is 1/256 of the largest in its block; the squares of second moments span many
// decades, and in the paper linear code made training diverge. A second moment in [0, 1) has no sign to spend a bit on.
// Unlike there, what is above 0 never becomes 0 unsigned: a step divided by its root would explode (arXiv 2309.01507,
// sec. 4.1), where the smallest value only makes it shorter. And -1 has the place of the smallest value below 0, 5.5e-7:
// without it the largest of a block, if negative, would shrink by 0.7% whenever it is written.
//
// Blocks are of 256 elements where the paper has 2048: a scale for 256 costs 1.6% of the codes, an outlier spoils fewer
// elements, and a block is what a step keeps in the nearest cache. One NaN or infinity makes its block NaN.
#pragma once

#include <cstdint>

namespace zcore {

constexpr std::int32_t code_count = 256;

// The same code as straight lines, one for each decade and one for 1, which dynamic_lanes.hpp follows.
struct DynamicLines {
    // A code is found as a number with 13 bits after the point. Errors of fp32 come to a fourth of the lowest of them;
    // where but these two are left of the bits after a half, the code is in doubt.
    static constexpr std::int32_t fraction_bits = 13, doubt = 0x1ffc;

    // Of a code, by the lowest three bits of the exponent of `f`: of 2^1, 2^2, ... 2^8, and 2^0 as 2^8.
    alignas(32) float less[8];          // 16 2^e, negative
    alignas(32) float inverse[8];       // 1 / D
    alignas(32) float inverse_rest[8];  // of which `inverse` is the nearest fp32
    // Of a value, by its decade.
    alignas(32) float slope[8];  // times 2^13, as the next two, which are half a code and the doubt's half more
    alignas(32) float start[8];
    alignas(32) float last[8];  // the last code of the decade, whose line may go on to the next
    alignas(32) float end[8];   // the largest value of the decade
    alignas(16) std::uint8_t first_decade[16];  // by bits 24 to 27 of the value: of the lowest value that has them
    float smallest;        // all below it has one code
    float place_of_first;  // `f` of code 0; signed: the difference of code 0 and the middle of all
    bool is_signed;
};

// A value is coded without a search, whose branches nobody foresees: its upper 16 bits tell the code of the lowest value
// that begins so, and as no two bounds begin alike, what is left is one comparison.
struct DynamicCode {
    float values[code_count];      // ascending
    float bounds[code_count];      // code n stands for what is above bounds[n - 1] and not above bounds[n]
    std::uint8_t lowest[1 << 16];  // code of the lowest value with these upper bits
    DynamicLines lines;
};

extern const DynamicCode signed_dynamic_code, unsigned_dynamic_code;

}  // namespace zcore
