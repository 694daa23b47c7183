// Quantisers, signs and roundings for Python. Addresses come in as integers, checked by the Python side. The interpreter
// lock is released while they run.
#include "blocks.hpp"

#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "zcore/dequantize_blockwise.hpp"
#include "zcore/dequantize_reduce_requantize.hpp"
#include "zcore/pack_signs.hpp"
#include "zcore/quantize_blockwise.hpp"
#include "zcore/round_stochastic.hpp"
#include "zcore/round_with_noise.hpp"
#include "zcore/unpack_signs.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Words = std::vector<std::uintptr_t>;  // addresses

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

void bind_blocks(nb::module_& module) {
    const nb::call_guard<nb::gil_scoped_release> unlocked;
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
}
