// Compression to one bit with error feedback: the sign of each element and, for each block, the mean magnitude. What was
// lost is added at the next call.    [1-bit Adam, arXiv 2102.02888, alg. 1; 1-bit SGD, Seide et al. 2014]
//
//     y     = x + error
//     sign  = the sign bit of y: 1 is negative      element i in bit i % 8 of byte i / 8; bits past the end are 0
//     scale = mean |y| of the block                 summed in double, in one order whatever the machine
//     error = y - (sign ? -scale : scale)
//
// Two passes over a block that stays in the cache; in fp32 it moves 12 bytes an element (reads x and error, writes
// error), and an eighth: bound by memory. A block with a NaN or an infinity in y has the scale NaN, and its error stays
// as it was: a step that is skipped for it leaves nothing behind.
#pragma once

#include <cstddef>
#include <cstdint>

#include "zcore/flat.hpp"

namespace zcore {

struct SignsLayout {
    std::size_t numel;
    std::size_t block_size;  // a multiple of 8, up to largest_block_size

    std::size_t num_blocks() const { return (numel + block_size - 1) / block_size; }
};

void pack_signs(Flat values, float* error, std::uint8_t* signs, float* scales, const SignsLayout& layout, int threads);

}  // namespace zcore
