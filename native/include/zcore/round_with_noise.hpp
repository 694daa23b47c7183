// fp32 to bf16 as round_stochastic.hpp has it, with noise that the caller has drawn: for runs that are to keep the bits they
// had with another generator.    [arXiv 1502.02551, section 3]
//
//     bits  = the 32 of x + noise                      noise in [0, 2^16); NaN stays NaN
//     out   = the upper half of bits
//
// It moves 10 bytes an element (reads x and noise, writes out): bound by memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zcore {

void round_with_noise(const float* values, const std::int32_t* noise, std::uint16_t* out, std::size_t numel,
                      int threads);

}  // namespace zcore
