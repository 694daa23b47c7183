#include "zcore/pack_signs.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "cpu/each_set.hpp"
#include "tests/quantized_blocks.hpp"
#include "zcore/unpack_signs.hpp"

namespace zcore {
ZCORE_IN_EACH_SET(void pack_part(Flat, float*, std::uint8_t*, float*, const SignsLayout&, std::size_t, std::size_t))
ZCORE_IN_EACH_SET(void unpack_part(const std::uint8_t*, const float*, const SignsLayout&, Flat, std::size_t, std::size_t))
}  // namespace zcore

namespace {

using quantized_blocks::random_values;
using zcore::SignsLayout;

struct Signs {
    std::vector<std::uint8_t> signs;
    std::vector<float> scales, error;

    Signs(const SignsLayout& layout, std::size_t shift = 0)
        : signs((layout.numel + 7) / 8, 0xee),
          scales(layout.num_blocks(), -1.0f),
          error(random_values(layout.numel + shift, 2)) {}

    bool operator==(const Signs& other) const {  // bit for bit: a NaN equals itself
        return signs == other.signs && are_same(scales, other.scales) && are_same(error, other.error);
    }

    static bool are_same(const std::vector<float>& one, const std::vector<float>& other) {
        return one.size() == other.size() &&
               (one.empty() || std::memcmp(one.data(), other.data(), one.size() * sizeof(float)) == 0);
    }
};

template <typename Function>
void for_each_layout(Function function) {
    for (const std::size_t block_size : {8, 24, 64, 256, 264, 2048}) {
        for (const std::size_t numel : {0, 1, 7, 8, 9, 63, 64, 65, 1001, 40003}) {
            function(SignsLayout{numel, block_size});
        }
    }
}

}  // namespace

TEST(PackSigns, KeepsSignsAndMeansAndWhatIsLost) {
    for_each_layout([](const SignsLayout& layout) {
        std::vector<float> values = random_values(layout.numel, 1), read(layout.numel);
        Signs made(layout);
        const std::vector<float> before = made.error;
        zcore::pack_signs({values.data()}, made.error.data(), made.signs.data(), made.scales.data(), layout, 2);
        zcore::unpack_signs(made.signs.data(), made.scales.data(), layout, {read.data()}, 2);
        std::vector<double> sums(layout.num_blocks());
        for (std::size_t at = 0; at < layout.numel; ++at) {
            sums[at / layout.block_size] += std::abs(double(values[at]) + before[at]);
        }
        for (std::size_t at = 0; at < layout.numel; ++at) {
            const std::size_t block = at / layout.block_size, first = block * layout.block_size;
            const auto count = double(std::min(layout.block_size, layout.numel - first));
            const double sum = double(values[at]) + before[at], mean = sums[block] / count;
            ASSERT_NEAR(made.scales[block], mean, 1e-6 * mean);
            ASSERT_EQ(read[at], std::signbit(sum) ? -made.scales[block] : made.scales[block]);
            ASSERT_NEAR(double(read[at]) + made.error[at], sum, 2e-7 * (std::abs(sum) + mean));
        }
        for (std::size_t bit = layout.numel; bit < made.signs.size() * 8; ++bit) {
            ASSERT_EQ(made.signs[bit / 8] >> bit % 8 & 1, 0);
        }
    });
}

TEST(PackSigns, IsTheSameInEachInstructionSetAndOnAnyNumberOfThreads) {
    for_each_layout([](const SignsLayout& layout) {
        for (const zcore::Type type : {zcore::Type::f32, zcore::Type::bf16, zcore::Type::f16}) {
            for (const std::size_t shift : {0, 1, 3}) {
                std::vector<float> memory = random_values(layout.numel + shift, 1);
                const std::size_t width = type == zcore::Type::f32 ? 4 : 2;
                const zcore::Flat values{reinterpret_cast<char*>(memory.data()) + shift * width, type};
                Signs here(layout, shift), there = here;
                zcore::pack_signs(values, &here.error[0] + shift, here.signs.data(), here.scales.data(), layout, 3);
                zcore::baseline::pack_part(values, &there.error[0] + shift, there.signs.data(), there.scales.data(),
                                           layout, 0, layout.num_blocks());
                ASSERT_TRUE(here == there) << layout.numel;
                std::vector<float> read(layout.numel + shift), same = read;
                const zcore::Flat out{reinterpret_cast<char*>(read.data()) + shift * width, type};
                const zcore::Flat as{reinterpret_cast<char*>(same.data()) + shift * width, type};
                zcore::unpack_signs(here.signs.data(), here.scales.data(), layout, out, 3);
                zcore::baseline::unpack_part(here.signs.data(), here.scales.data(), layout, as, 0, layout.num_blocks());
                ASSERT_TRUE(Signs::are_same(read, same));
            }
        }
    });
}

TEST(PackSigns, LeavesTheErrorOfABlockThatIsNotFinite) {
    for (const float bad : {NAN, INFINITY, -INFINITY}) {
        const SignsLayout layout{100, 64};
        std::vector<float> values = random_values(layout.numel, 1), read(layout.numel);
        values[99] = bad;
        Signs made(layout);
        const std::vector<float> before = made.error;
        zcore::pack_signs({values.data()}, made.error.data(), made.signs.data(), made.scales.data(), layout, 1);
        zcore::unpack_signs(made.signs.data(), made.scales.data(), layout, {read.data()}, 1);
        for (std::size_t at = 0; at < layout.numel; ++at) {
            ASSERT_EQ(std::isnan(read[at]), at >= 64);
            ASSERT_EQ(before[at] == made.error[at], at >= 64);
        }
    }
}

TEST(PackSigns, TakesTheMeanOfTheLargestNumbers) {
    const SignsLayout layout{16384, 16384};
    std::vector<float> values(layout.numel, -3.4e38f), error(layout.numel), scales(1);
    std::vector<std::uint8_t> signs(layout.numel / 8);
    zcore::pack_signs({values.data()}, error.data(), signs.data(), scales.data(), layout, 1);
    EXPECT_EQ(scales[0], 3.4e38f);
    EXPECT_EQ(error, std::vector<float>(layout.numel));
}
