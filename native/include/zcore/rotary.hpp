// Rotary position embedding: pairs of a head's elements turned by angles that grow with position.    [arXiv 2104.09864]
//
//     y[a] = x[a] cos[a] - x[b] sin[a]
//     y[b] = x[b] cos[b] + x[a] sin[b]
//
// for pairs (a, b): (i, i + width/2) in halves, as Hugging Face and GPT-NeoX have it, or (2i, 2i + 1) interleaved, as the
// paper and GPT-J. Elements from `width` on pass unchanged. The backward is the transpose,
//
//     dx[a] = dy[a] cos[a] + dy[b] sin[b]
//     dx[b] = dy[b] cos[b] - dy[a] sin[a]
//
// which is the rotation by the negative angle where both of a pair have one angle, as tables normally do, and right for
// any others too. In fp32 it moves 8 bytes an element; a row of the tables serves all heads of a token from the cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "zcore/flat.hpp"

namespace zcore {

struct Rotary {
    Flat x;                       // [tokens, heads, dim]
    Flat y;                       // [tokens, heads, dim], written
    Flat cos;                     // [positions, width]
    Flat sin;                     // [positions, width]
    const std::int64_t* position; // [tokens], each from 0 to positions - 1: the caller sees to that
    std::size_t tokens;
    std::size_t heads;
    std::size_t dim;
    std::size_t width;  // even, at most `dim`
    bool is_interleaved;
    bool is_backward;
};

void rotary(const Rotary& op, int threads);

}  // namespace zcore
