// The steps of optimizers on an NVIDIA GPU, over flat pieces in its memory, of any number, size and alignment.
// Formulas, types and pieces are the CPU's, and an element has the same bits.
//
// grad_factor: an fp32 number on the device, by which gradients are multiplied besides the factor of the
// hyper-parameters; none where it is null. So a clip factor need not come to the host.
#pragma once

#include <cstddef>
#include <span>

#include "zcore/adagrad_step.hpp"
#include "zcore/adamw_step.hpp"
#include "zcore/cuda/stream.hpp"
#include "zcore/lamb_step.hpp"
#include "zcore/lion_step.hpp"
#include "zcore/sgd_step.hpp"

namespace zcore::cuda {

void adamw_step(std::span<const AdamWPiece> pieces, const AdamW& hyper, const float* grad_factor, Stream stream);
void adagrad_step(std::span<const AdagradPiece> pieces, const Adagrad& hyper, const float* grad_factor, Stream stream);
void lion_step(std::span<const LionPiece> pieces, const Lion& hyper, const float* grad_factor, Stream stream);
void sgd_step(std::span<const SgdPiece> pieces, const Sgd& hyper, const float* grad_factor, Stream stream);

// squares: two doubles for each piece, of the parameter and of its update. scratch: twice what num_partial_sums says of
// each piece (squared_norm.hpp).
void lamb_average(std::span<const LambPiece> pieces, const Lamb& hyper, const float* grad_factor, double* scratch,
                  double* squares, Stream stream);

// ratios: one for each piece.
void lamb_apply(std::span<const LambPiece> pieces, const double* ratios, const Lamb& hyper, Stream stream);

}  // namespace zcore::cuda
