// Quantisers, signs and roundings for Python, of the CPU and of CUDA: the same functions, on so many threads or on a
// stream. Addresses come in as integers, checked by the Python side. The interpreter lock is released while they run.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "zcore/flat.hpp"
#include "zcore/pack_signs.hpp"
#include "zcore/quantized.hpp"

namespace block_functions {

using Words = std::vector<std::uintptr_t>;  // addresses

template <typename Element>
Element* pointer(std::uintptr_t address) { return reinterpret_cast<Element*>(address); }

inline zcore::Flat flat(std::uintptr_t address, int type) {
    return {pointer<void>(address), static_cast<zcore::Type>(type)};
}

// Addresses of codes, scales and zero points, the last 0 where blocks are symmetric.
inline zcore::Quantized quantized(const Words& words, std::size_t first = 0) {
    return {pointer<void>(words[first]), pointer<float>(words[first + 1]), pointer<std::int8_t>(words[first + 2])};
}

inline zcore::QuantizedLayout layout(std::size_t numel, std::size_t block_size, int format) {
    return {numel, block_size, static_cast<zcore::Format>(format)};
}

// `Ops` has the functions of native/, and what they run on as `lane` of a Number.
template <typename Ops>
struct Functions {
    using Lane = typename Ops::Number;

    static void quantize_blockwise(std::uintptr_t values, int type, const Words& out, Lane lane, std::size_t numel,
                                   std::size_t block_size, int format, bool is_stochastic, std::uint64_t seed,
                                   std::uint64_t offset) {
        Ops::quantize_blockwise(flat(values, type), quantized(out), layout(numel, block_size, format),
                                {is_stochastic, seed, offset}, Ops::lane(lane));
    }

    static void dequantize_blockwise(const Words& from, std::uintptr_t out, int type, Lane lane, std::size_t numel,
                                     std::size_t block_size, int format) {
        Ops::dequantize_blockwise(quantized(from), layout(numel, block_size, format), flat(out, type), Ops::lane(lane));
    }

    static void dequantize_reduce_requantize(const Words& shards, const Words& out, Lane lane, float factor,
                                             std::size_t numel, std::size_t block_size, int format, bool is_stochastic,
                                             std::uint64_t seed, std::uint64_t offset) {
        std::vector<zcore::Quantized> each;
        for (std::size_t first = 0; first + 3 <= shards.size(); first += 3) {
            each.push_back(quantized(shards, first));
        }
        Ops::dequantize_reduce_requantize(each, factor, quantized(out), layout(numel, block_size, format),
                                          {is_stochastic, seed, offset}, Ops::lane(lane));
    }

    static void pack_signs(std::uintptr_t values, int type, std::uintptr_t error, std::uintptr_t signs,
                           std::uintptr_t scales, Lane lane, std::size_t numel, std::size_t block_size) {
        Ops::pack_signs(flat(values, type), pointer<float>(error), pointer<std::uint8_t>(signs), pointer<float>(scales),
                        {numel, block_size}, Ops::lane(lane));
    }

    static void unpack_signs(std::uintptr_t signs, std::uintptr_t scales, std::uintptr_t out, int type, Lane lane,
                             std::size_t numel, std::size_t block_size) {
        Ops::unpack_signs(pointer<std::uint8_t>(signs), pointer<float>(scales), {numel, block_size}, flat(out, type),
                          Ops::lane(lane));
    }

    static void round_stochastic(std::uintptr_t values, std::uintptr_t out, Lane lane, std::size_t numel,
                                 std::uint64_t seed, std::uint64_t offset) {
        Ops::round_stochastic(pointer<float>(values), pointer<std::uint16_t>(out), numel, seed, offset,
                              Ops::lane(lane));
    }

    static void round_with_noise(std::uintptr_t values, std::uintptr_t noise, std::uintptr_t out, Lane lane,
                                 std::size_t numel) {
        Ops::round_with_noise(pointer<float>(values), pointer<std::int32_t>(noise), pointer<std::uint16_t>(out), numel,
                              Ops::lane(lane));
    }
};

// name: of the lane, "threads" or "stream".
template <typename Ops>
void bind(nanobind::module_& module, const char* name) {
    using namespace nanobind::literals;
    using Bound = Functions<Ops>;
    const nanobind::arg lane(name);
    const nanobind::kw_only keywords;
    const nanobind::call_guard<nanobind::gil_scoped_release> unlocked;
    module.def("quantize_blockwise", &Bound::quantize_blockwise, unlocked, "values"_a, "type"_a, "out"_a, lane,
               keywords, "numel"_a, "block_size"_a, "format"_a, "is_stochastic"_a, "seed"_a, "offset"_a);
    module.def("dequantize_blockwise", &Bound::dequantize_blockwise, unlocked, "quantized"_a, "out"_a, "type"_a, lane,
               keywords, "numel"_a, "block_size"_a, "format"_a);
    module.def("dequantize_reduce_requantize", &Bound::dequantize_reduce_requantize, unlocked, "shards"_a, "out"_a,
               lane, keywords, "factor"_a, "numel"_a, "block_size"_a, "format"_a, "is_stochastic"_a, "seed"_a,
               "offset"_a);
    module.def("pack_signs", &Bound::pack_signs, unlocked, "values"_a, "type"_a, "error"_a, "signs"_a, "scales"_a, lane,
               keywords, "numel"_a, "block_size"_a);
    module.def("unpack_signs", &Bound::unpack_signs, unlocked, "signs"_a, "scales"_a, "out"_a, "type"_a, lane, keywords,
               "numel"_a, "block_size"_a);
    module.def("round_stochastic", &Bound::round_stochastic, unlocked, "values"_a, "out"_a, lane, keywords, "numel"_a,
               "seed"_a, "offset"_a);
    module.def("round_with_noise", &Bound::round_with_noise, unlocked, "values"_a, "noise"_a, "out"_a, lane, keywords,
               "numel"_a);
}

}  // namespace block_functions
