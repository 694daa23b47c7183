#include "zcore/round_with_noise.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/noise.hpp"

namespace zcore::ZCORE_ISA {

void round_with_noise_part(const float* ZCORE_RESTRICT values, const std::int32_t* ZCORE_RESTRICT noise,
                           std::uint16_t* ZCORE_RESTRICT out, std::size_t begin, std::size_t end) {
    for (std::size_t at = begin; at < end; ++at) {
        out[at] = bf16_with_noise(values[at], static_cast<std::uint32_t>(noise[at]));
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void round_with_noise_part(const float*, const std::int32_t*, std::uint16_t*, std::size_t,
                                             std::size_t))

void round_with_noise(const float* values, const std::int32_t* noise, std::uint16_t* out, std::size_t numel,
                      int threads) {
    const auto round = ZCORE_CHOOSE(round_with_noise_part);
    parallel_for(numel, piece_grain, threads, [&](std::size_t begin, std::size_t end) {
        round(values, noise, out, begin, end);
    });
}

}  // namespace zcore

#endif
