#include "zcore/rms_norm.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include <cmath>

#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

static float root_of(float mean_square, float eps) { return 1.0f / std::sqrt(mean_square + eps); }

// x + residual in fp32, written to `sum` and read back as rounded: what is normalised is what the caller gets.
static const float* add_block(const RmsNorm& norm, std::size_t at, std::size_t count, float* buffer, float* other) {
    const float* const x = load_block(norm.x, at, count, buffer);
    if (!norm.residual) {
        return x;
    }
    const float* const residual = load_block(norm.residual, at, count, other);
    float* const added = room_for(norm.sum, at, buffer);
    for (std::size_t each = 0; each < count; ++each) {
        added[each] = x[each] + residual[each];
    }
    store_block(norm.sum, at, count, added);
    return load_block(norm.sum, at, count, buffer);
}

void rms_norm_part(const RmsNorm& norm, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel];
    const Flat normed = norm.residual ? norm.sum : norm.x;
    for (std::size_t row = begin; row < end; ++row) {
        const std::size_t start = row * norm.hidden;
        RowSum squares;
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const s = add_block(norm, start + at, count, first, second);
            squares.add(count, [s](auto get) { return get(s) * get(s); });
        }
        const float root = root_of(squares.total() / static_cast<float>(norm.hidden), norm.eps);
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* ZCORE_RESTRICT s = load_block(normed, start + at, count, first);
            const float* ZCORE_RESTRICT scale = scale_block(norm.weight, norm.offset, at, count, second);
            float* ZCORE_RESTRICT y = room_for(norm.y, start + at, third);
            for (std::size_t each = 0; each < count; ++each) {
                y[each] = s[each] * root * scale[each];
            }
            store_block(norm.y, start + at, count, y);
        }
    }
}

static void backward_block(const float* ZCORE_RESTRICT dy, const float* ZCORE_RESTRICT s,
                           const float* ZCORE_RESTRICT scale, float* ZCORE_RESTRICT ds, float* ZCORE_RESTRICT dweight,
                           std::size_t count, float root, float along) {
    for (std::size_t each = 0; each < count; ++each) {
        ds[each] = root * (dy[each] * scale[each]) - s[each] * along;
        dweight[each] += dy[each] * (s[each] * root);
    }
}

void rms_norm_backward_part(const RmsNormBackward& norm, std::size_t begin, std::size_t end, float* dweight) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel], fourth[block_numel];
    for (std::size_t row = begin; row < end; ++row) {
        const std::size_t start = row * norm.hidden;
        RowSum squares, products;
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const dy = load_block(norm.dy, start + at, count, first);
            const float* const s = load_block(norm.s, start + at, count, second);
            const float* const scale = scale_block(norm.weight, norm.offset, at, count, third);
            squares.add(count, [s](auto get) { return get(s) * get(s); });
            products.add(count, [=](auto get) { return get(dy) * get(scale) * get(s); });
        }
        const float hidden = static_cast<float>(norm.hidden);
        const float root = root_of(squares.total() / hidden, norm.eps);
        const float along = root * (root * (root * (products.total() / hidden)));
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const dy = load_block(norm.dy, start + at, count, first);
            const float* const s = load_block(norm.s, start + at, count, second);
            const float* const scale = scale_block(norm.weight, norm.offset, at, count, third);
            float* const ds = room_for(norm.ds, start + at, fourth);
            backward_block(dy, s, scale, ds, dweight + at, count, root, along);
            if (norm.dsum) {
                const float* ZCORE_RESTRICT dsum = load_block(norm.dsum, start + at, count, first);
                for (std::size_t each = 0; each < count; ++each) {
                    ds[each] += dsum[each];
                }
            }
            store_block(norm.ds, start + at, count, ds);
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void rms_norm_part(const RmsNorm&, std::size_t, std::size_t);
                  void rms_norm_backward_part(const RmsNormBackward&, std::size_t, std::size_t, float*))

void rms_norm(const RmsNorm& norm, int threads) {
    const auto part = ZCORE_CHOOSE(rms_norm_part);
    parallel_for(norm.rows, row_grain(norm.hidden), threads,
                 [&](std::size_t begin, std::size_t end) { part(norm, begin, end); });
}

void rms_norm_backward(const RmsNormBackward& norm, int threads) {
    const auto part = ZCORE_CHOOSE(rms_norm_backward_part);
    ColumnSums dweight(norm.rows, norm.hidden);
    parallel_for(norm.rows, dweight.grain(), threads,
                 [&](std::size_t begin, std::size_t end) { part(norm, begin, end, dweight.part(begin)); });
    dweight.write(norm.dweight, threads);
}

}  // namespace zcore

#endif
