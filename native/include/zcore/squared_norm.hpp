// The sum of squares of flat pieces, for a global norm, and with it whether all elements are finite, in one pass.
//
// Squares of fp32 are summed in double, in a fixed order: the same on any number of threads. The sum is finite exactly
// when every element is, since no square of an fp32 number exceeds what a double holds.
// It reads 4 bytes an element of fp32, 2 of others: bound by memory.
#pragma once

#include <span>

#include "zcore/flat.hpp"

namespace zcore {

struct NormPiece {
    Flat values;
    std::size_t numel;
};

double squared_norm(std::span<const NormPiece> pieces, int threads);

}  // namespace zcore
