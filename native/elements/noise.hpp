// Noise for stochastic rounding, from a counter: 16 bits of (seed, index), whoever asks, in whatever order.
//
//     pair = index / 2                                   its hash has the noise of two elements, the even one below
//     key  = splitmix64(seed, upper half of pair)        once for many pairs
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

#include "elements/floats.hpp"

namespace zcore::ZCORE_ISA {

// The finaliser of splitmix64 (Steele et al. 2014).
ZCORE_EACH std::uint64_t mix(std::uint64_t value) {
    value += 0x9e3779b97f4a7c15u;
    value = (value ^ (value >> 30)) * 0xbf58476d1ce4e5b9u;
    value = (value ^ (value >> 27)) * 0x94d049bb133111ebu;
    return value ^ (value >> 31);
}

// The key of `pair` and of all others with its upper half.
ZCORE_EACH std::uint64_t noise_key(std::uint64_t seed, std::uint64_t pair) { return mix(mix(seed) ^ (pair >> 32)); }

ZCORE_EACH std::uint32_t noise_word(std::uint32_t lower_half_of_pair, std::uint64_t key) {
    std::uint32_t x = lower_half_of_pair ^ static_cast<std::uint32_t>(key);
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = ((x ^ (x >> 15)) + static_cast<std::uint32_t>(key >> 32)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// fp32 to bf16, the upper of two neighbours where 16 bits of noise make up for what is missing.
ZCORE_EACH std::uint16_t bf16_with_noise(float value, std::uint32_t noise) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t rounded = (bits + noise) >> 16;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // noise could carry it into the sign
    return static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

}  // namespace zcore::ZCORE_ISA
