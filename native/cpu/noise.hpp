// Noise for stochastic rounding, from a counter: 16 bits of (seed, index), whoever asks, in whatever order. For code that
// is compiled once for each instruction set: everything is `static`, and in the namespace of that set.
//
//     pair = index / 2                                   its hash has the noise of two elements, the even one below
//     key  = splitmix64(seed, upper half of pair)        once a chunk
//     x    = lower half of pair ^ lower half of key
//     x    = (x ^ x >> 16) * 0x7feb352d
//     x    = ((x ^ x >> 15) + upper half of key) * 0x846ca68b
//     x    = x ^ x >> 16
//
// The mixer is lowbias32 (C. Wellons, "Prospecting for hash functions", 2018), which flips every bit of the result with
// a chance within 0.2% of a half; its key goes in at two places, so that seeds give unlike functions and not one,
// shifted. One product of 32 bits an element hides behind memory. Philox4x32-10 (Salmon et al. 2011) takes five of 32 by
// 32 to 64 bits for 32 bits, and then rounding costs several times what reading does: it resists tests of randomness
// that are far beyond the need of a rounding. This is no generator for sampling, and none for cryptography.
//
// 16 bits are exact for what drops 16 (fp32 to bf16); elsewhere a chance is a multiple of 2^-16.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

// The finaliser of splitmix64 (Steele et al. 2014).
static inline std::uint64_t mix(std::uint64_t value) {
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

// Words of noise of pair, pair + 1 ...
static inline void fill_words(std::uint64_t seed, std::uint64_t pair, std::size_t count,
                              std::uint32_t* ZCORE_RESTRICT words) {
    for (std::size_t done = 0; done < count;) {
        const std::uint64_t key = mix(mix(seed) ^ (pair >> 32));
        const auto first = static_cast<std::uint32_t>(pair);
        const auto key0 = static_cast<std::uint32_t>(key), key1 = static_cast<std::uint32_t>(key >> 32);
        const std::uint64_t room = (std::uint64_t{1} << 32) - first;  // before the upper half changes
        const std::size_t run = count - done < room ? count - done : static_cast<std::size_t>(room);
        std::uint32_t* ZCORE_RESTRICT const out = words + done;
        for (std::size_t at = 0; at < run; ++at) {
            std::uint32_t x = (first + static_cast<std::uint32_t>(at)) ^ key0;
            x = (x ^ (x >> 16)) * 0x7feb352du;
            x = ((x ^ (x >> 15)) + key1) * 0x846ca68bu;
            out[at] = x ^ (x >> 16);
        }
        done += run;
        pair += run;
    }
}

// Noise of `count` elements from `index` on, at most block_numel.
static inline void fill_noise(std::uint64_t seed, std::uint64_t index, std::size_t count, std::uint16_t* noise) {
    alignas(64) std::uint32_t words[block_numel / 2 + 1];
    fill_words(seed, index / 2, count / 2 + 1, words);
    std::memcpy(noise, reinterpret_cast<const std::uint8_t*>(words) + index % 2 * sizeof *noise, count * sizeof *noise);
}

}  // namespace zcore::ZCORE_ISA
