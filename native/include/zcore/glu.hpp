// The operands of gated linear units: rows of a gate and of what passes it, in two tensors or in two halves of one.
#pragma once

#include <cstddef>

#include "zcore/flat.hpp"

namespace zcore {

// `hidden` columns of a matrix, from column `shift` on, whose rows lie `stride` elements apart.
struct Columns {
    Flat flat;
    std::size_t stride;
    std::size_t shift = 0;
};

struct Glu {
    Columns gate;
    Columns up;
    Columns out;  // written
    std::size_t rows;
    std::size_t hidden;
};

struct GluBackward {
    Columns dout;
    Columns gate;
    Columns up;
    Columns dgate;  // written
    Columns dup;    // written
    std::size_t rows;
    std::size_t hidden;
};

}  // namespace zcore
