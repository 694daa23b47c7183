#include "zcore/unpermute.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

static inline float weight_of(Flat weights, std::size_t choice) {
    float buffer[block_numel];
    return weights ? *load_block(weights, choice, 1, buffer) : 1.0f;
}

void unpermute_part(const Unpermute& op, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel];
    for (std::size_t token = begin; token < end; ++token) {
        for (std::size_t at = 0; at < op.hidden; at += block_numel) {
            const std::size_t count = block_at(at, op.hidden), to = token * op.hidden + at;
            float* ZCORE_RESTRICT out = room_for(op.out, to, first);
            for (std::size_t each = 0; each < count; ++each) {
                out[each] = 0.0f;
            }
            for (std::size_t choice = token * op.k; choice < (token + 1) * op.k; ++choice) {
                const std::size_t from = static_cast<std::size_t>(op.places[choice]) * op.hidden + at;
                const float* ZCORE_RESTRICT row = load_block(op.rows, from, count, second);
                const float weight = weight_of(op.weights, choice);
                for (std::size_t each = 0; each < count; ++each) {
                    out[each] += weight * row[each];
                }
            }
            store_block(op.out, to, count, out);
        }
    }
}

void unpermute_backward_part(const UnpermuteBackward& op, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel];
    for (std::size_t choice = begin * op.k; choice < end * op.k; ++choice) {
        const float weight = weight_of(op.weights, choice);
        RowSum products;
        for (std::size_t at = 0; at < op.hidden; at += block_numel) {
            const std::size_t count = block_at(at, op.hidden);
            const std::size_t from = static_cast<std::size_t>(op.places[choice]) * op.hidden + at;
            const float* ZCORE_RESTRICT dout = load_block(op.dout, choice / op.k * op.hidden + at, count, first);
            if (op.dweights) {
                const float* const row = load_block(op.rows, from, count, second);
                products.add(count, [=](auto get) { return get(dout) * get(row); });
            }
            float* ZCORE_RESTRICT drow = room_for(op.drows, from, third);
            for (std::size_t each = 0; each < count; ++each) {
                drow[each] = weight * dout[each];
            }
            store_block(op.drows, from, count, drow);
        }
        const float dweight = products.total();
        store_block(op.dweights, choice, 1, &dweight);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void unpermute_part(const Unpermute&, std::size_t, std::size_t);
                  void unpermute_backward_part(const UnpermuteBackward&, std::size_t, std::size_t))

void unpermute(const Unpermute& op, int threads) {
    const auto part = ZCORE_CHOOSE(unpermute_part);
    parallel_for(op.tokens, row_grain(op.hidden * op.k), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, begin, end); });
}

void unpermute_backward(const UnpermuteBackward& op, int threads) {
    const auto part = ZCORE_CHOOSE(unpermute_backward_part);
    parallel_for(op.tokens, row_grain(op.hidden * op.k), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, begin, end); });
}

}  // namespace zcore

#endif
