#include "cuda_blocks.hpp"

#include "block_functions.hpp"
#include "zcore/cuda/blocks.hpp"

namespace {

struct OnStream {
    using Number = std::uintptr_t;  // as Python has a stream
    static zcore::cuda::Stream lane(std::uintptr_t stream) { return block_functions::pointer<CUstream_st>(stream); }
    static constexpr auto quantize_blockwise = &zcore::cuda::quantize_blockwise;
    static constexpr auto dequantize_blockwise = &zcore::cuda::dequantize_blockwise;
    static constexpr auto dequantize_reduce_requantize = &zcore::cuda::dequantize_reduce_requantize;
    static constexpr auto pack_signs = &zcore::cuda::pack_signs;
    static constexpr auto unpack_signs = &zcore::cuda::unpack_signs;
    static constexpr auto round_stochastic = &zcore::cuda::round_stochastic;
    static constexpr auto round_with_noise = &zcore::cuda::round_with_noise;
};

}  // namespace

void bind_cuda_blocks(nanobind::module_& module) {
    module.attr("LARGEST_NUM_SHARDS") = zcore::cuda::largest_num_shards;
    block_functions::bind<OnStream>(module, "stream");
}
