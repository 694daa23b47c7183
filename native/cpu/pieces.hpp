// Several flat pieces as one range, cut for threads without regard to where a piece ends.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

#include "zcore/parallel.hpp"

namespace zcore {

constexpr std::size_t piece_grain = 32 << 10;  // elements: about a megabyte of an optimizer's states, 0.1 ms

// How many blocks of neighbours make about as much work, for ops whose unit is the block.
constexpr std::size_t blocks_grain(std::size_t block_size) { return std::max<std::size_t>(1, piece_grain / block_size); }

// Calls function(index, begin, end) for parts of pieces[index], which has a member `numel`.
template <typename Piece, typename Function>
void for_each_part(std::span<const Piece> pieces, int threads, Function&& function) {
    std::vector<std::size_t> ends;  // of the pieces, laid end to end
    ends.reserve(pieces.size());
    std::size_t total = 0;
    for (const Piece& piece : pieces) {
        ends.push_back(total += piece.numel);
    }
    parallel_for(total, piece_grain, threads, [&](std::size_t begin, std::size_t end) {
        auto index = static_cast<std::size_t>(std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin());
        for (; begin < end; ++index) {
            const std::size_t start = ends[index] - pieces[index].numel, stop = std::min(end, ends[index]);
            if (begin < stop) {
                function(index, begin - start, stop - start);
            }
            begin = stop;
        }
    });
}

}  // namespace zcore
