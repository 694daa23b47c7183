// Reads quantised blocks back: x = scale (code - zero_point), in fp32, rounded to the nearest where `out` holds less.
//
// To fp32 it moves 5 bytes an element from int8 and fp8, 4.5 from int4: bound by memory. Blocks whose scale is NaN read
// as NaN. Of an absmax within 2^-23 of the largest fp32 number, the product may round to infinity.
#pragma once

#include "zcore/flat.hpp"
#include "zcore/quantized.hpp"

namespace zcore {

void dequantize_blockwise(const Quantized& from, const QuantizedLayout& layout, Flat out, int threads);

}  // namespace zcore
