// Sums down the columns of a matrix whose rows are shared among threads: the gradients of weights and biases.
//
// Rows are cut into at most 64 parts by their number alone. Each part sums its rows in order into a row of fp32 of its
// own; these are then added in order, in double. So no sum depends on threads, and none has more than 1/64 of the rows
// in one fp32 accumulator. The parts take 256 bytes a column.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cpu/pieces.hpp"
#include "zcore/flat.hpp"

namespace zcore {

// How many rows to hand to a thread at once: about as many elements as piece_grain.
inline std::size_t row_grain(std::size_t hidden) { return std::max<std::size_t>(1, piece_grain / std::max<std::size_t>(1, hidden)); }

class ColumnSums {
public:
    ColumnSums(std::size_t rows, std::size_t hidden)
        : hidden_(hidden), grain_(std::max(row_grain(hidden), (rows + 63) / 64)),
          parts_((rows + grain_ - 1) / grain_ * hidden) {}

    std::size_t grain() const { return grain_; }
    // The sums of the part that begins at row `begin`, zero at first.
    float* part(std::size_t begin) { return parts_.data() + begin / grain_ * hidden_; }
    // Writes the sums of all parts; nothing where `out` is none.
    void write(Flat out, int threads) const;

private:
    std::size_t hidden_, grain_;
    std::vector<float> parts_;
};

}  // namespace zcore
