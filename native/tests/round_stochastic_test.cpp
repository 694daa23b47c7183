#include "zcore/round_stochastic.hpp"

#include <gtest/gtest.h>

#include <algorithm>

#include "cpu/each_set.hpp"
#include "tests/quantized_blocks.hpp"
#include "zcore/round_with_noise.hpp"

namespace zcore {
ZCORE_IN_EACH_SET(void round_part(const float*, std::uint16_t*, std::uint64_t, std::uint64_t, std::size_t, std::size_t))
ZCORE_IN_EACH_SET(void round_with_noise_part(const float*, const std::int32_t*, std::uint16_t*, std::size_t,
                                             std::size_t))
}  // namespace zcore

namespace {

using quantized_blocks::random_values;

float float_of(std::uint16_t bf16) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace

TEST(RoundStochastic, IsRightOnAverage) {
    constexpr std::size_t numel = 257;
    constexpr int rounds = 4000;
    const std::vector<float> values = random_values(numel, 1);
    std::vector<std::uint16_t> out(numel);
    std::vector<double> sums(numel);
    for (int round = 0; round < rounds; ++round) {
        zcore::round_stochastic(values.data(), out.data(), numel, static_cast<std::uint64_t>(round), 0, 1);
        for (std::size_t at = 0; at < numel; ++at) {
            const double gap = std::ldexp(1.0, std::ilogb(values[at]) - 7);
            ASSERT_LT(std::abs(float_of(out[at]) - double(values[at])), gap);
            sums[at] += float_of(out[at]);
        }
    }
    for (std::size_t at = 0; at < numel; ++at) {
        const double gap = std::ldexp(1.0, std::ilogb(values[at]) - 7);
        ASSERT_NEAR(sums[at] / rounds, values[at], 5.0 * 0.5 * gap / std::sqrt(double(rounds))) << at;
    }
}

TEST(RoundStochastic, IsRightOnAverageOverNeighboursToo) {
    constexpr std::size_t numel = 1 << 20;
    const std::vector<float> values(numel, 1.0f + 0x1p-9f);  // a quarter of the way
    std::vector<std::uint16_t> out(numel);
    zcore::round_stochastic(values.data(), out.data(), numel, 7, 0, 2);
    const auto raised = std::count(out.begin(), out.end(), 0x3f81);
    EXPECT_EQ(raised + std::count(out.begin(), out.end(), 0x3f80), numel);
    EXPECT_NEAR(double(raised) / numel, 0.25, 5.0 * std::sqrt(0.25 * 0.75 / numel));
}

TEST(RoundStochastic, KeepsWhatBf16HoldsAndWhatIsNotFinite) {
    std::vector<float> values;
    for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
        values.push_back(float_of(static_cast<std::uint16_t>(bits)));
    }
    std::uint32_t all_ones = 0x7fffffff;
    float nan;
    std::memcpy(&nan, &all_ones, sizeof nan);
    values.push_back(nan);
    values.push_back(-nan);
    std::vector<std::uint16_t> out(values.size());
    zcore::round_stochastic(values.data(), out.data(), values.size(), 3, 0, 2);
    for (std::size_t at = 0; at < values.size(); ++at) {
        const float read = float_of(out[at]);
        ASSERT_TRUE(std::isnan(values[at]) ? std::isnan(read) : out[at] == at) << at;
    }
}

TEST(RoundStochastic, DependsOnSeedAndPlaceAlone) {
    for (const std::uint64_t offset : {0ull, 5ull, (1ull << 32) - 1000}) {
        const std::vector<float> values = random_values(70001, 1);
        std::vector<std::uint16_t> one(values.size()), many = one, parts = one, baseline = one, other = one;
        zcore::round_stochastic(values.data(), one.data(), values.size(), 7, offset, 1);
        zcore::round_stochastic(values.data(), many.data(), values.size(), 7, offset, 3);
        zcore::round_stochastic(values.data(), parts.data(), 1237, 7, offset, 1);
        zcore::round_stochastic(&values[1237], &parts[1237], values.size() - 1237, 7, offset + 1237, 1);
        zcore::baseline::round_part(values.data(), baseline.data(), 7, offset, 0, values.size());
        zcore::round_stochastic(values.data(), other.data(), values.size(), 8, offset, 1);
        EXPECT_EQ(one, many);
        EXPECT_EQ(one, parts);
        EXPECT_EQ(one, baseline);
        EXPECT_NE(one, other);
    }
}

TEST(RoundStochastic, TakesNothing) { zcore::round_stochastic(nullptr, nullptr, 0, 7, 0, 2); }

TEST(RoundWithNoise, GoesUpWhereNoiseExceedsWhatIsMissing) {
    const std::vector<float> values = random_values(70001, 1);
    std::vector<std::int32_t> noise(values.size());
    std::mt19937 random(2);
    for (std::int32_t& each : noise) {
        each = static_cast<std::int32_t>(random() >> 16);
    }
    std::vector<std::uint16_t> out(values.size()), baseline = out;
    zcore::round_with_noise(values.data(), noise.data(), out.data(), values.size(), 3);
    zcore::baseline::round_with_noise_part(values.data(), noise.data(), baseline.data(), 0, values.size());
    EXPECT_EQ(out, baseline);
    for (std::size_t at = 0; at < values.size(); ++at) {
        std::uint32_t bits;
        std::memcpy(&bits, &values[at], sizeof bits);
        const std::uint32_t raised = (bits & 0xffffu) + static_cast<std::uint32_t>(noise[at]) > 0xffffu ? 1 : 0;
        ASSERT_EQ(out[at], (bits >> 16) + raised);
    }
}

TEST(RoundWithNoise, KeepsNan) {
    const float nan = float_of(0xffff);
    std::uint16_t out = 0;
    const std::int32_t noise = 0xffff;
    zcore::round_with_noise(&nan, &noise, &out, 1, 1);
    EXPECT_TRUE(std::isnan(float_of(out)));
}
