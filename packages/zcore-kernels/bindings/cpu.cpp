// zcore.kernels._cpu: the functions of native/ for Python. Addresses come in as integers, checked by the Python side, as
// that costs 0.24 us a call where DLPack costs 4. The interpreter lock is released while they run.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "zcore/adagrad_step.hpp"
#include "zcore/adamw_step.hpp"
#include "zcore/dequantize_blockwise.hpp"
#include "zcore/dequantize_reduce_requantize.hpp"
#include "zcore/instruction_set.hpp"
#include "zcore/lamb_step.hpp"
#include "zcore/lion_step.hpp"
#include "zcore/pack_signs.hpp"
#include "zcore/quantize_blockwise.hpp"
#include "zcore/round_stochastic.hpp"
#include "zcore/round_with_noise.hpp"
#include "zcore/sgd_step.hpp"
#include "zcore/squared_norm.hpp"
#include "zcore/unpack_signs.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Words = std::vector<std::uintptr_t>;  // one row of numel and addresses for each piece
using Types = std::vector<int>;             // of the columns after numel

// A table of words and the types of its columns, row by row.
class Table {
public:
    Table(const Words& words, const Types& types) : words_(words), types_(types), width_(types.size() + 1) {}

    std::size_t size() const { return words_.size() / width_; }
    std::size_t numel(std::size_t row) const { return words_[row * width_]; }
    zcore::Flat flat(std::size_t row, std::size_t column) const {
        return {memory<void>(row, column), static_cast<zcore::Type>(types_[column])};
    }
    zcore::Flat flat(std::size_t row, std::size_t column, std::size_t scales) const {
        return {memory<void>(row, column), static_cast<zcore::Type>(types_[column]), memory<float>(row, scales)};
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
    template <typename T>
    T* memory(std::size_t row, std::size_t column) const {
        return reinterpret_cast<T*>(words_[row * width_ + column + 1]);
    }

    const Words& words_;
    const Types& types_;
    std::size_t width_;
};

// Columns: param, grad, state, copy, the scales of the state.
template <typename Piece>
std::vector<Piece> one_state(const Words& words, const Types& types) {
    const Table table(words, types);
    return table.pieces<Piece>([&](std::size_t row) -> Piece {
        return {table.flat(row, 0), table.flat(row, 1), table.flat(row, 2, 4), table.flat(row, 3), table.numel(row)};
    });
}

void adamw_step(const Words& words, const Types& types, int threads, double lr, double beta1, double beta2, double eps,
                double weight_decay, double bias_correction1, double bias_correction2, double grad_factor,
                bool is_decoupled) {
    const zcore::AdamW hyper{lr, beta1, beta2, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2),
                             grad_factor, is_decoupled};
    const Table table(words, types);  // param, grad, two states, copy, the scales of the states
    const auto pieces = table.pieces<zcore::AdamWPiece>([&](std::size_t row) -> zcore::AdamWPiece {
        return {table.flat(row, 0),    table.flat(row, 1), table.flat(row, 2, 5),
                table.flat(row, 3, 6), table.flat(row, 4), table.numel(row)};
    });
    zcore::adamw_step(pieces, hyper, threads);
}

std::vector<std::pair<double, double>> lamb_average(const Words& words, const Types& types, int threads, double beta1,
                                                    double beta2, double eps, double weight_decay,
                                                    double bias_correction1, double bias_correction2,
                                                    double grad_factor) {
    const zcore::Lamb hyper{0.0, beta1, beta2, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2),
                            grad_factor};
    const Table table(words, types);  // param, grad, two states, the scales of the states
    const auto pieces = table.pieces<zcore::LambPiece>([&](std::size_t row) -> zcore::LambPiece {
        return {table.flat(row, 0),    table.flat(row, 1), table.flat(row, 2, 4),
                table.flat(row, 3, 5), {},                 table.numel(row)};
    });
    std::vector<std::pair<double, double>> squares;
    for (const zcore::LambSquares& each : zcore::lamb_average(pieces, hyper, threads)) {
        squares.emplace_back(each.param, each.update);
    }
    return squares;
}

void lamb_apply(const Words& words, const Types& types, int threads, const std::vector<double>& ratios, double lr,
                double eps, double weight_decay, double bias_correction1, double bias_correction2) {
    const Table table(words, types);  // param, two states, copy, the scales of the states
    const auto pieces = table.pieces<zcore::LambPiece>([&](std::size_t row) -> zcore::LambPiece {
        return {table.flat(row, 0),    {},                 table.flat(row, 1, 4),
                table.flat(row, 2, 5), table.flat(row, 3), table.numel(row)};
    });
    if (ratios.size() != pieces.size()) {
        throw std::invalid_argument("lamb_apply got " + std::to_string(pieces.size()) + " params and " +
                                    std::to_string(ratios.size()) + " ratios; expected one for each.");
    }
    const zcore::Lamb hyper{lr, 0.0, 0.0, eps, weight_decay, bias_correction1, std::sqrt(bias_correction2)};
    zcore::lamb_apply(pieces, ratios, hyper, threads);
}

void lion_step(const Words& words, const Types& types, int threads, double lr, double beta1, double beta2,
               double weight_decay, double grad_factor) {
    zcore::lion_step(one_state<zcore::LionPiece>(words, types), {lr, beta1, beta2, weight_decay, grad_factor}, threads);
}

void adagrad_step(const Words& words, const Types& types, int threads, double lr, double eps, double weight_decay,
                  double grad_factor) {
    zcore::adagrad_step(one_state<zcore::AdagradPiece>(words, types), {lr, eps, weight_decay, grad_factor}, threads);
}

void sgd_step(const Words& words, const Types& types, int threads, double lr, double momentum, double dampening,
              double weight_decay, bool is_nesterov, bool is_first, double grad_factor) {
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

template <typename Element>
Element* pointer(std::uintptr_t address) { return reinterpret_cast<Element*>(address); }

zcore::Flat flat(std::uintptr_t address, int type) { return {pointer<void>(address), static_cast<zcore::Type>(type)}; }

// Addresses of codes, scales and zero points, the last 0 where blocks are symmetric.
zcore::Quantized quantized(const Words& words, std::size_t first = 0) {
    return {pointer<void>(words[first]), pointer<float>(words[first + 1]), pointer<std::int8_t>(words[first + 2])};
}

void quantize_blockwise(std::uintptr_t values, int type, const Words& out, int threads, std::size_t numel,
                        std::size_t block_size, int format, bool is_stochastic, std::uint64_t seed,
                        std::uint64_t offset) {
    zcore::quantize_blockwise(flat(values, type), quantized(out),
                              {numel, block_size, static_cast<zcore::Format>(format)}, {is_stochastic, seed, offset},
                              threads);
}

void dequantize_blockwise(const Words& from, std::uintptr_t out, int type, int threads, std::size_t numel,
                          std::size_t block_size, int format) {
    zcore::dequantize_blockwise(quantized(from), {numel, block_size, static_cast<zcore::Format>(format)},
                                flat(out, type), threads);
}

void dequantize_reduce_requantize(const Words& shards, const Words& out, int threads, float factor, std::size_t numel,
                                  std::size_t block_size, int format, bool is_stochastic, std::uint64_t seed,
                                  std::uint64_t offset) {
    std::vector<zcore::Quantized> each;
    for (std::size_t first = 0; first + 3 <= shards.size(); first += 3) {
        each.push_back(quantized(shards, first));
    }
    zcore::dequantize_reduce_requantize(each, factor, quantized(out),
                                        {numel, block_size, static_cast<zcore::Format>(format)},
                                        {is_stochastic, seed, offset}, threads);
}

void pack_signs(std::uintptr_t values, int type, std::uintptr_t error, std::uintptr_t signs, std::uintptr_t scales,
                int threads, std::size_t numel, std::size_t block_size) {
    zcore::pack_signs(flat(values, type), pointer<float>(error), pointer<std::uint8_t>(signs), pointer<float>(scales),
                      {numel, block_size}, threads);
}

void unpack_signs(std::uintptr_t signs, std::uintptr_t scales, std::uintptr_t out, int type, int threads,
                  std::size_t numel, std::size_t block_size) {
    zcore::unpack_signs(pointer<std::uint8_t>(signs), pointer<float>(scales), {numel, block_size}, flat(out, type), threads);
}

void round_stochastic(std::uintptr_t values, std::uintptr_t out, int threads, std::size_t numel, std::uint64_t seed,
                      std::uint64_t offset) {
    zcore::round_stochastic(pointer<float>(values), pointer<std::uint16_t>(out), numel, seed, offset, threads);
}

void round_with_noise(std::uintptr_t values, std::uintptr_t noise, std::uintptr_t out, int threads,
                      std::size_t numel) {
    zcore::round_with_noise(pointer<float>(values), pointer<std::int32_t>(noise), pointer<std::uint16_t>(out), numel, threads);
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
    module.def("lamb_apply", &lamb_apply, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(),
               "ratios"_a, "lr"_a, "eps"_a, "weight_decay"_a, "bias_correction1"_a, "bias_correction2"_a);
    module.def("lion_step", &lion_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a, "beta1"_a,
               "beta2"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("adagrad_step", &adagrad_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "eps"_a, "weight_decay"_a, "grad_factor"_a);
    module.def("sgd_step", &sgd_step, unlocked, "words"_a, "types"_a, "threads"_a, nb::kw_only(), "lr"_a,
               "momentum"_a, "dampening"_a, "weight_decay"_a, "is_nesterov"_a, "is_first"_a, "grad_factor"_a);
    module.def("squared_norm", &squared_norm, unlocked, "words"_a, "types"_a, "threads"_a);
    module.attr("LARGEST_BLOCK_SIZE") = zcore::largest_block_size;
    module.def("quantize_blockwise", &quantize_blockwise, unlocked, "values"_a, "type"_a, "out"_a, "threads"_a,
               nb::kw_only(), "numel"_a, "block_size"_a, "format"_a, "is_stochastic"_a, "seed"_a, "offset"_a);
    module.def("dequantize_blockwise", &dequantize_blockwise, unlocked, "quantized"_a, "out"_a, "type"_a, "threads"_a,
               nb::kw_only(), "numel"_a, "block_size"_a, "format"_a);
    module.def("dequantize_reduce_requantize", &dequantize_reduce_requantize, unlocked, "shards"_a, "out"_a,
               "threads"_a, nb::kw_only(), "factor"_a, "numel"_a, "block_size"_a, "format"_a, "is_stochastic"_a,
               "seed"_a, "offset"_a);
    module.def("pack_signs", &pack_signs, unlocked, "values"_a, "type"_a, "error"_a, "signs"_a, "scales"_a,
               "threads"_a, nb::kw_only(), "numel"_a, "block_size"_a);
    module.def("unpack_signs", &unpack_signs, unlocked, "signs"_a, "scales"_a, "out"_a, "type"_a, "threads"_a,
               nb::kw_only(), "numel"_a, "block_size"_a);
    module.def("round_stochastic", &round_stochastic, unlocked, "values"_a, "out"_a, "threads"_a, nb::kw_only(),
               "numel"_a, "seed"_a, "offset"_a);
    module.def("round_with_noise", &round_with_noise, unlocked, "values"_a, "noise"_a, "out"_a, "threads"_a,
               nb::kw_only(), "numel"_a);
    bind_layers(module);
}
