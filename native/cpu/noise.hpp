// Noise of elements/noise.hpp for neighbours. For code that is compiled once for each instruction set: everything is
// `static`, and in the namespace of that set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/blocks.hpp"
#include "elements/noise.hpp"

namespace zcore::ZCORE_ISA {

// Words of noise of pair, pair + 1 ...
static inline void fill_words(std::uint64_t seed, std::uint64_t pair, std::size_t count,
                              std::uint32_t* ZCORE_RESTRICT words) {
    for (std::size_t done = 0; done < count;) {
        const std::uint64_t key = noise_key(seed, pair);
        const auto first = static_cast<std::uint32_t>(pair);
        const std::uint64_t room = (std::uint64_t{1} << 32) - first;  // before the upper half changes
        const std::size_t run = count - done < room ? count - done : static_cast<std::size_t>(room);
        std::uint32_t* ZCORE_RESTRICT const out = words + done;
        for (std::size_t at = 0; at < run; ++at) {
            out[at] = noise_word(first + static_cast<std::uint32_t>(at), key);
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
