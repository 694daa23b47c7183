// Noise of elements/noise.hpp for the vectors of a tile.
#pragma once

#include "cuda/block_tiles.hpp"
#include "elements/noise.hpp"

namespace zcore::cuda {

// The keys of a tile: its pairs have one upper half, or two.
struct NoiseKeys {
    std::uint64_t first, next;
    std::uint32_t upper;  // whose key is the first
};

// index: of the first element of the tile. Made by one thread, in memory of its thread block.
__device__ __forceinline__ static NoiseKeys noise_keys(std::uint64_t seed, std::uint64_t index) {
    const std::uint64_t pair = index / 2;
    return {noise_key(seed, pair), noise_key(seed, pair + (std::uint64_t{1} << 32)),
            static_cast<std::uint32_t>(pair >> 32)};
}

__device__ __forceinline__ static std::uint32_t noise_of_pair(const NoiseKeys& keys, std::uint64_t pair) {
    const bool is_first = static_cast<std::uint32_t>(pair >> 32) == keys.upper;
    return noise_word(static_cast<std::uint32_t>(pair), is_first ? keys.first : keys.next);
}

// Noise of the four elements from `index` on. Whether that is odd is alike in a whole tile.
__device__ __forceinline__ static void noise_of_vector(const NoiseKeys& keys, std::uint64_t index,
                                                       std::uint32_t (&noise)[vector_numel]) {
    const std::uint64_t pair = index / 2;
    const std::uint32_t word = noise_of_pair(keys, pair), next = noise_of_pair(keys, pair + 1);
    if (index % 2 == 0) {
        noise[0] = word & 0xffffu;
        noise[1] = word >> 16;
        noise[2] = next & 0xffffu;
        noise[3] = next >> 16;
    } else {
        noise[0] = word >> 16;
        noise[1] = next & 0xffffu;
        noise[2] = next >> 16;
        noise[3] = noise_of_pair(keys, pair + 2) & 0xffffu;
    }
}

}  // namespace zcore::cuda
