// zcore.kernels._cpu: the functions of native/ for Python. Addresses come in as integers, checked by the Python side, as
// that costs 0.24 us a call where DLPack costs 4. The interpreter lock is released while they run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "zcore/adagrad_step.hpp"
#include "zcore/adamw_step.hpp"
#include "zcore/instruction_set.hpp"
#include "zcore/lamb_step.hpp"
#include "zcore/lion_step.hpp"
#include "zcore/sgd_step.hpp"
#include "zcore/squared_norm.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Words = std::vector<std::uintptr_t>;  // one row of numel and addresses for each piece
using Types = std::vector<int>;             // of the columns after numel

float* floats(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

// A table of words and the types of its columns, row by row.
class Table {
public:
    Table(const Words& words, const Types& types) : words_(words), types_(types), width_(types.size() + 1) {}

    std::size_t size() const { return words_.size() / width_; }
    std::size_t numel(std::size_t row) const { return words_[row * width_]; }
    std::uintptr_t address(std::size_t row, std::size_t column) const { return words_[row * width_ + column + 1]; }
    zcore::Flat flat(std::size_t row, std::size_t column) const {
        return {reinterpret_cast<void*>(address(row, column)), static_cast<zcore::Type>(types_[column])};
    }

    template <typename Piece, typename Make>
    std::vector<Piece> pieces(Make make) const {
        std::vector<Piece> made;
        made.reserve(size());
        for (std::size_t row = 0; row < size(); ++row) {
            made.push_back(make(row));
        }
        return made;
    }

private:
    const Words& words_;
    const Types& types_;
    std::size_t width_;
};

template <typename Piece>
std::vector<Piece> two_states(const Words& words, const Types& types) {
    const Table table(words, types);
    return table.pieces<Piece>([&](std::size_t row) -> Piece {
        return {floats(table.address(row, 0)), table.flat(row, 1), table.flat(row, 2), table.flat(row, 3),
                table.flat(row, 4), table.numel(row)};
    });
}

template <typename Piece>
std::vector<Piece> one_state(const Words& words, const Types& types) {
    const Table table(words, types);
    return table.pieces<Piece>([&](std::size_t row) -> Piece {
        return {floats(table.address(row, 0)), table.flat(row, 1), table.flat(row, 2), table.flat(row, 3),
                table.numel(row)};
    });
}

float root(double square) { return static_cast<float>(std::sqrt(square)); }

void adamw_step(const Words& words, const Types& types, int threads, float lr, float beta1, float beta2, float eps,
                float weight_decay, double bias_correction1, double bias_correction2, float grad_factor,
                bool is_decoupled) {
    const zcore::AdamW hyper{lr, beta1, beta2, eps, weight_decay, static_cast<float>(bias_correction1),
                             root(bias_correction2), grad_factor, is_decoupled};
    zcore::adamw_step(two_states<zcore::AdamWPiece>(words, types), hyper, threads);
}

zcore::Lamb lamb(float lr, float beta1, float beta2, float eps, float weight_decay, double bias_correction1,
                 double bias_correction2, float grad_factor) {
    return {lr, beta1, beta2, eps, weight_decay, static_cast<float>(bias_correction1), root(bias_correction2),
            grad_factor};
}

std::vector<std::pair<double, double>> lamb_average(const Words& words, const Types& types, int threads, float beta1,
                                                    float beta2, float eps, float weight_decay,
                                                    double bias_correction1, double bias_correction2,
                                                    float grad_factor) {
    const zcore::Lamb hyper =
        lamb(0.0f, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2, grad_factor);
    std::vector<std::pair<double, double>> squares;
    for (const zcore::LambSquares& each :
         zcore::lamb_average(two_states<zcore::LambPiece>(words, types), hyper, threads)) {
        squares.emplace_back(each.param, each.update);
    }
    return squares;
}

void lamb_apply(const Words& words, const Types& types, const std::vector<float>& ratios, int threads, float lr,
                float eps, float weight_decay, double bias_correction1, double bias_correction2) {
    const zcore::Lamb hyper = lamb(lr, 0.0f, 0.0f, eps, weight_decay, bias_correction1, bias_correction2, 1.0f);
    zcore::lamb_apply(two_states<zcore::LambPiece>(words, types), ratios, hyper, threads);
}

void lion_step(const Words& words, const Types& types, int threads, float lr, float beta1, float beta2,
               float weight_decay, float grad_factor) {
    zcore::lion_step(one_state<zcore::LionPiece>(words, types), {lr, beta1, beta2, weight_decay, grad_factor}, threads);
}

void adagrad_step(const Words& words, const Types& types, int threads, float lr, float eps, float weight_decay,
                  float grad_factor) {
    zcore::adagrad_step(one_state<zcore::AdagradPiece>(words, types), {lr, eps, weight_decay, grad_factor}, threads);
}

void sgd_step(const Words& words, const Types& types, int threads, float lr, float momentum, float dampening,
              float weight_decay, bool is_nesterov, bool is_first, float grad_factor) {
    zcore::sgd_step(one_state<zcore::SgdPiece>(words, types),
                    {lr, momentum, dampening, weight_decay, is_nesterov, is_first, grad_factor}, threads);
}

double squared_norm(const Words& words, const Types& types, int threads) {
    const Table table(words, types);
    const auto pieces = table.pieces<zcore::NormPiece>([&](std::size_t row) -> zcore::NormPiece {
        return {table.flat(row, 0), table.numel(row)};
    });
    return zcore::squared_norm(pieces, threads);
}

}  // namespace

NB_MODULE(_cpu, module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    module.def("instruction_set", [] { return zcore::name_of(zcore::instruction_set()); });
    module.def("adamw_step", &adamw_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a,
               "grad_factor"_a, "is_decoupled"_a);
    module.def("lamb_average", &lamb_average, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "beta1"_a,
               "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a, "grad_factor"_a);
    module.def("lamb_apply", &lamb_apply, unlocked, "words"_a, "types"_a, "ratios"_a, "threads"_a, nb::kw_only(),
               "lr"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a);
    module.def("lion_step", &lion_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a, "beta1"_a,
               "beta2"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("adagrad_step", &adagrad_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "eps"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("sgd_step", &sgd_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "momentum"_a, "dampening"_a, "weight_decay"_a, "is_nesterov"_a, "is_first"_a, "grad_factor"_a);
    module.def("squared_norm", &squared_norm, unlocked, "words"_a, "types"_a, "threads"_a);
    bind_layers(module);
}
