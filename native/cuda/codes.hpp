// Tiles in fp32 to codes and back, by what elements/codes.hpp says of one element.
//
// The extremes of a block are found in three steps, each in any order, since they are the largest of integers: in a
// vector, among the threads of a warp that have the block by shuffles, and among warps in shared memory.
#pragma once

#include "cuda/noise.hpp"
#include "cuda/block_tiles.hpp"
#include "elements/codes.hpp"

namespace zcore::cuda {

// Of a tile, shared by its threads.
struct TileCodes {
    std::int32_t low[most_blocks], high[most_blocks];  // extremes as integers
    float inverse[most_blocks];                        // of the scale; NaN where the block is not finite
    std::int32_t zero_point[most_blocks];
    NoiseKeys keys;
};

__device__ __forceinline__ static std::int32_t least(std::int32_t one, std::int32_t other) {
    return one < other ? one : other;
}

__device__ __forceinline__ static std::int32_t largest(std::int32_t one, std::int32_t other) {
    return one > other ? one : other;
}

template <bool is_symmetric>
__device__ __forceinline__ static void find_extremes(const Held& held, const Tile& tile, const Tiling& plan,
                                                     TileCodes& shared) {
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        const std::uint32_t first = first_of(each);
        std::int32_t low = 0, high = 0;
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            const float value = held.values[each][at];
            const std::int32_t place = is_symmetric ? magnitude_bits(value) : ordered_bits(value);
            if (plan.lanes == 0 && first + at < tile.count) {
                atomicMax(&shared.high[block_of(first + at, plan)], place);
                if (!is_symmetric) {
                    atomicMin(&shared.low[block_of(first + at, plan)], place);
                }
            }
            low = least(low, place);
            high = largest(high, place);
        }
#pragma unroll 1
        for (std::uint32_t distance = plan.lanes / 2; distance > 0; distance /= 2) {
            high = largest(high, __shfl_xor_sync(0xffffffffu, high, static_cast<int>(distance)));
            if (!is_symmetric) {
                low = least(low, __shfl_xor_sync(0xffffffffu, low, static_cast<int>(distance)));
            }
        }
        if (plan.lanes != 0 && threadIdx.x % plan.lanes == 0 && first < tile.count) {
            atomicMax(&shared.high[block_of(first, plan)], high);
            if (!is_symmetric) {
                atomicMin(&shared.low[block_of(first, plan)], low);
            }
        }
    }
}

// Finds and stores the scales of a tile, and the zero points if it has any.
__device__ __forceinline__ static void measure_tile(const Held& held, const Tile& tile, const Tiling& plan,
                                                    const Quantized& out, Format format, TileCodes& shared) {
    const bool is_symmetric = out.zero_points == nullptr;
#pragma unroll 1
    for (std::uint32_t block = threadIdx.x; block < tile.num_blocks; block += blockDim.x) {
        shared.low[block] = shared.high[block] = 0;
    }
    __syncthreads();
    if (is_symmetric) {
        find_extremes<true>(held, tile, plan, shared);
    } else {
        find_extremes<false>(held, tile, plan, shared);
    }
    __syncthreads();
#pragma unroll 1
    for (std::uint32_t block = threadIdx.x; block < tile.num_blocks; block += blockDim.x) {
        const Range extent = is_symmetric ? range_of_magnitude(shared.high[block])
                                          : range_of_ordered(shared.low[block], shared.high[block]);
        const BlockCode code = code_of_block(extent, is_symmetric, format);
        out.scales[tile.block + block] = code.scale;
        if (!is_symmetric) {
            out.zero_points[tile.block + block] = static_cast<std::int8_t>(code.zero_point);
        }
        shared.inverse[block] = 1.0f / code.scale;
        shared.zero_point[block] = code.zero_point;
    }
    __syncthreads();
}

template <Format format, bool is_stochastic>
__device__ __forceinline__ static std::uint32_t encode(float value, std::uint32_t noise, float inverse,
                                                       std::int32_t zero_point, float lowest) {
    const float scaled = value * inverse;
    std::uint32_t code;
    if constexpr (format == Format::e4m3) {
        code = code_of_float<E4m3, is_stochastic>(scaled, noise, largest_of(format));
    } else if constexpr (format == Format::e5m2) {
        code = code_of_float<E5m2, is_stochastic>(scaled, noise, largest_of(format));
    } else {
        const float zero = static_cast<float>(zero_point), highest = integers_of(format).highest;
        code = code_of_integer<is_stochastic>(scaled, noise, lowest - zero, highest - zero, zero_point);
    }
    return inverse != inverse ? 0u : code;
}

// Two to a byte; what lies past the end is no code.
__device__ __forceinline__ static void store_halves(std::uint8_t* to, bool is_vector, std::uint32_t first,
                                                    std::uint32_t count, const std::uint32_t (&codes)[vector_numel]) {
    std::uint32_t both[vector_numel / 2];
#pragma unroll
    for (std::uint32_t pair = 0; pair < vector_numel / 2; ++pair) {
        const std::uint32_t upper = first + 2 * pair + 1 < count ? codes[2 * pair + 1] & 0x0fu : 0u;
        both[pair] = (codes[2 * pair] & 0x0fu) | upper << 4;
    }
    if (is_vector && first + vector_numel <= count) {
        *reinterpret_cast<std::uint16_t*>(to + first / 2) = static_cast<std::uint16_t>(both[0] | both[1] << 8);
        return;
    }
#pragma unroll
    for (std::uint32_t pair = 0; pair < vector_numel / 2; ++pair) {
        if (first + 2 * pair < count) {
            to[first / 2 + pair] = static_cast<std::uint8_t>(both[pair]);
        }
    }
}

__device__ __forceinline__ static void store_bytes(std::uint8_t* to, bool is_vector, std::uint32_t first,
                                                   std::uint32_t count, const std::uint32_t (&codes)[vector_numel]) {
    if (is_vector && first + vector_numel <= count) {
        *reinterpret_cast<std::uint32_t*>(to + first) = (codes[0] & 0xffu) | (codes[1] & 0xffu) << 8 |
                                                        (codes[2] & 0xffu) << 16 | codes[3] << 24;
        return;
    }
#pragma unroll
    for (std::uint32_t at = 0; at < vector_numel; ++at) {
        if (first + at < count) {
            to[first + at] = static_cast<std::uint8_t>(codes[at]);
        }
    }
}

// Codes of a tile that is measured.
template <Format format, bool is_stochastic>
__device__ __forceinline__ static void encode_tile(const Held& held, const Tile& tile, const Tiling& plan,
                                                   const Quantized& out, const Rounding& rounding,
                                                   const TileCodes& shared) {
    constexpr std::uint32_t per_byte = format == Format::int4 ? 2 : 1;
    auto* const to = static_cast<std::uint8_t*>(out.codes) + tile.begin / per_byte;
    const bool is_vector = is_aligned(to, vector_numel / per_byte);
    const float lowest = integers_of(format).lowest + (out.zero_points == nullptr ? 1.0f : 0.0f);
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        const std::uint32_t first = first_of(each);
        if (first >= tile.count) {
            return;
        }
        std::uint32_t noise[vector_numel] = {}, codes[vector_numel];
        float inverse = shared.inverse[block_of(first, plan)];
        std::int32_t zero_point = shared.zero_point[block_of(first, plan)];
        if (is_stochastic) {
            noise_of_vector(shared.keys, rounding.offset + tile.begin + first, noise);
        }
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            if (plan.lanes == 0 && first + at < tile.count) {
                inverse = shared.inverse[block_of(first + at, plan)];
                zero_point = shared.zero_point[block_of(first + at, plan)];
            }
            codes[at] = encode<format, is_stochastic>(held.values[each][at], noise[at], inverse, zero_point, lowest);
        }
        if constexpr (format == Format::int4) {
            store_halves(to, is_vector, first, tile.count, codes);
        } else {
            store_bytes(to, is_vector, first, tile.count, codes);
        }
    }
}

template <bool is_stochastic>
__device__ __forceinline__ static void encode_tile(const Held& held, const Tile& tile, const Tiling& plan,
                                                   const Quantized& out, Format format, const Rounding& rounding,
                                                   const TileCodes& shared) {
    switch (format) {
        case Format::int8: encode_tile<Format::int8, is_stochastic>(held, tile, plan, out, rounding, shared); return;
        case Format::int4: encode_tile<Format::int4, is_stochastic>(held, tile, plan, out, rounding, shared); return;
        case Format::e4m3: encode_tile<Format::e4m3, is_stochastic>(held, tile, plan, out, rounding, shared); return;
        default: encode_tile<Format::e5m2, is_stochastic>(held, tile, plan, out, rounding, shared);
    }
}

// Quantises what the threads hold of a tile. What they read before may be what is written.
__device__ __forceinline__ static void quantize_tile(const Held& held, const Tile& tile, const Tiling& plan,
                                                     const Quantized& out, Format format, const Rounding& rounding) {
    __shared__ TileCodes shared;
    if (rounding.is_stochastic && threadIdx.x == 0) {
        shared.keys = noise_keys(rounding.seed, rounding.offset + tile.begin);
    }
    measure_tile(held, tile, plan, out, format, shared);
    if (rounding.is_stochastic) {
        encode_tile<true>(held, tile, plan, out, format, rounding, shared);
    } else {
        encode_tile<false>(held, tile, plan, out, format, rounding, shared);
    }
}

template <Format format>
__device__ __forceinline__ static float decode(std::uint32_t code) {
    if constexpr (format == Format::int8) {
        return value_of_byte(code);
    } else if constexpr (format == Format::int4) {
        return value_of_half(code & 0x0fu);
    } else if constexpr (format == Format::e4m3) {
        return value_of_float<E4m3>(code);
    } else {
        return value_of_float<E5m2>(code);
    }
}

// The codes of a vector, the first in the lowest bits; only those below `count`.
template <Format format>
__device__ __forceinline__ static std::uint32_t load_codes(const std::uint8_t* from, bool is_vector,
                                                           std::uint32_t first, std::uint32_t count) {
    constexpr std::uint32_t per_byte = format == Format::int4 ? 2 : 1;
    if (is_vector && first + vector_numel <= count) {
        return per_byte == 2 ? *reinterpret_cast<const std::uint16_t*>(from + first / 2)
                             : *reinterpret_cast<const std::uint32_t*>(from + first);
    }
    std::uint32_t codes = 0;
#pragma unroll
    for (std::uint32_t at = 0; at < vector_numel; at += per_byte) {
        if (first + at < count) {
            codes |= static_cast<std::uint32_t>(from[(first + at) / per_byte]) << (8 / per_byte * at);
        }
    }
    return codes;
}

__device__ __forceinline__ static float zero_point_at(const Quantized& from, std::size_t block) {
    return from.zero_points == nullptr ? 0.0f : static_cast<float>(from.zero_points[block]);
}

// What the codes of a tile stand for: written to `held`, or added to it. Past the end of the tile it is anything.
template <Format format, bool adds>
__device__ __forceinline__ static void decode_tile(const Quantized& from, const Tile& tile, const Tiling& plan,
                                                   Held& held) {
    constexpr std::uint32_t per_byte = format == Format::int4 ? 2 : 1, bits = 8 / per_byte;
    const auto* const codes_of_tile = static_cast<const std::uint8_t*>(from.codes) + tile.begin / per_byte;
    const bool is_vector = is_aligned(codes_of_tile, vector_numel / per_byte);
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        const std::uint32_t first = first_of(each);
        if (first >= tile.count) {
            return;
        }
        const std::uint32_t codes = load_codes<format>(codes_of_tile, is_vector, first, tile.count);
        std::size_t block = tile.block + block_of(first, plan);
        float scale = from.scales[block], zero_point = zero_point_at(from, block);
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            if (plan.lanes == 0 && first + at < tile.count) {
                block = tile.block + block_of(first + at, plan);
                scale = from.scales[block];
                zero_point = zero_point_at(from, block);
            }
            const float value = (decode<format>(codes >> (bits * at)) - zero_point) * scale;
            held.values[each][at] = adds ? held.values[each][at] + value : value;
        }
    }
}

template <bool adds>
__device__ __forceinline__ static void dequantize_tile(const Quantized& from, const Tile& tile, const Tiling& plan,
                                                       Format format, Held& held) {
    switch (format) {
        case Format::int8: decode_tile<Format::int8, adds>(from, tile, plan, held); return;
        case Format::int4: decode_tile<Format::int4, adds>(from, tile, plan, held); return;
        case Format::e4m3: decode_tile<Format::e4m3, adds>(from, tile, plan, held); return;
        default: decode_tile<Format::e5m2, adds>(from, tile, plan, held);
    }
}

}  // namespace zcore::cuda
