// Optimizer steps and the norm of gradients on NVIDIA GPUs for Python, over tables of pieces, which `_cpu` reads. What
// a step takes from the device it has by address: 0 is none.
#include "cuda_steps.hpp"

#include <cmath>
#include <cstdint>

#include "step_pieces.hpp"
#include "zcore/cuda/squared_norm.hpp"
#include "zcore/cuda/steps.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <typename T>
T* at(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

zcore::cuda::Stream stream_of(std::uintptr_t number) { return reinterpret_cast<zcore::cuda::Stream>(number); }

void adamw_step(const Table& table, std::uintptr_t stream, std::uintptr_t clip_factor, double lr, double beta1,
                double beta2, double eps, double weight_decay, double bias_correction1, double bias_correction2,
                double grad_factor, bool is_decoupled) {
    const zcore::AdamW hyper{lr, beta1, beta2, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2),
                             grad_factor, is_decoupled};
    zcore::cuda::adamw_step(adamw_pieces(table), hyper, at<float>(clip_factor), stream_of(stream));
}

void lamb_average(const Table& table, std::uintptr_t stream, std::uintptr_t clip_factor, std::uintptr_t scratch,
                  std::uintptr_t squares, double beta1, double beta2, double eps, double weight_decay,
                  double bias_correction1, double bias_correction2, double grad_factor) {
    const zcore::Lamb hyper{0.0, beta1, beta2, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2),
                            grad_factor};
    zcore::cuda::lamb_average(lamb_average_pieces(table), hyper, at<float>(clip_factor), at<double>(scratch),
                              at<double>(squares), stream_of(stream));
}

void lamb_apply(const Table& table, std::uintptr_t stream, std::uintptr_t ratios, double lr, double eps,
                double weight_decay, double bias_correction1, double bias_correction2) {
    const zcore::Lamb hyper{lr, 0.0, 0.0, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2)};
    zcore::cuda::lamb_apply(lamb_apply_pieces(table), at<double>(ratios), hyper, stream_of(stream));
}

void lion_step(const Table& table, std::uintptr_t stream, std::uintptr_t clip_factor, double lr, double beta1,
               double beta2, double weight_decay, double grad_factor) {
    zcore::cuda::lion_step(one_state_pieces<zcore::LionPiece>(table), {lr, beta1, beta2, weight_decay, grad_factor},
                           at<float>(clip_factor), stream_of(stream));
}

void adagrad_step(const Table& table, std::uintptr_t stream, std::uintptr_t clip_factor, double lr, double eps,
                  double weight_decay, double grad_factor) {
    zcore::cuda::adagrad_step(one_state_pieces<zcore::AdagradPiece>(table), {lr, eps, weight_decay, grad_factor},
                              at<float>(clip_factor), stream_of(stream));
}

void sgd_step(const Table& table, std::uintptr_t stream, std::uintptr_t clip_factor, double lr, double momentum,
              double dampening, double weight_decay, bool is_nesterov, bool is_first, double grad_factor) {
    zcore::cuda::sgd_step(one_state_pieces<zcore::SgdPiece>(table),
                          {lr, momentum, dampening, weight_decay, is_nesterov, is_first, grad_factor},
                          at<float>(clip_factor), stream_of(stream));
}

std::size_t num_partial_sums(const Table& table) {
    std::size_t total = 0;
    for (std::size_t row = 0; row < table.size(); ++row) {
        total += zcore::cuda::num_partial_sums(table.numel(row));
    }
    return total;
}

void squared_norm(const Table& table, std::uintptr_t stream, std::uintptr_t scratch, std::uintptr_t total) {
    zcore::cuda::squared_norm(norm_pieces(table).at(0), at<double>(scratch), at<float>(total), stream_of(stream));
}

}  // namespace

void bind_cuda_steps(nb::module_& module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    module.def("adamw_step", &adamw_step, unlocked, "table"_a, "stream"_a, nb::kw_only(), "clip_factor"_a, "lr"_a,
               "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a,
               "grad_factor"_a, "is_decoupled"_a);
    module.def("lamb_average", &lamb_average, unlocked, "table"_a, "stream"_a, nb::kw_only(), "clip_factor"_a,
               "scratch"_a, "result"_a, "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a,
               "bias_correction2"_a, "grad_factor"_a);
    module.def("lamb_apply", &lamb_apply, unlocked, "table"_a, "stream"_a, nb::kw_only(), "ratios"_a, "lr"_a, "eps"_a,
               "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a);
    module.def("lion_step", &lion_step, unlocked, "table"_a, "stream"_a, nb::kw_only(), "clip_factor"_a, "lr"_a,
               "beta1"_a, "beta2"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("adagrad_step", &adagrad_step, unlocked, "table"_a, "stream"_a, nb::kw_only(), "clip_factor"_a, "lr"_a,
               "eps"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("sgd_step", &sgd_step, unlocked, "table"_a, "stream"_a, nb::kw_only(), "clip_factor"_a, "lr"_a,
               "momentum"_a, "dampening"_a, "weight_decay"_a, "is_nesterov"_a, "is_first"_a, "grad_factor"_a);
    module.def("num_partial_sums", &num_partial_sums, "table"_a);
    module.def("squared_norm", &squared_norm, unlocked, "table"_a, "stream"_a, nb::kw_only(), "scratch"_a, "result"_a);
}
