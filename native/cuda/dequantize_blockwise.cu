#include "cuda/codes.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

static __global__ void __launch_bounds__(most_threads)
    dequantize_kernel(Quantized from, Format format, Flat out, Tiling plan) {
    const Tile tile = this_tile(plan);
    Held held;
    dequantize_tile<false>(from, tile, plan, format, held);
    store_tile(out, tile, held);
}

void dequantize_blockwise(const Quantized& from, const QuantizedLayout& layout, Flat out, Stream stream) {
    const Tiling plan = plan_tiles(layout.numel, layout.block_size);
    launch("dequantize_blockwise", dequantize_kernel, plan.num_tiles, plan.threads, 0, stream, from, layout.format, out,
           plan);
}

}  // namespace zcore::cuda
