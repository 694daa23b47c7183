// out = residual + dropout(x + bias), and its backward.
//
// Element e is kept where a random word w(seed, e) is at or above `drop` 2^32; what is kept is multiplied by
// 1 / (1 - drop), the rest by 0, so that NaN and Inf stay as in torch. The words are Philox4x32-10's
// [Salmon et al., SC 2011, doi 10.1145/2063384.2063405], a function of a key and a counter: the mask depends on the seed
// and the element's index alone, and the backward computes it again. Of the elements of a block of 256, element i has word
// i / 64 of counter 64 block + i % 64, so that the words of 64 counters are stored in order.
//
// In fp32 forward moves 12 bytes an element (reads x and residual, writes out), backward 8 (reads dout, writes dx); the
// gradient of the residual is dout itself.
#pragma once

#include <cstddef>
#include <cstdint>

#include "zcore/flat.hpp"

namespace zcore {

struct BiasDropoutResidual {
    Flat x;         // [rows, hidden]
    Flat bias;      // [hidden], or none
    Flat residual;  // [rows, hidden]
    Flat out;       // [rows, hidden], written
    std::size_t rows;
    std::size_t hidden;
    double drop;  // from 0 to 1
    std::uint64_t seed;
};

void bias_dropout_residual(const BiasDropoutResidual& op, int threads);

struct BiasDropoutResidualBackward {
    Flat dout;   // [rows, hidden]
    Flat dx;     // [rows, hidden], written
    Flat dbias;  // [hidden], written; or none
    std::size_t rows;
    std::size_t hidden;
    double drop;
    std::uint64_t seed;
};

void bias_dropout_residual_backward(const BiasDropoutResidualBackward& op, int threads);

}  // namespace zcore
