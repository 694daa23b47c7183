// Quantises flat memory block by block, in one pass: the scale of a block is found and used while it lies in the cache.
//
//     symmetric      scale = max |x| / largest               largest: 127, 7, 448 (e4m3), 57344 (e5m2)
//                    code  = round(clamp(x (1 / scale), -largest, largest))
//     asymmetric     scale = (high - low) / (2^bits - 1)     high = max(x, 0), low = min(x, 0): zero stays zero
//     (int8, int4)   zero_point = round(-2^(bits - 1) - low (1 / scale))
//                    code  = round(x (1 / scale)) + zero_point, clamped to [-2^(bits - 1), 2^(bits - 1) - 1]
//     round          to the nearest, ties to even; or, stochastic, 16 bits of noise are added after the point, and the
//                    rest is dropped: a chance is off by at most 2^-16
//
// A scale is at least 2^-126, so that 1 / scale is finite. In fp32 it moves 5 bytes an element to int8 and fp8, 4.5 to
// int4: bound by memory. Blocks of their own scale keep an outlier from costing its neighbours' precision (arXiv
// 2110.02861, section 2); stochastic rounding keeps sums of many quantised values unbiased.
#pragma once

#include "zcore/flat.hpp"
#include "zcore/quantized.hpp"

namespace zcore {

void quantize_blockwise(Flat values, const Quantized& out, const QuantizedLayout& layout, const Rounding& rounding,
                        int threads);

}  // namespace zcore
