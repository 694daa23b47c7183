#include "cuda/block_tiles.hpp"
#include "elements/noise.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

static __global__ void __launch_bounds__(most_threads)
    round_with_noise_kernel(const float* __restrict__ values, const std::int32_t* __restrict__ noise,
                            std::uint16_t* __restrict__ out, Tiling plan) {
    const Tile tile = this_tile(plan);
    Held held, drawn;
    load_floats<Float32>(values, tile, held);
    load_floats<Float32>(noise, tile, drawn);  // their bits
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
#pragma unroll
        for (std::uint32_t at = 0; at < vector_numel; ++at) {
            const std::uint32_t word = bits_of_float(drawn.values[each][at]);
            held.values[each][at] = float_of_bf16(bf16_with_noise(held.values[each][at], word));
        }
    }
    store_floats<UpperHalf>(out, tile, held);
}

void round_with_noise(const float* values, const std::int32_t* noise, std::uint16_t* out, std::size_t numel,
                      Stream stream) {
    const Tiling plan = plan_tiles(numel, tile_numel);
    launch("round_with_noise", round_with_noise_kernel, plan.num_tiles, plan.threads, 0, stream, values, noise, out,
           plan);
}

}  // namespace zcore::cuda
