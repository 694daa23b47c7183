#include "zcore/bias_dropout_residual.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

constexpr std::size_t counters = block_numel / 4;  // of a block; each gives four words

// The random words of the elements of one block.
static void draw_block(std::uint64_t seed, std::uint64_t block, std::uint32_t* ZCORE_RESTRICT words) {
    for (std::size_t each = 0; each < counters; ++each) {
        const std::uint64_t counter = block * counters + each;
        std::uint32_t a = static_cast<std::uint32_t>(counter), b = static_cast<std::uint32_t>(counter >> 32);
        std::uint32_t c = 0, d = 0;
        std::uint32_t key = static_cast<std::uint32_t>(seed), high_key = static_cast<std::uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const std::uint64_t first = std::uint64_t{0xd2511f53u} * a, second = std::uint64_t{0xcd9e8d57u} * c;
            a = static_cast<std::uint32_t>(second >> 32) ^ b ^ key;
            b = static_cast<std::uint32_t>(second);
            c = static_cast<std::uint32_t>(first >> 32) ^ d ^ high_key;
            d = static_cast<std::uint32_t>(first);
            key += 0x9e3779b9u, high_key += 0xbb67ae85u;
        }
        words[each] = a;
        words[counters + each] = b;
        words[2 * counters + each] = c;
        words[3 * counters + each] = d;
    }
}

// What each element is multiplied by, for elements that come in order: blocks are drawn as they are reached.
class Factors {
public:
    Factors(std::uint64_t seed, double drop) : seed_(seed), threshold_(static_cast<std::uint64_t>(drop * 0x1p32)) {
        scale_ = drop < 1.0 ? static_cast<float>(1.0 / (1.0 - drop)) : 0.0f;
    }

    // The factors from element `at` on; as many as are left of its block.
    inline const float* from(std::size_t at) {
        const std::size_t block = at / block_numel;
        if (block != block_) {
            block_ = block;
            draw(block);
        }
        return factors_ + at % block_numel;
    }

    static inline std::size_t left(std::size_t at) { return block_numel - at % block_numel; }

private:
    void draw(std::size_t block) {
        alignas(64) std::uint32_t words[block_numel];
        draw_block(seed_, block, words);
        for (std::size_t at = 0; at < block_numel; ++at) {
            factors_[at] = words[at] >= threshold_ ? scale_ : 0.0f;
        }
    }

    std::uint64_t seed_, threshold_;  // 2^32, above every word, where all is dropped
    float scale_;
    std::size_t block_ = ~std::size_t{0};
    alignas(64) float factors_[block_numel];
};

static inline std::size_t least(std::size_t one, std::size_t two) { return one < two ? one : two; }

void bias_dropout_residual_part(const BiasDropoutResidual& op, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel], fourth[block_numel];
    Factors factors(op.seed, op.drop);
    for (std::size_t row = begin; row < end; ++row) {
        for (std::size_t at = 0; at < op.hidden;) {
            const std::size_t from = row * op.hidden + at, count = least(op.hidden - at, Factors::left(from));
            const float* ZCORE_RESTRICT factor = factors.from(from);
            const float* ZCORE_RESTRICT x = load_block(op.x, from, count, first);
            const float* ZCORE_RESTRICT residual = load_block(op.residual, from, count, second);
            float* ZCORE_RESTRICT out = room_for(op.out, from, third);
            if (op.bias) {
                const float* ZCORE_RESTRICT bias = load_block(op.bias, at, count, fourth);
                for (std::size_t each = 0; each < count; ++each) {
                    out[each] = residual[each] + (x[each] + bias[each]) * factor[each];
                }
            } else {
                for (std::size_t each = 0; each < count; ++each) {
                    out[each] = residual[each] + x[each] * factor[each];
                }
            }
            store_block(op.out, from, count, out);
            at += count;
        }
    }
}

void bias_dropout_residual_backward_part(const BiasDropoutResidualBackward& op, std::size_t begin, std::size_t end,
                                         float* dbias) {
    alignas(64) float first[block_numel], second[block_numel];
    Factors factors(op.seed, op.drop);
    for (std::size_t row = begin; row < end; ++row) {
        for (std::size_t at = 0; at < op.hidden;) {
            const std::size_t from = row * op.hidden + at, count = least(op.hidden - at, Factors::left(from));
            const float* ZCORE_RESTRICT factor = factors.from(from);
            const float* ZCORE_RESTRICT dout = load_block(op.dout, from, count, first);
            float* ZCORE_RESTRICT dx = room_for(op.dx, from, second);
            float* ZCORE_RESTRICT sums = dbias + at;
            for (std::size_t each = 0; each < count; ++each) {
                const float gradient = dout[each] * factor[each];
                dx[each] = gradient;
                sums[each] += gradient;
            }
            store_block(op.dx, from, count, dx);
            at += count;
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(
    void bias_dropout_residual_part(const BiasDropoutResidual&, std::size_t, std::size_t);
    void bias_dropout_residual_backward_part(const BiasDropoutResidualBackward&, std::size_t, std::size_t, float*))

void bias_dropout_residual(const BiasDropoutResidual& op, int threads) {
    const auto part = ZCORE_CHOOSE(bias_dropout_residual_part);
    parallel_for(op.rows, row_grain(op.hidden), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, begin, end); });
}

void bias_dropout_residual_backward(const BiasDropoutResidualBackward& op, int threads) {
    const auto part = ZCORE_CHOOSE(bias_dropout_residual_backward_part);
    ColumnSums dbias(op.rows, op.hidden);
    parallel_for(op.rows, dbias.grain(), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, begin, end, dbias.part(begin)); });
    dbias.write(op.dbias, threads);
}

}  // namespace zcore

#endif
