// Optimizer steps and the norm of gradients for Python, over tables of pieces. The interpreter lock is released while
// they run.
#include "steps.hpp"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "step_pieces.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

void adamw_step(const Table& table, int threads, double lr, double beta1, double beta2, double eps,
                double weight_decay, double bias_correction1, double bias_correction2, double grad_factor,
                bool is_decoupled) {
    const zcore::AdamW hyper{lr, beta1, beta2, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2),
                             grad_factor, is_decoupled};
    zcore::adamw_step(adamw_pieces(table), hyper, threads);
}

std::vector<std::pair<double, double>> lamb_average(const Table& table, int threads, double beta1,
                                                    double beta2, double eps, double weight_decay,
                                                    double bias_correction1, double bias_correction2,
                                                    double grad_factor) {
    const zcore::Lamb hyper{0.0, beta1, beta2, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2),
                            grad_factor};
    std::vector<std::pair<double, double>> squares;
    for (const zcore::LambSquares& each : zcore::lamb_average(lamb_average_pieces(table), hyper, threads)) {
        squares.emplace_back(each.param, each.update);
    }
    return squares;
}

void lamb_apply(const Table& table, int threads, const std::vector<double>& ratios, double lr,
                double eps, double weight_decay, double bias_correction1, double bias_correction2) {
    const auto pieces = lamb_apply_pieces(table);
    if (ratios.size() != pieces.size()) {
        throw std::invalid_argument("lamb_apply got " + std::to_string(pieces.size()) + " params and " +
                                    std::to_string(ratios.size()) + " ratios; expected one for each.");
    }
    const zcore::Lamb hyper{lr, 0.0, 0.0, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2)};
    zcore::lamb_apply(pieces, ratios, hyper, threads);
}

void lion_step(const Table& table, int threads, double lr, double beta1, double beta2,
               double weight_decay, double grad_factor) {
    zcore::lion_step(one_state_pieces<zcore::LionPiece>(table), {lr, beta1, beta2, weight_decay, grad_factor}, threads);
}

void adagrad_step(const Table& table, int threads, double lr, double eps, double weight_decay,
                  double grad_factor) {
    zcore::adagrad_step(one_state_pieces<zcore::AdagradPiece>(table), {lr, eps, weight_decay, grad_factor}, threads);
}

void sgd_step(const Table& table, int threads, double lr, double momentum, double dampening,
              double weight_decay, bool is_nesterov, bool is_first, double grad_factor) {
    zcore::sgd_step(one_state_pieces<zcore::SgdPiece>(table),
                    {lr, momentum, dampening, weight_decay, is_nesterov, is_first, grad_factor}, threads);
}

double squared_norm(const Table& table, int threads) {
    return zcore::squared_norm(norm_pieces(table), threads);
}

}  // namespace

void bind_steps(nb::module_& module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    module.def("adamw_step", &adamw_step, unlocked, "table"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a,
               "grad_factor"_a, "is_decoupled"_a);
    module.def("lamb_average", &lamb_average, unlocked, "table"_a, "threads"_a, nb::kw_only(), "beta1"_a,
               "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a, "grad_factor"_a);
    module.def("lamb_apply", &lamb_apply, unlocked, "table"_a, "threads"_a, nb::kw_only(),
               "ratios"_a, "lr"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a);
    module.def("lion_step", &lion_step, unlocked, "table"_a, "threads"_a, nb::kw_only(), "lr"_a, "beta1"_a,
               "beta2"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("adagrad_step", &adagrad_step, unlocked, "table"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "eps"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("sgd_step", &sgd_step, unlocked, "table"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "momentum"_a, "dampening"_a, "weight_decay"_a, "is_nesterov"_a, "is_first"_a, "grad_factor"_a);
    module.def("squared_norm", &squared_norm, unlocked, "table"_a, "threads"_a);
}
