// Norms and other functions of layers for Python. A tensor comes in as (address, type), (0, 0) where there is none,
// checked by the Python side. The interpreter lock is released while they run.
#include "layers.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <cstdint>
#include <tuple>
#include <utility>

#include "zcore/bias_dropout_residual.hpp"
#include "zcore/bias_gelu.hpp"
#include "zcore/geglu.hpp"
#include "zcore/layer_norm.hpp"
#include "zcore/rms_norm.hpp"
#include "zcore/rotary.hpp"
#include "zcore/swiglu.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Operand = std::pair<std::uintptr_t, int>;

zcore::Flat flat(const Operand& operand) {
    return {reinterpret_cast<void*>(operand.first), static_cast<zcore::Type>(operand.second)};
}

void rms_norm(Operand x, Operand residual, Operand weight, Operand sum, Operand y, std::size_t rows, std::size_t hidden,
              float eps, float offset, int threads) {
    zcore::rms_norm({flat(x), flat(residual), flat(weight), flat(sum), flat(y), rows, hidden, eps, offset}, threads);
}

void rms_norm_backward(Operand dy, Operand s, Operand weight, Operand dsum, Operand ds, Operand dweight,
                       std::size_t rows, std::size_t hidden, float eps, float offset, int threads) {
    zcore::rms_norm_backward(
        {flat(dy), flat(s), flat(weight), flat(dsum), flat(ds), flat(dweight), rows, hidden, eps, offset}, threads);
}

void layer_norm(Operand x, Operand residual, Operand weight, Operand bias, Operand sum, Operand y, std::size_t rows,
                std::size_t hidden, float eps, int threads) {
    zcore::layer_norm({flat(x), flat(residual), flat(weight), flat(bias), flat(sum), flat(y), rows, hidden, eps},
                      threads);
}

void layer_norm_backward(Operand dy, Operand s, Operand weight, Operand dsum, Operand ds, Operand dweight,
                         Operand dbias, std::size_t rows, std::size_t hidden, float eps, int threads) {
    zcore::layer_norm_backward(
        {flat(dy), flat(s), flat(weight), flat(dsum), flat(ds), flat(dweight), flat(dbias), rows, hidden, eps},
        threads);
}

// An operand of a gated linear unit: tensor, stride of rows, first column.
using Part = std::tuple<std::uintptr_t, int, std::size_t, std::size_t>;

zcore::Columns columns(const Part& part) {
    const auto& [address, type, stride, shift] = part;
    return {flat({address, type}), stride, shift};
}

// form: of GELU, as zcore::Gelu counts them; -1 is SiLU.
void glu(Part gate, Part up, Part out, std::size_t rows, std::size_t hidden, int form, int threads) {
    const zcore::Glu op{columns(gate), columns(up), columns(out), rows, hidden};
    form < 0 ? zcore::swiglu(op, threads) : zcore::geglu(op, static_cast<zcore::Gelu>(form), threads);
}

void glu_backward(Part dout, Part gate, Part up, Part dgate, Part dup, std::size_t rows, std::size_t hidden, int form,
                  int threads) {
    const zcore::GluBackward op{columns(dout), columns(gate), columns(up), columns(dgate), columns(dup), rows, hidden};
    form < 0 ? zcore::swiglu_backward(op, threads) : zcore::geglu_backward(op, static_cast<zcore::Gelu>(form), threads);
}

void bias_gelu(Operand x, Operand bias, Operand out, std::size_t rows, std::size_t hidden, int form, int threads) {
    zcore::bias_gelu({flat(x), flat(bias), flat(out), rows, hidden}, static_cast<zcore::Gelu>(form), threads);
}

void bias_gelu_backward(Operand dout, Operand x, Operand bias, Operand dx, Operand dbias, std::size_t rows,
                        std::size_t hidden, int form, int threads) {
    zcore::bias_gelu_backward({flat(dout), flat(x), flat(bias), flat(dx), flat(dbias), rows, hidden},
                              static_cast<zcore::Gelu>(form), threads);
}

void rotary(Operand x, Operand y, Operand cos, Operand sin, std::uintptr_t position, std::size_t tokens,
            std::size_t heads, std::size_t dim, std::size_t width, bool is_interleaved, bool is_backward, int threads) {
    zcore::rotary({flat(x), flat(y), flat(cos), flat(sin), reinterpret_cast<const std::int64_t*>(position), tokens,
                   heads, dim, width, is_interleaved, is_backward},
                  threads);
}

void bias_dropout_residual(Operand x, Operand bias, Operand residual, Operand out, std::size_t rows, std::size_t hidden,
                           double drop, std::uint64_t seed, int threads) {
    zcore::bias_dropout_residual({flat(x), flat(bias), flat(residual), flat(out), rows, hidden, drop, seed}, threads);
}

void bias_dropout_residual_backward(Operand dout, Operand dx, Operand dbias, std::size_t rows, std::size_t hidden,
                                    double drop, std::uint64_t seed, int threads) {
    zcore::bias_dropout_residual_backward({flat(dout), flat(dx), flat(dbias), rows, hidden, drop, seed}, threads);
}

}  // namespace

void bind_layers(nb::module_& module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    module.def("rms_norm", &rms_norm, unlocked, "x"_a, "residual"_a, "weight"_a, "sum"_a, "y"_a, "rows"_a, "hidden"_a,
               "eps"_a, "offset"_a, "threads"_a);
    module.def("rms_norm_backward", &rms_norm_backward, unlocked, "dy"_a, "s"_a, "weight"_a, "dsum"_a, "ds"_a,
               "dweight"_a, "rows"_a, "hidden"_a, "eps"_a, "offset"_a, "threads"_a);
    module.def("layer_norm", &layer_norm, unlocked, "x"_a, "residual"_a, "weight"_a, "bias"_a, "sum"_a, "y"_a,
               "rows"_a, "hidden"_a, "eps"_a, "threads"_a);
    module.def("layer_norm_backward", &layer_norm_backward, unlocked, "dy"_a, "s"_a, "weight"_a, "dsum"_a, "ds"_a,
               "dweight"_a, "dbias"_a, "rows"_a, "hidden"_a, "eps"_a, "threads"_a);
    module.def("glu", &glu, unlocked, "gate"_a, "up"_a, "out"_a, "rows"_a, "hidden"_a, "form"_a, "threads"_a);
    module.def("glu_backward", &glu_backward, unlocked, "dout"_a, "gate"_a, "up"_a, "dgate"_a, "dup"_a, "rows"_a,
               "hidden"_a, "form"_a, "threads"_a);
    module.def("bias_gelu", &bias_gelu, unlocked, "x"_a, "bias"_a, "out"_a, "rows"_a, "hidden"_a, "form"_a,
               "threads"_a);
    module.def("bias_gelu_backward", &bias_gelu_backward, unlocked, "dout"_a, "x"_a, "bias"_a, "dx"_a, "dbias"_a,
               "rows"_a, "hidden"_a, "form"_a, "threads"_a);
    module.def("rotary", &rotary, unlocked, "x"_a, "y"_a, "cos"_a, "sin"_a, "position"_a, "tokens"_a, "heads"_a,
               "dim"_a, "width"_a, "is_interleaved"_a, "is_backward"_a, "threads"_a);
    module.def("bias_dropout_residual", &bias_dropout_residual, unlocked, "x"_a, "bias"_a, "residual"_a, "out"_a,
               "rows"_a, "hidden"_a, "drop"_a, "seed"_a, "threads"_a);
    module.def("bias_dropout_residual_backward", &bias_dropout_residual_backward, unlocked, "dout"_a, "dx"_a, "dbias"_a,
               "rows"_a, "hidden"_a, "drop"_a, "seed"_a, "threads"_a);
}
