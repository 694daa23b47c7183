#include "cuda/block_tiles.hpp"
#include "elements/signs.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

static __global__ void __launch_bounds__(most_threads)
    unpack_kernel(const std::uint8_t* __restrict__ signs, const float* __restrict__ scales, Flat out, Tiling plan) {
    const Tile tile = this_tile(plan);
    Held held;
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        const std::uint32_t first = first_of(each);
        if (first < tile.count) {
            const std::uint32_t bits = static_cast<std::uint32_t>(signs[(tile.begin + first) / 8]) >> first % 8;
            const float scale = scales[tile.block + block_of(first, plan)];
#pragma unroll
            for (std::uint32_t at = 0; at < vector_numel; ++at) {
                held.values[each][at] = with_sign(scale, bits << (31 - at));
            }
        }
    }
    store_tile(out, tile, held);
}

void unpack_signs(const std::uint8_t* signs, const float* scales, const SignsLayout& layout, Flat out, Stream stream) {
    const Tiling plan = plan_tiles(layout.numel, layout.block_size);
    launch("unpack_signs", unpack_kernel, plan.num_tiles, plan.threads, 0, stream, signs, scales, out, plan);
}

}  // namespace zcore::cuda
