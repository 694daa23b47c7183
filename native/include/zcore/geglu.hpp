// GeGLU: out = gelu(gate) up, in either form of GELU.    [arXiv 2002.05202, eq. 5, without its matrices]
//
// backward:
//     dup   = dout gelu(gate)
//     dgate = dout up gelu'(gate)
//
// It moves the bytes of swiglu.hpp, stores nothing, and computes in fp32 whatever the types are.
#pragma once

#include "zcore/gelu.hpp"
#include "zcore/glu.hpp"

namespace zcore {

void geglu(const Glu& glu, Gelu form, int threads);
void geglu_backward(const GluBackward& glu, Gelu form, int threads);

}  // namespace zcore
