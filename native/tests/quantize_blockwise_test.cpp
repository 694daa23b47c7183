#include "zcore/quantize_blockwise.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "cpu/each_set.hpp"
#include "tests/quantized_blocks.hpp"
#include "zcore/dequantize_blockwise.hpp"

namespace zcore {
ZCORE_IN_EACH_SET(void quantize_part(Flat, const Quantized&, const QuantizedLayout&, const Rounding&, std::size_t,
                                     std::size_t))
ZCORE_IN_EACH_SET(void dequantize_part(const Quantized&, const QuantizedLayout&, Flat, std::size_t, std::size_t))
}  // namespace zcore

namespace {

using namespace quantized_blocks;
using zcore::Rounding;
using zcore::Type;

constexpr std::size_t numels[] = {0, 1, 2, 7, 31, 32, 33, 255, 256, 257, 1001};
constexpr std::size_t block_sizes[] = {2, 32, 64, 250, 256, 300, 1024};

// Calls function(layout, is_symmetric) for everything that there is.
template <typename Function>
void for_each_layout(Function function) {
    for (const Format format : formats) {
        for (const bool is_symmetric : {true, false}) {
            for (const std::size_t block_size : block_sizes) {
                for (const std::size_t numel : numels) {
                    if (is_symmetric || is_integer(format)) {
                        function(zcore::QuantizedLayout{numel, block_size, format}, is_symmetric);
                    }
                }
            }
        }
    }
}

std::string name_of(const zcore::QuantizedLayout& layout, bool is_symmetric) {
    return "format " + std::to_string(static_cast<int>(layout.format)) + (is_symmetric ? "" : " asymmetric") +
           ", " + std::to_string(layout.numel) + " in blocks of " + std::to_string(layout.block_size);
}

Blocks quantized(std::vector<float>& values, zcore::QuantizedLayout layout, bool is_symmetric, Rounding rounding = {},
                 int threads = 1) {
    Blocks blocks(layout, is_symmetric);
    zcore::quantize_blockwise({values.data()}, blocks.view(), layout, rounding, threads);
    return blocks;
}

std::vector<float> dequantized(Blocks& blocks) {
    std::vector<float> values(blocks.layout.numel, -1.0f);
    zcore::dequantize_blockwise(blocks.view(), blocks.layout, {values.data()}, 1);
    return values;
}

}  // namespace

TEST(QuantizeBlockwise, TakesTheNearestOfAllCodes) {
    for_each_layout([](const zcore::QuantizedLayout& layout, bool is_symmetric) {
        std::vector<float> values = random_values(layout.numel, 3, is_symmetric ? 0.0f : 5.0f);
        Blocks blocks = quantized(values, layout, is_symmetric);
        for (std::size_t at = 0; at < layout.numel; ++at) {
            const double scale = blocks.scales[at / layout.block_size];
            const double zero = is_symmetric ? 0.0 : blocks.zero_points[at / layout.block_size];
            auto distance = [&](int code) {
                return std::abs(scale * (value_of(layout.format, code) - zero) - values[at]);
            };
            double least = std::numeric_limits<double>::infinity();
            for (int code = 0; code < num_codes(layout.format); ++code) {
                least = std::fmin(least, distance(code));
            }
            ASSERT_LE(distance(blocks.code(at)), least + 1e-6 * std::abs(values[at])) << name_of(layout, is_symmetric);
        }
    });
}

TEST(QuantizeBlockwise, RoundsStochasticallyToANeighbour) {
    for_each_layout([](const zcore::QuantizedLayout& layout, bool is_symmetric) {
        std::vector<float> values = random_values(layout.numel, 3, is_symmetric ? 0.0f : 5.0f);
        Blocks blocks = quantized(values, layout, is_symmetric, {true, 11});
        for (std::size_t at = 0; at < layout.numel; ++at) {
            const double scale = blocks.scales[at / layout.block_size];
            const double zero = is_symmetric ? 0.0 : blocks.zero_points[at / layout.block_size];
            const double value = values[at] / scale + zero, taken = value_of(layout.format, blocks.code(at));
            for (int code = 0; code < num_codes(layout.format); ++code) {
                const double other = value_of(layout.format, code), slack = 1e-5 * (1.0 + std::abs(value));
                const bool lies_between = (other > taken && other < value - slack) ||
                                          (other < taken && other > value + slack);
                ASSERT_FALSE(lies_between) << name_of(layout, is_symmetric) << ": " << value << " became " << taken;
            }
        }
    });
}

TEST(QuantizeBlockwise, IsUnbiasedWhereItRoundsStochastically) {
    constexpr std::size_t numel = 64;
    for (const Format format : formats) {
        std::vector<float> values = random_values(numel, 5), means(numel);
        const Blocks nearest = quantized(values, {numel, numel, format}, true);
        std::vector<double> sums(numel);
        constexpr int rounds = 4000;
        for (int round = 0; round < rounds; ++round) {
            Blocks blocks = quantized(values, {numel, numel, format}, true, {true, static_cast<std::uint64_t>(round)});
            const std::vector<float> read = dequantized(blocks);
            for (std::size_t at = 0; at < numel; ++at) {
                sums[at] += read[at];
            }
        }
        for (std::size_t at = 0; at < numel; ++at) {
            // The gap between neighbours is the scale for integers, and up to a quarter of the value for fp8.
            const double gap = nearest.scales[0] * (is_integer(format) ? 1.0 : 0x1p-9) + 0.25 * std::abs(values[at]);
            ASSERT_NEAR(sums[at] / rounds, values[at], 5.0 * 0.5 * gap / std::sqrt(double(rounds))) << at;
        }
    }
}

TEST(QuantizeBlockwise, IsTheSameInEachInstructionSet) {
    for_each_layout([](const zcore::QuantizedLayout& layout, bool is_symmetric) {
        for (const Type type : {Type::f32, Type::bf16, Type::f16}) {
            for (const Rounding rounding : {Rounding{}, Rounding{true, 11, (1ull << 32) - 5}}) {
                for (const std::size_t shift : {0, 1, 3}) {  // elements past an aligned address
                    std::vector<float> memory = random_values(layout.numel + shift, 3);
                    const std::size_t width = type == Type::f32 ? 4 : 2;
                    const zcore::Flat values{reinterpret_cast<char*>(memory.data()) + shift * width, type};
                    Blocks here(layout, is_symmetric, shift), there = here;
                    zcore::quantize_blockwise(values, here.view(), layout, rounding, 1);
                    zcore::baseline::quantize_part(values, there.view(), layout, rounding, 0, layout.num_blocks());
                    ASSERT_TRUE(here == there) << name_of(layout, is_symmetric);
                    std::vector<float> read(layout.numel + shift), same = read;
                    const zcore::Flat out{reinterpret_cast<char*>(read.data()) + shift * width, type};
                    const zcore::Flat as{reinterpret_cast<char*>(same.data()) + shift * width, type};
                    zcore::dequantize_blockwise(here.view(), layout, out, 1);
                    zcore::baseline::dequantize_part(here.view(), layout, as, 0, layout.num_blocks());
                    const std::size_t bytes = read.size() * sizeof(float);
                    ASSERT_TRUE(bytes == 0 || std::memcmp(read.data(), same.data(), bytes) == 0);
                }
            }
        }
    });
}

TEST(QuantizeBlockwise, IsTheSameOnAnyNumberOfThreadsAndInParts) {
    const zcore::QuantizedLayout layout{200001, 64, Format::int4}, half{100032, 64, Format::int4};
    std::vector<float> values = random_values(layout.numel, 3);
    const Rounding rounding{true, 11};
    const Blocks one = quantized(values, layout, false, rounding, 1);
    EXPECT_TRUE(one == quantized(values, layout, false, rounding, 3));
    const zcore::QuantizedLayout rest{layout.numel - half.numel, 64, Format::int4};
    Blocks second(rest, false);
    zcore::quantize_blockwise({&values[half.numel]}, second.view(), rest, {true, 11, half.numel}, 2);
    EXPECT_TRUE(std::equal(second.codes.begin(), second.codes.end(), one.codes.begin() + half.numel / 2));
}

TEST(QuantizeBlockwise, ReadsItsOwnCodesInDouble) {
    for_each_layout([](const zcore::QuantizedLayout& layout, bool is_symmetric) {
        std::vector<float> values = random_values(layout.numel, 9);
        Blocks blocks = quantized(values, layout, is_symmetric);
        const std::vector<float> read = dequantized(blocks);
        for (std::size_t at = 0; at < layout.numel; ++at) {
            const double zero = is_symmetric ? 0.0 : blocks.zero_points[at / layout.block_size];
            const double expected = blocks.scales[at / layout.block_size] *
                                    (value_of(layout.format, blocks.code(at)) - zero);
            ASSERT_EQ(read[at], static_cast<float>(expected)) << name_of(layout, is_symmetric);
        }
    });
}

TEST(QuantizeBlockwise, ReadsEveryCode) {
    for (const Format format : formats) {
        const auto numel = static_cast<std::size_t>(num_codes(format));
        Blocks blocks({numel, numel, format}, true);
        blocks.scales[0] = 0.5f;
        for (std::size_t at = 0; at < blocks.codes.size(); ++at) {
            const std::size_t pair = 2 * at | (2 * at + 1) << 4;
            blocks.codes[at] = static_cast<std::uint8_t>(format == Format::int4 ? pair : at);
        }
        const std::vector<float> read = dequantized(blocks);
        for (std::size_t at = 0; at < numel; ++at) {
            const double expected = 0.5 * value_of(format, static_cast<int>(at));
            EXPECT_TRUE(read[at] == expected || (std::isnan(read[at]) && std::isnan(expected))) << at;
        }
    }
}

TEST(QuantizeBlockwise, ShowsWhatIsNotFiniteInItsBlockAlone) {
    for_each_layout([](const zcore::QuantizedLayout& layout, bool is_symmetric) {
        for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
            std::vector<float> values = random_values(layout.numel, 3);
            if (layout.numel == 0) {
                return;
            }
            values.back() = bad;
            for (const Rounding rounding : {Rounding{}, Rounding{true, 11}}) {
                Blocks blocks = quantized(values, layout, is_symmetric, rounding);
                const std::vector<float> read = dequantized(blocks);
                const std::size_t last = layout.num_blocks() - 1;
                for (std::size_t at = 0; at < layout.numel; ++at) {
                    ASSERT_EQ(std::isnan(read[at]), at / layout.block_size == last) << name_of(layout, is_symmetric);
                }
            }
        }
    });
}

TEST(QuantizeBlockwise, KeepsZerosAndTheSmallestAndLargestNumbersFinite) {
    for_each_layout([](const zcore::QuantizedLayout& layout, bool is_symmetric) {
        for (const float each : {0.0f, -0.0f, 1e-45f, 1e-38f, 3.4e38f, -3.4e38f}) {
            std::vector<float> values(layout.numel, each);
            if (layout.numel > 0) {
                values.back() = 0.0f;
            }
            Blocks blocks = quantized(values, layout, is_symmetric);
            const std::vector<float> read = dequantized(blocks);
            for (std::size_t at = 0; at < layout.numel; ++at) {
                const double error = std::abs(read[at] - double(values[at]));
                ASSERT_LE(error, blocks.scales[at / layout.block_size]) << name_of(layout, is_symmetric);
                ASSERT_TRUE(values[at] != 0.0f || read[at] == 0.0f);
            }
        }
    });
}

TEST(QuantizeBlockwise, RoundsToBf16AlikeInEachInstructionSet) {
    const zcore::QuantizedLayout layout{100003, 1, Format::int8};
    Blocks blocks(layout, true);
    std::mt19937 random(4);
    for (std::size_t at = 0; at < layout.numel; ++at) {
        const auto bits = static_cast<std::uint32_t>(at % 4 == 0 ? random() | 0x7f800000u : random());  // many NaN
        std::memcpy(&blocks.scales[at], &bits, sizeof bits);
        blocks.codes[at] = 1;
    }
    std::vector<std::uint16_t> here(layout.numel), there = here;
    zcore::dequantize_blockwise(blocks.view(), layout, {here.data(), Type::bf16}, 1);
    zcore::baseline::dequantize_part(blocks.view(), layout, {there.data(), Type::bf16}, 0, layout.num_blocks());
    ASSERT_EQ(here, there);
    for (std::size_t at = 0; at < layout.numel; ++at) {
        ASSERT_EQ((here[at] & 0x7fffu) > 0x7f80u, std::isnan(blocks.scales[at]));
    }
}
