// permute: a copy of each token's row for each of its k experts, sorted by expert.
//
//     x          a b c                  tokens 0 1 2
//     experts    1,0  0,2  1,0          of each token, k = 2
//     rows       a b c | a c | b        of expert 0, 1 and 2; those of one expert in the order of tokens
//     counts     3       2     1
//     places     3,0  1,5  4,2          of each choice its row
//
// It reads x once from memory, and writes k times as much. Its backward is unpermute (unpermute.hpp) without weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "zcore/flat.hpp"

namespace zcore {

struct Permute {
    Flat x;                       // [tokens, hidden], fp32, bf16 or fp16
    const std::int64_t* experts;  // [tokens, k], each from 0 to num_experts - 1: the caller sees to that
    Flat rows;                    // [tokens * k, hidden] of x's type, written
    std::int64_t* counts;         // [num_experts], written
    std::int64_t* places;         // [tokens, k], written
    std::size_t tokens;
    std::size_t hidden;
    std::size_t k;
    std::size_t num_experts;
};

void permute(const Permute& op, int threads);

// Whether each of 0 to count - 1 is there once.
bool is_permutation(const std::int64_t* places, std::size_t count);

}  // namespace zcore
