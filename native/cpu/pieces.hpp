// Several flat pieces as one range, cut for threads without regard to where a piece ends, but never inside a block of
// codes: in the range each piece begins at a whole number of blocks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "zcore/flat.hpp"
#include "zcore/parallel.hpp"

namespace zcore {

constexpr std::size_t piece_grain = 32 << 10;  // elements: about a megabyte of an optimizer's states, 0.1 ms
static_assert(piece_grain % code_block_numel == 0);

// How many blocks of neighbours make about as much work, for ops whose unit is the block.
constexpr std::size_t blocks_grain(std::size_t block_size) { return std::max<std::size_t>(1, piece_grain / block_size); }

// Calls function(index, begin, end) for parts of pieces[index], which has a member `numel`.
template <typename Piece, typename Function>
void for_each_part(std::span<const Piece> pieces, int threads, Function&& function) {
    std::vector<std::size_t> starts;  // of the pieces in the range
    starts.reserve(pieces.size());
    std::size_t total = 0;
    for (const Piece& piece : pieces) {
        starts.push_back(total);
        total += (piece.numel + code_block_numel - 1) / code_block_numel * code_block_numel;
    }
    parallel_for(total, piece_grain, threads, [&](std::size_t begin, std::size_t end) {
        const auto next = std::upper_bound(starts.begin(), starts.end(), begin);
        auto index = static_cast<std::size_t>(next - starts.begin()) - 1;
        for (; index < pieces.size() && starts[index] < end; ++index) {
            const std::size_t first = std::max(begin, starts[index]) - starts[index];
            const std::size_t last = std::min(end - starts[index], pieces[index].numel);
            if (first < last) {
                function(index, first, last);
            }
        }
    });
}

}  // namespace zcore
