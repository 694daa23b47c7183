#include "cuda/block_tiles.hpp"
#include "elements/signs.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

// Blocks lie this far apart in shared memory: an odd multiple of 16 words, so that the two which a warp sums, 16
// threads each, are in different banks.
static std::uint32_t stride_of(std::uint32_t block_size) { return (block_size + 15) / 32 * 32 + 16; }

// Sums are taken from shared memory in the order that pack_signs.hpp has: 16 threads a block, each a partial sum.
static __global__ void __launch_bounds__(most_threads)
    pack_kernel(Flat values, float* error, std::uint8_t* signs, float* scales, Tiling plan, std::uint32_t stride) {
    __shared__ float scale_of_block[most_blocks];
    float* const sums = shared_memory<float>();
    const Tile tile = this_tile(plan);
    Held held, added;
    load_tile(values, tile, held);
    load_floats<Float32>(error, tile, added);
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        const std::uint32_t first = first_of(each), block = block_of(first, plan);
        std::uint32_t bits = 0;
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            held.values[each][at] += added.values[each][at];
            bits |= first + at < tile.count ? bits_of_float(held.values[each][at]) >> 31 << at : 0u;
        }
        bits |= __shfl_down_sync(0xffffffffu, bits, 1) << vector_numel;  // of the neighbour: a byte has two vectors
        if (first < tile.count) {
            const float(&sum)[vector_numel] = held.values[each];
            *reinterpret_cast<float4*>(sums + block * stride + (first - block * plan.block_size)) = {sum[0], sum[1],
                                                                                                      sum[2], sum[3]};
            if (first % 8 == 0) {
                signs[(tile.begin + first) / 8] = static_cast<std::uint8_t>(bits);
            }
        }
    }
    __syncthreads();
    constexpr std::uint32_t lanes = sign_lanes;
    const std::uint32_t lane = threadIdx.x % lanes, groups = blockDim.x / lanes;
    for (std::uint32_t round = 0; round < tile.num_blocks; round += groups) {  // alike for all, since they shuffle
        const std::uint32_t block = round + threadIdx.x / lanes, begin = block * plan.block_size;
        const std::uint32_t rest = begin < tile.count ? tile.count - begin : 0;
        const std::uint32_t count = rest < plan.block_size ? rest : plan.block_size;
        double total = 0.0;
#pragma unroll 4
        for (std::uint32_t at = lane; at < count; at += lanes) {
            total += magnitude_of(sums[block * stride + at]);
        }
#pragma unroll
        for (std::uint32_t half = lanes / 2; half > 0; half /= 2) {
            total += __shfl_down_sync(0xffffffffu, total, half, lanes);
        }
        if (lane == 0 && count > 0) {
            scale_of_block[block] = scales[tile.block + block] = mean_magnitude(total, count);
        }
    }
    __syncthreads();
    const bool is_vector = is_aligned(error + tile.begin, sizeof(float4));
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        const std::uint32_t first = first_of(each);
        const float scale = first < tile.count ? scale_of_block[block_of(first, plan)] : 0.0f;
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            held.values[each][at] = error_left(held.values[each][at], scale);
        }
        if (scale == scale) {  // else the error stays
            store_vector<Float32>(error + tile.begin, is_vector, first, tile.count, held.values[each]);
        }
    }
}

void pack_signs(Flat values, float* error, std::uint8_t* signs, float* scales, const SignsLayout& layout,
                Stream stream) {
    const Tiling plan = plan_tiles(layout.numel, layout.block_size);
    const std::uint32_t stride = stride_of(plan.block_size);
    launch("pack_signs", pack_kernel, plan.num_tiles, plan.threads, plan.together * stride * sizeof(float), stream,
           values, error, signs, scales, plan, stride);
}

}  // namespace zcore::cuda
