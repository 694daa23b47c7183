// Flat pieces of any number and size, laid out as the arguments of a launch: no copy to the device is made, and the
// memory of the host that described them may go at once.
//
//     arguments   at most 4 KiB, so some 60 pieces; more go into further launches
//     chunks      16,384 elements each, numbered through the pieces; a thread block takes one
//     piece       of a chunk is found among the first chunks, by halving
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/tiles.hpp"

namespace zcore::ZCORE_ISA {

constexpr unsigned chunk_tiles = 64;
constexpr std::size_t chunk_numel = chunk_tiles * tile_numel;
constexpr std::size_t argument_bytes = 4096;  // what every device and driver takes

ZCORE_EACH std::uint32_t num_chunks(std::size_t numel) {
    return static_cast<std::uint32_t>((numel + chunk_numel - 1) / chunk_numel);
}

// One piece of an op that has up to two states; what an op does not have is empty.
constexpr int most_states = 2;
struct StepPiece {
    Flat param;
    Flat grad;
    Flat states[most_states];
    Flat copy;
    std::size_t numel;
};

// Tiles [begin, end) of a piece.
struct Part {
    std::uint32_t piece;
    std::size_t begin, end;
};

// All of a kind have the same types. `capacity` counts pieces; no more than `num_states` have addresses.
template <int num_states, std::uint32_t capacity>
struct Pieces {
    static constexpr int num_columns = 3 + num_states;

    void* data[num_columns][capacity];
    float* scales[num_states == 0 ? 1 : num_states][capacity];
    std::size_t numel[capacity];
    std::uint32_t first_chunk[capacity + 1];  // of each piece, and one past the last
    std::uint32_t count;
    Type types[num_columns];

    void add(const StepPiece& piece) {
        const std::uint32_t at = count++;
        const auto set = [&](int column, const Flat& flat) {
            data[column][at] = flat.data;
            types[column] = flat.type;
        };
        set(0, piece.param);
        set(1, piece.grad);
        set(2, piece.copy);
        for (int each = 0; each < num_states; ++each) {
            set(3 + each, piece.states[each]);
            scales[each][at] = piece.states[each].scales;
        }
        numel[at] = piece.numel;
        first_chunk[at + 1] = first_chunk[at] + num_chunks(piece.numel);
    }

    ZCORE_EACH_OF Flat param(std::uint32_t piece) const { return {data[0][piece], types[0], nullptr}; }
    ZCORE_EACH_OF Flat grad(std::uint32_t piece) const { return {data[1][piece], types[1], nullptr}; }
    ZCORE_EACH_OF Flat copy(std::uint32_t piece) const { return {data[2][piece], types[2], nullptr}; }
    ZCORE_EACH_OF Flat state(int which, std::uint32_t piece) const {
        return {data[3 + which][piece], types[3 + which], scales[which][piece]};
    }

    ZCORE_EACH_OF Part part_of(std::uint32_t chunk) const {
        std::uint32_t low = 0, high = count;  // the last piece that does not begin after the chunk: pieces may be empty
        while (high - low > 1) {
            const std::uint32_t middle = low + (high - low) / 2;
            (first_chunk[middle] <= chunk ? low : high) = middle;
        }
        const std::size_t tiles = (numel[low] + tile_numel - 1) / tile_numel;
        const std::size_t begin = static_cast<std::size_t>(chunk - first_chunk[low]) * chunk_tiles;
        return {low, begin, begin + chunk_tiles < tiles ? begin + chunk_tiles : tiles};
    }
};

// How many pieces a launch takes beside `others` bytes of arguments.
template <int num_states>
constexpr std::uint32_t capacity_beside(std::size_t others) {
    const std::size_t of_piece = (3 + num_states + (num_states == 0 ? 1 : num_states)) * sizeof(void*) +
                                 sizeof(std::size_t) + sizeof(std::uint32_t);
    const std::size_t fixed = 4 * sizeof(std::uint32_t) + 8 * sizeof(Type) + 32;  // with what alignment may add
    return static_cast<std::uint32_t>((argument_bytes - fixed - others) / of_piece);
}

}  // namespace zcore::ZCORE_ISA
