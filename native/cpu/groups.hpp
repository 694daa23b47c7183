// Blocks with a scale each that are taken together, so that loops over small ones do not end before they pay: at 32
// elements a block, a loop that stores bytes would not fill one vector. For code that is compiled once for each
// instruction set: everything is `static`, and in the namespace of that set.
#pragma once

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

// How many blocks pass through the buffers of a chunk at once: as many as fit, or one that takes several chunks.
static inline std::size_t blocks_together(std::size_t block_size) {
    return block_size < block_numel ? block_numel / block_size : 1;
}

// How many blocks are measured before the first of them is encoded: the comparisons and divisions at the end of each
// take long, and those of several go on side by side, which took a sixth of the time of blocks of 256 elements.
static inline std::size_t blocks_measured(std::size_t block_size) {
    return block_size > block_numel ? 1 : 4 * blocks_together(block_size);
}

// How many elements of such a group make a chunk: whole blocks, where any fits.
static inline std::size_t chunk_numel(std::size_t block_size) {
    return block_size < block_numel ? blocks_together(block_size) * block_size : block_numel;
}

// The elements of a group of `together` blocks, the first of which is `block`.
struct Group {
    std::size_t begin, count;
};

static inline Group group_at(std::size_t numel, std::size_t block_size, std::size_t block, std::size_t end,
                             std::size_t together) {
    const std::size_t rest = end - block;
    const std::size_t begin = block * block_size, size = (rest < together ? rest : together) * block_size;
    return {begin, numel - begin < size ? numel - begin : size};
}

// Calls function(block, start, size) for the blocks in a chunk of `count` elements, of which the first is `block`.
template <typename Function>
static inline void for_each_block(std::size_t block, std::size_t count, std::size_t block_size, Function function) {
    for (std::size_t start = 0; start < count; start += block_size, ++block) {
        function(block, start, count - start < block_size ? count - start : block_size);
    }
}

}  // namespace zcore::ZCORE_ISA
