#include "zcore/rotary.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

// `count` pairs, whose elements lie `apart` from each other and `step` from those of the next pair.
template <std::size_t step>
static inline void turn(const float* ZCORE_RESTRICT x, float* ZCORE_RESTRICT y, const float* ZCORE_RESTRICT cos_a,
                        const float* ZCORE_RESTRICT sin_a, const float* ZCORE_RESTRICT x_b, float* ZCORE_RESTRICT y_b,
                        const float* ZCORE_RESTRICT cos_b, const float* ZCORE_RESTRICT sin_b, std::size_t count,
                        bool is_backward) {
    if (is_backward) {
        for (std::size_t pair = 0; pair < count; ++pair) {
            const std::size_t at = pair * step;
            y[at] = x[at] * cos_a[at] + x_b[at] * sin_b[at];
            y_b[at] = x_b[at] * cos_b[at] - x[at] * sin_a[at];
        }
        return;
    }
    for (std::size_t pair = 0; pair < count; ++pair) {
        const std::size_t at = pair * step;
        y[at] = x[at] * cos_a[at] - x_b[at] * sin_a[at];
        y_b[at] = x_b[at] * cos_b[at] + x[at] * sin_b[at];
    }
}

// The blocks of one head whose first elements begin at `a` and second at `b`, equal where pairs are interleaved.
static void turn_block(const Rotary& op, std::size_t head, std::size_t table, std::size_t a, std::size_t b,
                       std::size_t count) {
    alignas(64) float x_a[block_numel], x_b[block_numel], y_a[block_numel], y_b[block_numel];
    alignas(64) float cos_a[block_numel], cos_b[block_numel], sin_a[block_numel], sin_b[block_numel];
    const float* const x = load_block(op.x, head + a, count, x_a);
    const float* const cos = load_block(op.cos, table + a, count, cos_a);
    const float* const sin = load_block(op.sin, table + a, count, sin_a);
    float* const y = room_for(op.y, head + a, y_a);
    if (op.is_interleaved) {
        turn<2>(x, y, cos, sin, x + 1, y + 1, cos + 1, sin + 1, count / 2, op.is_backward);
    } else {
        float* const second = room_for(op.y, head + b, y_b);
        turn<1>(x, y, cos, sin, load_block(op.x, head + b, count, x_b), second,
                load_block(op.cos, table + b, count, cos_b), load_block(op.sin, table + b, count, sin_b), count,
                op.is_backward);
        store_block(op.y, head + b, count, second);
    }
    store_block(op.y, head + a, count, y);
}

void rotary_part(const Rotary& op, std::size_t begin, std::size_t end) {
    const std::size_t size = op.y.type == Type::f32 ? 4 : 2;
    const std::size_t length = op.is_interleaved ? op.width : op.width / 2;
    for (std::size_t token = begin; token < end; ++token) {
        const std::size_t table = static_cast<std::size_t>(op.position[token]) * op.width;
        for (std::size_t each = 0; each < op.heads; ++each) {
            const std::size_t head = (token * op.heads + each) * op.dim;
            for (std::size_t at = 0; at < length; at += block_numel) {
                turn_block(op, head, table, at, op.is_interleaved ? at : at + length, block_at(at, length));
            }
            if (op.dim > op.width) {
                std::memcpy(static_cast<char*>(op.y.data) + (head + op.width) * size,
                            static_cast<const char*>(op.x.data) + (head + op.width) * size, (op.dim - op.width) * size);
            }
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void rotary_part(const Rotary&, std::size_t, std::size_t))

void rotary(const Rotary& op, int threads) {
    const auto part = ZCORE_CHOOSE(rotary_part);
    parallel_for(op.tokens, row_grain(op.heads * op.dim), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, begin, end); });
}

}  // namespace zcore

#endif
