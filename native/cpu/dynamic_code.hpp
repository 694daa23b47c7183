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

// A value is coded without a search, whose branches nobody foresees: its upper 16 bits tell the code of the lowest value
// that begins so, and as no two bounds begin alike, what is left is one comparison.
struct DynamicCode {
    float values[code_count];      // ascending
    float bounds[code_count];      // code n stands for what is above bounds[n - 1] and not above bounds[n]
    std::uint8_t lowest[1 << 16];  // code of the lowest value with these upper bits
};

extern const DynamicCode signed_dynamic_code, unsigned_dynamic_code;

}  // namespace zcore
