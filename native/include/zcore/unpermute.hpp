// unpermute: of each token the weighted sum of its k rows, which permute.hpp has sorted by expert.
//
//     out[t] = sum over j of weights[t, j] rows[places[t, j]]        in the order of j, in fp32, rounded at the end
//
// Backward, each row belonging to one choice:
//
//     drows[places[t, j]] = weights[t, j] dout[t]
//     dweights[t, j] = sum over hidden of dout[t] rows[places[t, j]]
//
// With k = 2 in fp32 it moves 12 bytes an element of out; backward 20.
#pragma once

#include <cstddef>
#include <cstdint>

#include "zcore/flat.hpp"

namespace zcore {

struct Unpermute {
    Flat rows;                   // [tokens * k, hidden]
    const std::int64_t* places;  // [tokens, k], each row once: the caller sees to that
    Flat weights;                // [tokens, k], or none: as if all were 1
    Flat out;                    // [tokens, hidden], written
    std::size_t tokens;
    std::size_t hidden;
    std::size_t k;
};

struct UnpermuteBackward {
    Flat dout;                   // [tokens, hidden]
    Flat rows;                   // [tokens * k, hidden]; read for dweights alone
    const std::int64_t* places;  // [tokens, k]
    Flat weights;                // [tokens, k], or none
    Flat drows;                  // [tokens * k, hidden], written
    Flat dweights;               // [tokens, k], written, or none
    std::size_t tokens;
    std::size_t hidden;
    std::size_t k;
};

void unpermute(const Unpermute& op, int threads);
void unpermute_backward(const UnpermuteBackward& op, int threads);

}  // namespace zcore
