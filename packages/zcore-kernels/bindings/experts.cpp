// The gate of experts, and rows sorted by expert, for Python. A tensor comes in as (address, type), (0, 0) where there
// is none, or as an address where it has one type; checked by the Python side. The interpreter lock is released while
// they run.
#include "experts.hpp"

#include <nanobind/stl/pair.h>

#include <cstdint>
#include <utility>

#include "zcore/permute.hpp"
#include "zcore/topk_gate.hpp"
#include "zcore/unpermute.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Operand = std::pair<std::uintptr_t, int>;
using Address = std::uintptr_t;

zcore::Flat flat(const Operand& operand) {
    return {reinterpret_cast<void*>(operand.first), static_cast<zcore::Type>(operand.second)};
}

std::int64_t* integers(Address address) { return reinterpret_cast<std::int64_t*>(address); }
float* floats(Address address) { return reinterpret_cast<float*>(address); }

void topk_gate(Operand logits, Operand bias, Address weights, Address experts, std::size_t tokens,
               std::size_t num_experts, std::size_t k, int scoring, bool is_normalised, int threads) {
    zcore::topk_gate({flat(logits), flat(bias), floats(weights), integers(experts), tokens, num_experts, k,
                      static_cast<zcore::Scoring>(scoring), is_normalised},
                     threads);
}

void topk_gate_backward(Address dweights, Operand logits, Address weights, Address experts, Operand dlogits,
                        std::size_t tokens, std::size_t num_experts, std::size_t k, int scoring, bool is_normalised,
                        int threads) {
    zcore::topk_gate_backward({floats(dweights), flat(logits), floats(weights), integers(experts), flat(dlogits),
                               tokens, num_experts, k, static_cast<zcore::Scoring>(scoring), is_normalised},
                              threads);
}

void permute(Operand x, Address experts, Operand rows, Address counts, Address places, std::size_t tokens,
             std::size_t hidden, std::size_t k, std::size_t num_experts, int threads) {
    zcore::permute({flat(x), integers(experts), flat(rows), integers(counts), integers(places), tokens, hidden, k,
                    num_experts},
                   threads);
}

bool is_permutation(Address places, std::size_t count) { return zcore::is_permutation(integers(places), count); }

void unpermute(Operand rows, Address places, Operand weights, Operand out, std::size_t tokens, std::size_t hidden,
               std::size_t k, int threads) {
    zcore::unpermute({flat(rows), integers(places), flat(weights), flat(out), tokens, hidden, k}, threads);
}

void unpermute_backward(Operand dout, Operand rows, Address places, Operand weights, Operand drows, Operand dweights,
                        std::size_t tokens, std::size_t hidden, std::size_t k, int threads) {
    zcore::unpermute_backward({flat(dout), flat(rows), integers(places), flat(weights), flat(drows), flat(dweights),
                               tokens, hidden, k},
                              threads);
}

}  // namespace

void bind_experts(nb::module_& module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
    module.def("topk_gate", &topk_gate, unlocked, "logits"_a, "bias"_a, "weights"_a, "experts"_a, "tokens"_a,
               "num_experts"_a, "k"_a, "scoring"_a, "is_normalised"_a, "threads"_a);
    module.def("topk_gate_backward", &topk_gate_backward, unlocked, "dweights"_a, "logits"_a, "weights"_a, "experts"_a,
               "dlogits"_a, "tokens"_a, "num_experts"_a, "k"_a, "scoring"_a, "is_normalised"_a, "threads"_a);
    module.def("permute", &permute, unlocked, "x"_a, "experts"_a, "rows"_a, "counts"_a, "places"_a, "tokens"_a,
               "hidden"_a, "k"_a, "num_experts"_a, "threads"_a);
    module.def("is_permutation", &is_permutation, unlocked, "places"_a, "count"_a);
    module.def("unpermute", &unpermute, unlocked, "rows"_a, "places"_a, "weights"_a, "out"_a, "tokens"_a, "hidden"_a,
               "k"_a, "threads"_a);
    module.def("unpermute_backward", &unpermute_backward, unlocked, "dout"_a, "rows"_a, "places"_a, "weights"_a,
               "drows"_a, "dweights"_a, "tokens"_a, "hidden"_a, "k"_a, "threads"_a);
}
