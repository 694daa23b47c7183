#include "zcore/dequantize_reduce_requantize.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>

#include "cpu/each_set.hpp"
#include "tests/quantized_blocks.hpp"
#include "zcore/dequantize_blockwise.hpp"
#include "zcore/quantize_blockwise.hpp"

namespace zcore {
ZCORE_IN_EACH_SET(void reduce_part(const Quantized*, std::size_t, float, const Quantized&, const QuantizedLayout&,
                                   const Rounding&, std::size_t, std::size_t))
}  // namespace zcore

namespace {

using namespace quantized_blocks;
using zcore::Rounding;

struct Shards {
    std::vector<Blocks> blocks;
    std::vector<zcore::Quantized> views;

    Shards(std::size_t count, zcore::QuantizedLayout layout, bool is_symmetric, std::size_t shift = 0) {
        for (std::size_t each = 0; each < count; ++each) {
            std::vector<float> values = random_values(layout.numel, static_cast<unsigned>(each));
            blocks.emplace_back(layout, is_symmetric, shift);
            zcore::quantize_blockwise({values.data()}, blocks.back().view(), layout, {}, 1);
        }
        for (Blocks& each : blocks) {
            views.push_back(each.view());
        }
    }
};

template <typename Function>
void for_each_case(Function function) {
    for (const Format format : formats) {
        for (const bool is_symmetric : {true, false}) {
            for (const std::size_t count : {1, 2, 5}) {
                for (const std::size_t numel : {0, 1, 63, 64, 65, 1001, 40001}) {
                    if (is_symmetric || is_integer(format)) {
                        function(zcore::QuantizedLayout{numel, 64, format}, is_symmetric, count);
                    }
                }
            }
        }
    }
}

}  // namespace

TEST(DequantizeReduceRequantize, IsItsThreePartsInOne) {
    for_each_case([](const zcore::QuantizedLayout& layout, bool is_symmetric, std::size_t count) {
        Shards shards(count, layout, is_symmetric);
        const float factor = 1.0f / static_cast<float>(count);
        std::vector<float> sums(layout.numel), values(layout.numel);
        for (std::size_t each = 0; each < count; ++each) {
            zcore::dequantize_blockwise(shards.views[each], layout, {values.data()}, 1);
            for (std::size_t at = 0; at < layout.numel; ++at) {
                sums[at] = each == 0 ? values[at] : sums[at] + values[at];
            }
        }
        for (float& each : sums) {
            each *= factor;
        }
        Blocks apart(layout, is_symmetric), fused = apart;
        zcore::quantize_blockwise({sums.data()}, apart.view(), layout, {true, 5}, 1);
        zcore::dequantize_reduce_requantize(shards.views, factor, fused.view(), layout, {true, 5}, 2);
        ASSERT_TRUE(apart == fused) << layout.numel;
        zcore::dequantize_reduce_requantize(shards.views, factor, shards.views[count - 1], layout, {true, 5}, 2);
        ASSERT_TRUE(shards.blocks[count - 1] == fused) << "in place";
    });
}

TEST(DequantizeReduceRequantize, IsTheSumInDoubleToOneCode) {
    const zcore::QuantizedLayout layout{1001, 64, Format::int8};
    Shards shards(4, layout, true);
    Blocks out(layout, true);
    zcore::dequantize_reduce_requantize(shards.views, 1.0f, out.view(), layout, {}, 1);
    for (std::size_t at = 0; at < layout.numel; ++at) {
        double sum = 0.0;
        for (const Blocks& each : shards.blocks) {
            sum += double(each.scales[at / 64]) * value_of(layout.format, each.code(at));
        }
        const double scale = out.scales[at / 64];
        ASSERT_NEAR(scale * value_of(layout.format, out.code(at)), sum, 0.5001 * scale);
    }
}

TEST(DequantizeReduceRequantize, IsTheSameInEachInstructionSetAndUnaligned) {
    for_each_case([](const zcore::QuantizedLayout& layout, bool is_symmetric, std::size_t count) {
        Shards shards(count, layout, is_symmetric, 1);
        for (const Rounding rounding : {Rounding{}, Rounding{true, 11, 3}}) {
            Blocks here(layout, is_symmetric, 1), there = here;
            zcore::dequantize_reduce_requantize(shards.views, 0.25f, here.view(), layout, rounding, 3);
            zcore::baseline::reduce_part(shards.views.data(), count, 0.25f, there.view(), layout, rounding, 0,
                                         layout.num_blocks());
            ASSERT_TRUE(here == there);
        }
    });
}

TEST(DequantizeReduceRequantize, KeepsANanOfOneShardAndSaysSoOfAnOverflow) {
    const zcore::QuantizedLayout layout{100, 50, Format::int8};
    Shards shards(2, layout, true);
    shards.blocks[0].scales[0] = NAN;
    shards.blocks[0].scales[1] = shards.blocks[1].scales[1] = 2e36f;
    for (Blocks& each : shards.blocks) {
        each.codes[70] = 127;
    }
    Blocks out(layout, true);
    zcore::dequantize_reduce_requantize(shards.views, 1.0f, out.view(), layout, {}, 1);
    EXPECT_TRUE(std::isnan(out.scales[0]));
    EXPECT_TRUE(std::isnan(out.scales[1]));
}

TEST(DequantizeReduceRequantize, RefusesNoShards) {
    const zcore::QuantizedLayout layout{1, 2, Format::int8};
    Blocks out(layout, true);
    EXPECT_THROW(zcore::dequantize_reduce_requantize({}, 1.0f, out.view(), layout, {}, 1), std::invalid_argument);
}
