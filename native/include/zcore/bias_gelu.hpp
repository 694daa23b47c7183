// out = gelu(x + bias), in either form of GELU.    [arXiv 1606.08415, sec. 2]
//
// backward: dx = dout gelu'(x + bias), dbias = sum over rows of dx, in an order that does not depend on threads.
//
// In fp32 forward moves 8 bytes an element (reads x, writes out), backward 12; the sum x + bias is never written. It
// computes in fp32 whatever the types are.
#pragma once

#include <cstddef>

#include "zcore/flat.hpp"
#include "zcore/gelu.hpp"

namespace zcore {

struct BiasGelu {
    Flat x;     // [rows, hidden]
    Flat bias;  // [hidden], or none
    Flat out;   // [rows, hidden], written
    std::size_t rows;
    std::size_t hidden;
};

void bias_gelu(const BiasGelu& op, Gelu form, int threads);

struct BiasGeluBackward {
    Flat dout;   // [rows, hidden]
    Flat x;      // [rows, hidden]
    Flat bias;   // [hidden], or none
    Flat dx;     // [rows, hidden], written
    Flat dbias;  // [hidden], written; or none
    std::size_t rows;
    std::size_t hidden;
};

void bias_gelu_backward(const BiasGeluBackward& op, Gelu form, int threads);

}  // namespace zcore
