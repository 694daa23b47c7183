#include "blocks.hpp"

#include "block_functions.hpp"
#include "zcore/dequantize_blockwise.hpp"
#include "zcore/dequantize_reduce_requantize.hpp"
#include "zcore/pack_signs.hpp"
#include "zcore/quantize_blockwise.hpp"
#include "zcore/round_stochastic.hpp"
#include "zcore/round_with_noise.hpp"
#include "zcore/unpack_signs.hpp"

namespace {

struct OnThreads {
    using Number = int;
    static int lane(int threads) { return threads; }
    static constexpr auto quantize_blockwise = &zcore::quantize_blockwise;
    static constexpr auto dequantize_blockwise = &zcore::dequantize_blockwise;
    static constexpr auto dequantize_reduce_requantize = &zcore::dequantize_reduce_requantize;
    static constexpr auto pack_signs = &zcore::pack_signs;
    static constexpr auto unpack_signs = &zcore::unpack_signs;
    static constexpr auto round_stochastic = &zcore::round_stochastic;
    static constexpr auto round_with_noise = &zcore::round_with_noise;
};

}  // namespace

void bind_blocks(nanobind::module_& module) {
    module.attr("LARGEST_BLOCK_SIZE") = zcore::largest_block_size;
    block_functions::bind<OnThreads>(module, "threads");
}
