// Quantisers, signs and roundings on a GPU: the ops of the same names beside this folder, whose headers have the
// formulas, with the same bits. Only which NaN comes out may differ, and the sign bit of an element that became NaN.
//
// All are bound by memory: one pass, what a block needs twice stays in registers. All addresses are on the device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "zcore/cuda/stream.hpp"
#include "zcore/flat.hpp"
#include "zcore/pack_signs.hpp"
#include "zcore/quantized.hpp"

namespace zcore::cuda {

// Addresses of shards travel as arguments of the kernel, of which there are 32 KB.
constexpr std::size_t largest_num_shards = 1024;

void quantize_blockwise(Flat values, const Quantized& out, const QuantizedLayout& layout, const Rounding& rounding,
                        Stream stream);

void dequantize_blockwise(const Quantized& from, const QuantizedLayout& layout, Flat out, Stream stream);

// Throws std::invalid_argument for no shards, or more than largest_num_shards.
void dequantize_reduce_requantize(std::span<const Quantized> shards, float factor, const Quantized& out,
                                  const QuantizedLayout& layout, const Rounding& rounding, Stream stream);

void pack_signs(Flat values, float* error, std::uint8_t* signs, float* scales, const SignsLayout& layout,
                Stream stream);

void unpack_signs(const std::uint8_t* signs, const float* scales, const SignsLayout& layout, Flat out, Stream stream);

void round_stochastic(const float* values, std::uint16_t* out, std::size_t numel, std::uint64_t seed,
                      std::uint64_t offset, Stream stream);

void round_with_noise(const float* values, const std::int32_t* noise, std::uint16_t* out, std::size_t numel,
                      Stream stream);

}  // namespace zcore::cuda
