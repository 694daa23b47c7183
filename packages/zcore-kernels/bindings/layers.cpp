// Norms and other functions of layers for Python. A tensor comes in as (address, type), (0, 0) where there is none,
// checked by the Python side. The interpreter lock is released while they run.
#include "layers.hpp"

#include <nanobind/stl/pair.h>

#include <cstdint>
#include <utility>

#include "zcore/layer_norm.hpp"
#include "zcore/rms_norm.hpp"

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
}
