#include "zcore/round_stochastic.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/noise.hpp"

namespace zcore::ZCORE_ISA {

static void round_chunk(const float* ZCORE_RESTRICT values, const std::uint16_t* ZCORE_RESTRICT noise,
                        std::size_t count, std::uint16_t* ZCORE_RESTRICT out) {
    for (std::size_t at = 0; at < count; ++at) {
        out[at] = bf16_with_noise(values[at], noise[at]);
    }
}

void round_part(const float* values, std::uint16_t* out, std::uint64_t seed, std::uint64_t offset, std::size_t begin,
                std::size_t end) {
    alignas(64) std::uint16_t noise[block_numel];
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        fill_noise(seed, offset + at, count, noise);
        round_chunk(values + at, noise, count, out + at);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void round_part(const float*, std::uint16_t*, std::uint64_t, std::uint64_t, std::size_t, std::size_t))

void round_stochastic(const float* values, std::uint16_t* out, std::size_t numel, std::uint64_t seed,
                      std::uint64_t offset, int threads) {
    const auto round = ZCORE_CHOOSE(round_part);
    parallel_for(numel, piece_grain, threads, [&](std::size_t begin, std::size_t end) {
        round(values, out, seed, offset, begin, end);
    });
}

}  // namespace zcore

#endif
