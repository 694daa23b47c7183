// The kernels of steps, run on the host: what cuda/step_kernel.cuh does, chunk by chunk, tile by tile, lane by lane, by
// the same functions. What it cannot show is the launch itself and how threads add sums.
#pragma once

#include <cstddef>

#include "zcore/adagrad_step.hpp"
#include "zcore/adamw_step.hpp"
#include "zcore/lamb_step.hpp"
#include "zcore/lion_step.hpp"
#include "zcore/sgd_step.hpp"
#include "zcore/squared_norm.hpp"

namespace zcore::emulated {

void adamw_step(const AdamWPiece* pieces, std::size_t count, const AdamW& hyper, const float* grad_factor);
void adagrad_step(const AdagradPiece* pieces, std::size_t count, const Adagrad& hyper, const float* grad_factor);
void lion_step(const LionPiece* pieces, std::size_t count, const Lion& hyper, const float* grad_factor);
void sgd_step(const SgdPiece* pieces, std::size_t count, const Sgd& hyper, const float* grad_factor);
void sgd_step_without_momentum(const SgdPiece* pieces, std::size_t count, const Sgd& hyper, const float* grad_factor);
void lamb_average(const LambPiece* pieces, std::size_t count, const Lamb& hyper, const float* grad_factor,
                  LambSquares* squares);
void lamb_apply(const LambPiece* pieces, std::size_t count, const double* ratios, const Lamb& hyper);
double squared_norm(const NormPiece& piece);

std::size_t adamw_capacity();  // pieces of a launch

// The code of a value from -1 to 1, how far the first guess of it is off, and a code's value.
int code_of(float relative, bool is_signed);
int guess_off_by(float relative, bool is_signed);
float value_of(int code, bool is_signed);
float bound_of(int code, bool is_signed);

}  // namespace zcore::emulated
