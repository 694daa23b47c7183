// The sum or mean of quantised shards of one layout, quantised again, in one pass: what a rank does between the two
// exchanges of a quantised reduce-scatter.    [ZeRO++, arXiv 2306.10209, section 3.3]
//
//     x   = factor (x_0 + x_1 + ... + x_(k-1))       in fp32, added in this order; factor: 1, or 1/k for the mean
//     out = quantize_blockwise(x)
//
// It moves k + 1 bytes an element of int8 and fp8, half of that of int4; in three passes over fp32 it would be 9 k + 5.
// `out` may be one of the shards.
#pragma once

#include <span>

#include "zcore/quantized.hpp"

namespace zcore {

void dequantize_reduce_requantize(std::span<const Quantized> shards, float factor, const Quantized& out,
                                  const QuantizedLayout& layout, const Rounding& rounding, int threads);

}  // namespace zcore
