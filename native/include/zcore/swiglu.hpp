// SwiGLU: out = silu(gate) up, silu(g) = g / (1 + exp(-g)).    [arXiv 2002.05202, eq. 5, without its matrices]
//
// backward, with p = 1 / (1 + exp(-g)):
//     dup   = dout g p
//     dgate = dout up p (1 + g (1 - p))
//
// In fp32 forward moves 12 bytes an element (reads gate and up, writes out), backward 20: bound by memory. It stores
// nothing: p is computed again. It computes in fp32 whatever the types are.
#pragma once

#include "zcore/glu.hpp"

namespace zcore {

void swiglu(const Glu& glu, int threads);
void swiglu_backward(const GluBackward& glu, int threads);

}  // namespace zcore
