// The sum of squares of flat memory of an NVIDIA GPU, and with it whether all elements are finite; see
// zcore/squared_norm.hpp. Squares are summed in double, in an order that only their number decides.
#pragma once

#include <cstddef>

#include "zcore/cuda/stream.hpp"
#include "zcore/squared_norm.hpp"

namespace zcore::cuda {

// How many doubles of scratch `numel` elements want.
std::size_t num_partial_sums(std::size_t numel);

// total: one number on the device. scratch: there, too; it may be used again once the stream has come so far.
void squared_norm(const NormPiece& piece, double* scratch, float* total, Stream stream);

}  // namespace zcore::cuda
