// Reads what pack_signs made: x = -scale where the bit is set, else scale; NaN where the scale is.
//
// To fp32 it moves 4.1 bytes an element (writes x): bound by memory.    [1-bit Adam, arXiv 2102.02888]
#pragma once

#include "zcore/pack_signs.hpp"

namespace zcore {

void unpack_signs(const std::uint8_t* signs, const float* scales, const SignsLayout& layout, Flat out, int threads);

}  // namespace zcore
