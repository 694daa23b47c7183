// fp32 to bf16, up as often as the number lies near the upper neighbour: right on average, where rounding to the nearest
// loses whatever is smaller than 1/512 of a weight, every time.    [arXiv 1502.02551, section 3; arXiv 2010.06192]
//
//     bits  = the 32 of x + (16 bits of noise)       of the magnitude; a carry out of the low half rounds it up
//     out   = the upper half of bits                 NaN stays NaN; infinities and what bf16 holds stay as they are
//
// The probabilities are exact, since noise has as many bits as are dropped. What lies between the largest bf16 number
// and where the next one would be becomes either it or infinity. It moves 6 bytes an element: bound by memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zcore {

// Noise depends on `seed` and on the element's place alone; offset: the place of the first one.
void round_stochastic(const float* values, std::uint16_t* out, std::size_t numel, std::uint64_t seed,
                      std::uint64_t offset, int threads);

}  // namespace zcore
