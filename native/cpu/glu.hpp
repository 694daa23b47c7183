// A gated linear unit of any activation, with members value(g) and slope(g). For code that is compiled once for each
// instruction set, as blocks.hpp. Parts are ranges of elements, which may begin and end within a row.
#pragma once

#include "cpu/rows.hpp"
#include "zcore/glu.hpp"

namespace zcore::ZCORE_ISA {

static inline std::size_t place(const Columns& columns, std::size_t row, std::size_t column) {
    return row * columns.stride + columns.shift + column;
}

// Calls visit(row, column, count) for the blocks of elements [begin, end) of rows of `hidden`.
template <typename Visit>
static inline void for_each_block(std::size_t hidden, std::size_t begin, std::size_t end, Visit visit) {
    std::size_t row = begin / hidden, column = begin % hidden;
    while (begin < end) {
        const std::size_t left = end - begin < hidden - column ? end - begin : hidden - column;
        const std::size_t count = left < block_numel ? left : block_numel;
        visit(row, column, count);
        begin += count, column += count;
        if (column == hidden) {
            ++row, column = 0;
        }
    }
}

template <typename Activation>
static void gate_block(const float* ZCORE_RESTRICT gate, const float* ZCORE_RESTRICT up, float* ZCORE_RESTRICT out,
                       std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        out[at] = Activation::value(gate[at]) * up[at];
    }
}

template <typename Activation>
static void glu_forward(const Glu& glu, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel];
    for_each_block(glu.hidden, begin, end, [&](std::size_t row, std::size_t column, std::size_t count) {
        const float* const gate = load_block(glu.gate.flat, place(glu.gate, row, column), count, first);
        const float* const up = load_block(glu.up.flat, place(glu.up, row, column), count, second);
        const std::size_t to = place(glu.out, row, column);
        float* const out = room_for(glu.out.flat, to, third);
        gate_block<Activation>(gate, up, out, count);
        store_block(glu.out.flat, to, count, out);
    });
}

template <typename Activation>
static void gate_block_backward(const float* ZCORE_RESTRICT dout, const float* ZCORE_RESTRICT gate,
                                const float* ZCORE_RESTRICT up, float* ZCORE_RESTRICT dgate, float* ZCORE_RESTRICT dup,
                                std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        dup[at] = dout[at] * Activation::value(gate[at]);
        dgate[at] = dout[at] * up[at] * Activation::slope(gate[at]);
    }
}

template <typename Activation>
static void glu_backward(const GluBackward& glu, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel], fourth[block_numel],
        fifth[block_numel];
    for_each_block(glu.hidden, begin, end, [&](std::size_t row, std::size_t column, std::size_t count) {
        const float* const dout = load_block(glu.dout.flat, place(glu.dout, row, column), count, first);
        const float* const gate = load_block(glu.gate.flat, place(glu.gate, row, column), count, second);
        const float* const up = load_block(glu.up.flat, place(glu.up, row, column), count, third);
        const std::size_t gate_to = place(glu.dgate, row, column), up_to = place(glu.dup, row, column);
        float* const dgate = room_for(glu.dgate.flat, gate_to, fourth);
        float* const dup = room_for(glu.dup.flat, up_to, fifth);
        gate_block_backward<Activation>(dout, gate, up, dgate, dup, count);
        store_block(glu.dgate.flat, gate_to, count, dgate);
        store_block(glu.dup.flat, up_to, count, dup);
    });
}

}  // namespace zcore::ZCORE_ISA
