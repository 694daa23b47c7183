// Layer normalisation of rows, alone or after a residual is added.    [arXiv 1607.06450, eq. 4]
//
//     s  = x + residual                                or x, where there is no residual; rounded to the type of `sum`
//     n  = (s - mean(s)) r,  r = 1 / sqrt(mean((s - mean(s))^2) + eps)
//     y  = n weight + bias                             no weight counts as ones, no bias as zeros
//
// backward, with u = dy weight:
//     ds = r (u - mean(u) - n mean(u n)) + dsum        dsum: the gradient that reaches `sum` by other ways
//     dweight = sum over rows of dy n,  dbias = sum over rows of dy
//
// The variance is of differences from the mean, in a pass of its own over the row: a mean of squares less a squared mean
// loses all digits where the mean is large. Mean and r are not stored: backward finds them again in passes it makes
// anyway. Bytes moved are those of rms_norm.hpp; the passes after the first read the cache.
#pragma once

#include "zcore/flat.hpp"

namespace zcore {

struct LayerNorm {
    Flat x;         // [rows, hidden]
    Flat residual;  // [rows, hidden], or none
    Flat weight;    // [hidden], or none
    Flat bias;      // [hidden], or none
    Flat sum;       // [rows, hidden], written; none where there is no residual
    Flat y;         // [rows, hidden], written
    std::size_t rows;
    std::size_t hidden;
    float eps;
};

void layer_norm(const LayerNorm& norm, int threads);

struct LayerNormBackward {
    Flat dy;       // [rows, hidden]
    Flat s;        // [rows, hidden]
    Flat weight;   // [hidden], or none
    Flat dsum;     // [rows, hidden], or none
    Flat ds;       // [rows, hidden], written
    Flat dweight;  // [hidden], written; or none
    Flat dbias;    // [hidden], written; or none
    std::size_t rows;
    std::size_t hidden;
    float eps;
};

void layer_norm_backward(const LayerNormBackward& norm, int threads);

}  // namespace zcore
