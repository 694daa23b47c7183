// The pieces of steps and norms from tables, by the order of their columns: for the CPU and for CUDA.
#pragma once

#include <vector>

#include "table.hpp"
#include "zcore/adagrad_step.hpp"
#include "zcore/adamw_step.hpp"
#include "zcore/lamb_step.hpp"
#include "zcore/lion_step.hpp"
#include "zcore/sgd_step.hpp"
#include "zcore/squared_norm.hpp"

// param, grad, state, copy, the scales of the state
template <typename Piece>
std::vector<Piece> one_state_pieces(const Table& table) {
    return table.pieces<Piece>([&](std::size_t row) -> Piece {
        return {table.flat(row, 0), table.flat(row, 1), table.flat(row, 2, 4), table.flat(row, 3), table.numel(row)};
    });
}

// param, grad, two states, copy, the scales of the states
inline std::vector<zcore::AdamWPiece> adamw_pieces(const Table& table) {
    return table.pieces<zcore::AdamWPiece>([&](std::size_t row) -> zcore::AdamWPiece {
        return {table.flat(row, 0),    table.flat(row, 1), table.flat(row, 2, 5),
                table.flat(row, 3, 6), table.flat(row, 4), table.numel(row)};
    });
}

// param, grad, two states, the scales of the states
inline std::vector<zcore::LambPiece> lamb_average_pieces(const Table& table) {
    return table.pieces<zcore::LambPiece>([&](std::size_t row) -> zcore::LambPiece {
        return {table.flat(row, 0),    table.flat(row, 1), table.flat(row, 2, 4),
                table.flat(row, 3, 5), {},                 table.numel(row)};
    });
}

// param, two states, copy, the scales of the states
inline std::vector<zcore::LambPiece> lamb_apply_pieces(const Table& table) {
    return table.pieces<zcore::LambPiece>([&](std::size_t row) -> zcore::LambPiece {
        return {table.flat(row, 0),    {},                 table.flat(row, 1, 4),
                table.flat(row, 2, 5), table.flat(row, 3), table.numel(row)};
    });
}

inline std::vector<zcore::NormPiece> norm_pieces(const Table& table) {
    return table.pieces<zcore::NormPiece>([&](std::size_t row) -> zcore::NormPiece {
        return {table.flat(row, 0), table.numel(row)};
    });
}
