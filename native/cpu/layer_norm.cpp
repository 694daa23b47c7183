#include "zcore/layer_norm.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include <cmath>

#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

// x + residual in fp32, written to `sum` and read back as rounded: what is normalised is what the caller gets.
static const float* add_block(const LayerNorm& norm, std::size_t at, std::size_t count, float* buffer, float* other) {
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

template <bool has_bias>
static void normalise_block(const float* ZCORE_RESTRICT s, const float* ZCORE_RESTRICT scale,
                            const float* ZCORE_RESTRICT bias, float* ZCORE_RESTRICT y, std::size_t count, float mean,
                            float root) {
    for (std::size_t each = 0; each < count; ++each) {
        const float scaled = (s[each] - mean) * root * scale[each];
        y[each] = has_bias ? scaled + bias[each] : scaled;
    }
}

constexpr std::size_t kept_numel = 4096;  // 16 KiB: half of the nearest cache

void layer_norm_part(const LayerNorm& norm, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel], fourth[block_numel];
    alignas(64) float row_values[kept_numel];  // of a row of 16 bits an element: three passes, one conversion
    const Flat normed = norm.residual ? norm.sum : norm.x;
    const bool is_kept = norm.hidden <= kept_numel && normed.type != Type::f32;
    const float hidden = static_cast<float>(norm.hidden);
    for (std::size_t row = begin; row < end; ++row) {
        const std::size_t start = row * norm.hidden;
        RowSum values, squares;
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const s = add_block(norm, start + at, count, is_kept ? row_values + at : first, second);
            values.add(count, [s](auto get) { return get(s); });
        }
        const float mean = values.total() / hidden;
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const s = is_kept ? row_values + at : load_block(normed, start + at, count, first);
            squares.add(count, [=](auto get) { return (get(s) - mean) * (get(s) - mean); });
        }
        const float root = 1.0f / std::sqrt(squares.total() / hidden + norm.eps);
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const s = is_kept ? row_values + at : load_block(normed, start + at, count, first);
            const float* const scale = scale_block(norm.weight, 0.0f, at, count, second);
            float* const y = room_for(norm.y, start + at, third);
            if (norm.bias) {
                const float* const bias = load_block(norm.bias, at, count, fourth);
                normalise_block<true>(s, scale, bias, y, count, mean, root);
            } else {
                normalise_block<false>(s, scale, nullptr, y, count, mean, root);
            }
            store_block(norm.y, start + at, count, y);
        }
    }
}

struct Means {
    float s, root, u, un;  // of s, 1 / deviation, of u, of u n
};

static void backward_block(const float* ZCORE_RESTRICT dy, const float* ZCORE_RESTRICT s,
                           const float* ZCORE_RESTRICT scale, float* ZCORE_RESTRICT ds, float* ZCORE_RESTRICT dweight,
                           float* ZCORE_RESTRICT dbias, std::size_t count, const Means means) {
    for (std::size_t each = 0; each < count; ++each) {
        const float n = (s[each] - means.s) * means.root;
        ds[each] = means.root * (dy[each] * scale[each] - means.u - n * means.un);
        dweight[each] += dy[each] * n;
        dbias[each] += dy[each];
    }
}

void layer_norm_backward_part(const LayerNormBackward& norm, std::size_t begin, std::size_t end, float* dweight,
                              float* dbias) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel], fourth[block_numel];
    const float hidden = static_cast<float>(norm.hidden);
    for (std::size_t row = begin; row < end; ++row) {
        const std::size_t start = row * norm.hidden;
        RowSum values, scaled, squares, products;
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const s = load_block(norm.s, start + at, count, second);
            values.add(count, [s](auto get) { return get(s); });
        }
        Means means{values.total() / hidden, 0.0f, 0.0f, 0.0f};
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const dy = load_block(norm.dy, start + at, count, first);
            const float* const s = load_block(norm.s, start + at, count, second);
            const float* const scale = scale_block(norm.weight, 0.0f, at, count, third);
            const float mean = means.s;
            squares.add(count, [=](auto get) { return (get(s) - mean) * (get(s) - mean); });
            scaled.add(count, [=](auto get) { return get(dy) * get(scale); });
            products.add(count, [=](auto get) { return get(dy) * get(scale) * (get(s) - mean); });
        }
        means.root = 1.0f / std::sqrt(squares.total() / hidden + norm.eps);
        means.u = scaled.total() / hidden;
        means.un = products.total() / hidden * means.root;
        for (std::size_t at = 0; at < norm.hidden; at += block_numel) {
            const std::size_t count = block_at(at, norm.hidden);
            const float* const dy = load_block(norm.dy, start + at, count, first);
            const float* const s = load_block(norm.s, start + at, count, second);
            const float* const scale = scale_block(norm.weight, 0.0f, at, count, third);
            float* const ds = room_for(norm.ds, start + at, fourth);
            backward_block(dy, s, scale, ds, dweight + at, dbias + at, count, means);
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

ZCORE_IN_EACH_SET(void layer_norm_part(const LayerNorm&, std::size_t, std::size_t);
                  void layer_norm_backward_part(const LayerNormBackward&, std::size_t, std::size_t, float*, float*))

void layer_norm(const LayerNorm& norm, int threads) {
    const auto part = ZCORE_CHOOSE(layer_norm_part);
    parallel_for(norm.rows, row_grain(norm.hidden), threads,
                 [&](std::size_t begin, std::size_t end) { part(norm, begin, end); });
}

void layer_norm_backward(const LayerNormBackward& norm, int threads) {
    const auto part = ZCORE_CHOOSE(layer_norm_backward_part);
    ColumnSums dweight(norm.rows, norm.hidden), dbias(norm.rows, norm.hidden);
    parallel_for(norm.rows, dweight.grain(), threads, [&](std::size_t begin, std::size_t end) {
        part(norm, begin, end, dweight.part(begin), dbias.part(begin));
    });
    dweight.write(norm.dweight, threads);
    dbias.write(norm.dbias, threads);
}

}  // namespace zcore

#endif
