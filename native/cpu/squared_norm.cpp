#include "zcore/squared_norm.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

// The number of partial sums is the same in each instruction set, so that all of them add in one order.
constexpr std::size_t lanes = 16;

double squared_norm_part(const NormPiece& piece, std::size_t begin, std::size_t end) {
    alignas(64) float buffer[block_numel];
    double sums[lanes] = {};
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        const float* const values = load_block(piece.values, at, count, buffer);
        const std::size_t whole = count - count % lanes;
        for (std::size_t row = 0; row < whole; row += lanes) {
            for (std::size_t lane = 0; lane < lanes; ++lane) {
                const double value = values[row + lane];
                sums[lane] += value * value;
            }
        }
        for (std::size_t rest = whole; rest < count; ++rest) {
            const double value = values[rest];
            sums[rest - whole] += value * value;
        }
    }
    for (std::size_t half = lanes / 2; half > 0; half /= 2) {
        for (std::size_t lane = 0; lane < half; ++lane) {
            sums[lane] += sums[lane + half];
        }
    }
    return sums[0];
}

}  // namespace zcore::ZCORE_ISA

#else

#include <vector>

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(double squared_norm_part(const NormPiece&, std::size_t, std::size_t))

double squared_norm(std::span<const NormPiece> pieces, int threads) {
    const auto sum_of = ZCORE_CHOOSE(squared_norm_part);
    double total = 0.0;
    for (const NormPiece& piece : pieces) {
        std::vector<double> sums((piece.numel + piece_grain - 1) / piece_grain);
        parallel_for(piece.numel, piece_grain, threads, [&](std::size_t begin, std::size_t end) {
            sums[begin / piece_grain] = sum_of(piece, begin, end);
        });
        for (const double each : sums) {
            total += each;
        }
    }
    return total;
}

}  // namespace zcore

#endif
