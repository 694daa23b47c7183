#include "zcore/bias_gelu.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/gelu.hpp"
#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

static const float* bias_block(Flat bias, std::size_t at, std::size_t count, float* buffer) {
    if (bias) {
        return load_block(bias, at, count, buffer);
    }
    for (std::size_t each = 0; each < count; ++each) {
        buffer[each] = -0.0f;  // the number that changes no other, nor zero's sign, when added
    }
    return buffer;
}

template <typename Activation>
static void activate_block(const float* ZCORE_RESTRICT x, const float* ZCORE_RESTRICT bias, float* ZCORE_RESTRICT out,
                           std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        out[at] = Activation::value(x[at] + bias[at]);
    }
}

template <typename Activation>
static void backward_block(const float* ZCORE_RESTRICT dout, const float* ZCORE_RESTRICT x,
                           const float* ZCORE_RESTRICT bias, float* ZCORE_RESTRICT dx, float* ZCORE_RESTRICT dbias,
                           std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        const float gradient = dout[at] * Activation::slope(x[at] + bias[at]);
        dx[at] = gradient;
        dbias[at] += gradient;
    }
}

void bias_gelu_part(const BiasGelu& op, Gelu form, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel];
    for (std::size_t row = begin; row < end; ++row) {
        for (std::size_t at = 0; at < op.hidden; at += block_numel) {
            const std::size_t count = block_at(at, op.hidden), from = row * op.hidden + at;
            const float* const x = load_block(op.x, from, count, first);
            const float* const bias = bias_block(op.bias, at, count, second);
            float* const out = room_for(op.out, from, third);
            form == Gelu::erf ? activate_block<GeluErf>(x, bias, out, count)
                              : activate_block<GeluTanh>(x, bias, out, count);
            store_block(op.out, from, count, out);
        }
    }
}

void bias_gelu_backward_part(const BiasGeluBackward& op, Gelu form, std::size_t begin, std::size_t end, float* dbias) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel], fourth[block_numel];
    for (std::size_t row = begin; row < end; ++row) {
        for (std::size_t at = 0; at < op.hidden; at += block_numel) {
            const std::size_t count = block_at(at, op.hidden), from = row * op.hidden + at;
            const float* const dout = load_block(op.dout, from, count, first);
            const float* const x = load_block(op.x, from, count, second);
            const float* const bias = bias_block(op.bias, at, count, third);
            float* const dx = room_for(op.dx, from, fourth);
            form == Gelu::erf ? backward_block<GeluErf>(dout, x, bias, dx, dbias + at, count)
                              : backward_block<GeluTanh>(dout, x, bias, dx, dbias + at, count);
            store_block(op.dx, from, count, dx);
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void bias_gelu_part(const BiasGelu&, Gelu, std::size_t, std::size_t);
                  void bias_gelu_backward_part(const BiasGeluBackward&, Gelu, std::size_t, std::size_t, float*))

void bias_gelu(const BiasGelu& op, Gelu form, int threads) {
    const auto part = ZCORE_CHOOSE(bias_gelu_part);
    parallel_for(op.rows, row_grain(op.hidden), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, form, begin, end); });
}

void bias_gelu_backward(const BiasGeluBackward& op, Gelu form, int threads) {
    const auto part = ZCORE_CHOOSE(bias_gelu_backward_part);
    ColumnSums dbias(op.rows, op.hidden);
    parallel_for(op.rows, dbias.grain(), threads,
                 [&](std::size_t begin, std::size_t end) { part(op, form, begin, end, dbias.part(begin)); });
    dbias.write(op.dbias, threads);
}

}  // namespace zcore

#endif
