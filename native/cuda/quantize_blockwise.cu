#include "cuda/codes.hpp"
#include "zcore/cuda/blocks.hpp"

namespace zcore::cuda {

static __global__ void __launch_bounds__(most_threads)
    quantize_kernel(Flat values, Quantized out, Format format, Rounding rounding, Tiling plan) {
    const Tile tile = this_tile(plan);
    Held held;
    load_tile(values, tile, held);
    quantize_tile(held, tile, plan, out, format, rounding);
}

void quantize_blockwise(Flat values, const Quantized& out, const QuantizedLayout& layout, const Rounding& rounding,
                        Stream stream) {
    const Tiling plan = plan_tiles(layout.numel, layout.block_size);
    launch("quantize_blockwise", quantize_kernel, plan.num_tiles, plan.threads, 0, stream, values, out, layout.format,
           rounding, plan);
}

}  // namespace zcore::cuda
