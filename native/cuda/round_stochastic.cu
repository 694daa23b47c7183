#include "cuda/noise.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

static __global__ void __launch_bounds__(most_threads)
    round_kernel(const float* __restrict__ values, std::uint16_t* __restrict__ out, std::uint64_t seed,
                 std::uint64_t offset, Tiling plan) {
    __shared__ NoiseKeys keys;
    const Tile tile = this_tile(plan);
    if (threadIdx.x == 0) {
        keys = noise_keys(seed, offset + tile.begin);
    }
    Held held;
    load_floats<Float32>(values, tile, held);
    __syncthreads();
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        std::uint32_t noise[vector_numel];
        noise_of_vector(keys, offset + tile.begin + first_of(each), noise);
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            held.values[each][at] = float_of_bf16(bf16_with_noise(held.values[each][at], noise[at]));
        }
    }
    store_floats<UpperHalf>(out, tile, held);
}

void round_stochastic(const float* values, std::uint16_t* out, std::size_t numel, std::uint64_t seed,
                      std::uint64_t offset, Stream stream) {
    const Tiling plan = plan_tiles(numel, tile_numel);
    launch("round_stochastic", round_kernel, plan.num_tiles, plan.threads, 0, stream, values, out, seed, offset, plan);
}

}  // namespace zcore::cuda
