// The kernels of steps, run on the host: what cuda/step_kernel.cuh does, chunk by chunk, tile by tile, lane by lane, over
// the same functions. What it cannot show is the launch itself and how threads add sums.
#pragma once

#include <cstddef>
#include <span>

#include "zcore/adagrad_step.hpp"
#include "zcore/adamw_step.hpp"
#include "zcore/lamb_step.hpp"
#include "zcore/lion_step.hpp"
#include "zcore/sgd_step.hpp"
#include "zcore/squared_norm.hpp"

namespace zcore::emulated {

void adamw_step(std::span<const AdamWPiece> pieces, const AdamW& hyper, const float* grad_factor);
void adagrad_step(std::span<const AdagradPiece> pieces, const Adagrad& hyper, const float* grad_factor);
void lion_step(std::span<const LionPiece> pieces, const Lion& hyper, const float* grad_factor);
void sgd_step(std::span<const SgdPiece> pieces, const Sgd& hyper, const float* grad_factor);
void sgd_step_without_momentum(std::span<const SgdPiece> pieces, const Sgd& hyper, const float* grad_factor);
void lamb_average(std::span<const LambPiece> pieces, const Lamb& hyper, const float* grad_factor, LambSquares* squares);
void lamb_apply(std::span<const LambPiece> pieces, const double* ratios, const Lamb& hyper);
double squared_norm(const NormPiece& piece);

std::size_t adamw_capacity();  // pieces of a launch

// The code of a value from -1 to 1, how far the first guess of it is off, and a code's value.
int code_of(float relative, bool is_signed);
int guess_off_by(float relative, bool is_signed);
float value_of(int code, bool is_signed);
float bound_of(int code, bool is_signed);

}  // namespace zcore::emulated
