#include "zcore/lamb_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/lamb.hpp"

namespace zcore::ZCORE_ISA {

constexpr std::size_t lanes = 16;  // of partial sums, the same in each instruction set

static void average_block(const float* ZCORE_RESTRICT grad, float* ZCORE_RESTRICT exp_avg,
                          float* ZCORE_RESTRICT exp_avg_sq, std::size_t count, const LambElement& by) {
    for (std::size_t at = 0; at < count; ++at) {
        average_element(by, grad[at], exp_avg[at], exp_avg_sq[at]);
    }
}

static void update_block(const float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT exp_avg,
                         const float* ZCORE_RESTRICT exp_avg_sq, float* ZCORE_RESTRICT update, std::size_t count,
                         const LambElement& by) {
    for (std::size_t at = 0; at < count; ++at) {
        update[at] = update_of_element(by, param[at], exp_avg[at], exp_avg_sq[at]);
    }
}

static void add_squares(const float* ZCORE_RESTRICT values, std::size_t count, double* ZCORE_RESTRICT sums) {
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

static double total(const double* sums) {
    double all = 0.0;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
        all += sums[lane];
    }
    return all;
}

void lamb_average_part(const LambPiece& piece, std::size_t begin, std::size_t end, const Lamb& hyper,
                       LambSquares& squares) {
    alignas(64) float params[block_numel], grads[block_numel], first[block_numel], second[block_numel];
    alignas(64) float update[block_numel];
    double of_param[lanes] = {}, of_update[lanes] = {};
    const LambElement by(hyper);
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        float* const param = load_block(piece.param, at, count, params);
        const float* const grad = load_block(piece.grad, at, count, grads);
        float* const exp_avg = load_block(piece.exp_avg, at, count, first);
        float* const exp_avg_sq = load_block(piece.exp_avg_sq, at, count, second);
        average_block(grad, exp_avg, exp_avg_sq, count, by);
        store_block(piece.exp_avg, at, count, exp_avg);
        store_block(piece.exp_avg_sq, at, count, exp_avg_sq);
        update_block(param, exp_avg, exp_avg_sq, update, count, by);
        add_squares(param, count, of_param);
        add_squares(update, count, of_update);
    }
    squares.param += total(of_param);
    squares.update += total(of_update);
}

void lamb_apply_part(const LambPiece& piece, std::size_t begin, std::size_t end, const Lamb& hyper, double ratio) {
    alignas(64) float params[block_numel], first[block_numel], second[block_numel], update[block_numel];
    const float step_size = rounded(hyper.lr * ratio);
    const LambElement by(hyper);
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        float* const param = load_block(piece.param, at, count, params);
        const float* const exp_avg = load_block(piece.exp_avg, at, count, first);
        const float* const exp_avg_sq = load_block(piece.exp_avg_sq, at, count, second);
        update_block(param, exp_avg, exp_avg_sq, update, count, by);
        for (std::size_t each = 0; each < count; ++each) {
            apply_element(step_size, param[each], update[each]);
        }
        store_block(piece.param, at, count, param);
        store_block(piece.copy, at, count, param);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void lamb_average_part(const LambPiece&, std::size_t, std::size_t, const Lamb&, LambSquares&);
                  void lamb_apply_part(const LambPiece&, std::size_t, std::size_t, const Lamb&, double))

std::vector<LambSquares> lamb_average(std::span<const LambPiece> pieces, const Lamb& hyper, int threads) {
    const auto average = ZCORE_CHOOSE(lamb_average_part);
    std::vector<std::vector<LambSquares>> parts(pieces.size());  // added up later, in order
    for (std::size_t index = 0; index < pieces.size(); ++index) {
        parts[index].resize(pieces[index].numel / piece_grain + 2);
    }
    for_each_part(pieces, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        // A part begins at the start of its piece, or where the whole range is cut: never two in one slot.
        average(pieces[index], begin, end, hyper, parts[index][(begin + piece_grain - 1) / piece_grain]);
    });
    std::vector<LambSquares> squares(pieces.size());
    for (std::size_t index = 0; index < pieces.size(); ++index) {
        for (const LambSquares& each : parts[index]) {
            squares[index].param += each.param;
            squares[index].update += each.update;
        }
    }
    return squares;
}

void lamb_apply(std::span<const LambPiece> pieces, std::span<const double> ratios, const Lamb& hyper, int threads) {
    const auto apply = ZCORE_CHOOSE(lamb_apply_part);
    for_each_part(pieces, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        apply(pieces[index], begin, end, hyper, ratios[index]);
    });
}

}  // namespace zcore

#endif
