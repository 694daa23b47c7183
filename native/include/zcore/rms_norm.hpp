// Root mean square normalisation of rows, alone or after a residual is added.    [arXiv 1910.07467, eq. 4]
//
//     s  = x + residual                                or x, where there is no residual; rounded to the type of `sum`
//     r  = 1 / sqrt(mean(s^2) + eps)
//     y  = s r (weight + offset)                       offset 1 is Gemma's; no weight counts as ones
//
// backward, with u = dy (weight + offset):
//     ds = r u - s r^3 mean(u s) + dsum                dsum: the gradient that reaches `sum` by other ways
//     dweight = sum over rows of dy s r
//
// It stores nothing for the backward but s: r is found again while u s is summed, in the same pass over the row.
// In fp32 forward moves 8 bytes an element (reads x, writes y), with a residual 16, backward 12, with dsum 16; a row is
// read a second time from the cache. It computes in fp32 whatever the types are.
#pragma once

#include "zcore/flat.hpp"

namespace zcore {

struct RmsNorm {
    Flat x;         // [rows, hidden]
    Flat residual;  // [rows, hidden], or none
    Flat weight;    // [hidden], or none
    Flat sum;       // [rows, hidden], written; none where there is no residual
    Flat y;         // [rows, hidden], written
    std::size_t rows;
    std::size_t hidden;
    float eps;
    float offset = 0.0f;
};

void rms_norm(const RmsNorm& norm, int threads);

struct RmsNormBackward {
    Flat dy;       // [rows, hidden]
    Flat s;        // [rows, hidden]
    Flat weight;   // [hidden], or none
    Flat dsum;     // [rows, hidden], or none
    Flat ds;       // [rows, hidden], written
    Flat dweight;  // [hidden], written; or none
    std::size_t rows;
    std::size_t hidden;
    float eps;
    float offset = 0.0f;
};

void rms_norm_backward(const RmsNormBackward& norm, int threads);

}  // namespace zcore
