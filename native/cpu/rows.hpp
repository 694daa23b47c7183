// Rows of a matrix: sums along them, in one order in every instruction set, and the room to write them. For code that
// is compiled once for each instruction set, as blocks.hpp.
//
// A sum has 32 lanes: element i of a block is added to lane i % 32, and the lanes are added by halves at the end. That is
// 2, 4 or 8 registers, enough to hide an addition's latency, and more exact than one running sum.
#pragma once

#include "cpu/blocks.hpp"
#include "cpu/vectors.hpp"

namespace zcore::ZCORE_ISA {

constexpr std::size_t sum_lanes = 32;
constexpr std::size_t sum_vectors = sum_lanes / vector_numel;

class RowSum {
public:
    // Adds `count` terms. `term` gets a function that reads an array at the element in turn, one or a vector of them.
    template <typename Term>
    inline void add(std::size_t count, Term term) {
        const std::size_t whole = count - count % sum_lanes;
        for (std::size_t row = 0; row < whole; row += sum_lanes) {
            for (std::size_t each = 0; each < sum_vectors; ++each) {
                const std::size_t at = row + each * vector_numel;
                parts_[each] += term([at](const float* values) { return vector_at(values + at); });
            }
        }
        if (whole == count) {
            return;
        }
        float rest[sum_lanes];
        std::memcpy(rest, parts_, sizeof rest);
        for (std::size_t at = whole; at < count; ++at) {
            rest[at - whole] += term([at](const float* values) { return values[at]; });
        }
        std::memcpy(parts_, rest, sizeof rest);
    }

    inline float total() const {
        float sums[sum_lanes];
        std::memcpy(sums, parts_, sizeof sums);
        for (std::size_t half = sum_lanes / 2; half > 0; half /= 2) {
            for (std::size_t lane = 0; lane < half; ++lane) {
                sums[lane] += sums[lane + half];
            }
        }
        return sums[0];
    }

private:
    Vector parts_[sum_vectors] = {};
};

// Where to compute what store_block then writes: the place itself for fp32, else `buffer`.
static inline float* room_for(Flat to, std::size_t begin, float* buffer) {
    return to.type == Type::f32 ? static_cast<float*>(to.data) + begin : buffer;
}

// What a norm multiplies by: weight + offset, or 1 where there is no weight.
static inline const float* scale_block(Flat weight, float offset, std::size_t begin, std::size_t count,
                                       float* ZCORE_RESTRICT buffer) {
    if (!weight) {
        for (std::size_t at = 0; at < count; ++at) {
            buffer[at] = 1.0f;
        }
        return buffer;
    }
    const float* const values = load_block(weight, begin, count, buffer);
    if (offset == 0.0f) {
        return values;
    }
    for (std::size_t at = 0; at < count; ++at) {
        buffer[at] = values[at] + offset;
    }
    return buffer;
}

}  // namespace zcore::ZCORE_ISA
