// The codes that a step writes, and the values that it reads, against the table of dynamic_code.hpp: the same, bit by
// bit. SGD's first step writes the gradient as its momentum.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "cpu/dynamic_code.hpp"
#include "zcore/sgd_step.hpp"

namespace {

constexpr std::size_t block = zcore::code_block_numel;

struct Coded {
    std::vector<std::uint8_t> codes;
    std::vector<float> scales;

    explicit Coded(std::size_t numel) : codes(numel), scales((numel + block - 1) / block) {}
};

const zcore::DynamicCode& table_of(zcore::Type type) {
    return type == zcore::Type::signed_code ? zcore::signed_dynamic_code : zcore::unsigned_dynamic_code;
}

Coded encode(std::vector<float> values, zcore::Type type) {
    Coded made(values.size());
    std::vector<float> param(values.size());
    const zcore::SgdPiece piece{
        {param.data()}, {values.data()}, {made.codes.data(), type, made.scales.data()}, {}, values.size()};
    zcore::sgd_step({&piece, 1}, {0.0, 0.9, 0.0, 0.0, false, true}, 1);
    return made;
}

std::vector<float> decode(Coded from, zcore::Type type) {
    std::vector<float> param(from.codes.size()), zeros(from.codes.size());
    const zcore::SgdPiece piece{
        {param.data()}, {zeros.data()}, {from.codes.data(), type, from.scales.data()}, {}, param.size()};
    zcore::sgd_step({&piece, 1}, {-1.0, 1.0, 0.0, 0.0, false, false}, 1);
    return param;
}

// By search: the first whose bound is not below the number.
std::uint8_t code_of(float relative, const zcore::DynamicCode& code) {
    const auto found = std::lower_bound(std::begin(code.bounds), std::end(code.bounds), relative);
    return static_cast<std::uint8_t>(found - std::begin(code.bounds));
}

void expect_codes_of_table(const std::vector<float>& values, zcore::Type type) {
    const Coded made = encode(values, type);
    for (std::size_t begin = 0; begin < values.size(); begin += block) {
        const std::size_t end = std::min(values.size(), begin + block);
        float scale = 0.0f;
        for (std::size_t at = begin; at < end; ++at) {
            scale = std::max(scale, std::abs(values[at]));
        }
        ASSERT_EQ(made.scales[begin / block], scale);
        for (std::size_t at = begin; at < end; ++at) {
            const float relative = scale > 0.0f ? values[at] / scale : 0.0f;
            ASSERT_EQ(+made.codes[at], +code_of(relative, table_of(type))) << values[at] << " of " << scale;
        }
    }
}

// In blocks that begin with 1, so that numbers are divided by it.
std::vector<float> with_ones(const std::vector<float>& relative) {
    std::vector<float> values;
    for (const float each : relative) {
        if (values.size() % block == 0) {
            values.push_back(1.0f);
        }
        values.push_back(each);
    }
    return values;
}

constexpr zcore::Type types[] = {zcore::Type::signed_code, zcore::Type::unsigned_code};

}  // namespace

TEST(DynamicLanes, HaveTheTablesCodesAboutEveryBoundAndValue) {
    for (const zcore::Type type : types) {
        std::vector<float> relative{0.0f, -0.0f, std::numeric_limits<float>::denorm_min(), 1.0f, -1.0f};
        const auto add_about = [&](float middle) {
            float below = middle, above = middle;
            for (int each = 0; each < 100; ++each) {
                relative.push_back(below), relative.push_back(above);
                below = std::nextafter(below, -1.0f), above = std::nextafter(above, 1.0f);
            }
        };
        for (int each = 0; each < zcore::code_count - 1; ++each) {
            add_about(table_of(type).bounds[each]);
            add_about(table_of(type).values[each]);
        }
        expect_codes_of_table(with_ones(relative), type);
    }
}

TEST(DynamicLanes, HaveTheTablesCodesOfNumbersOfAnySize) {
    for (const zcore::Type type : types) {
        std::vector<float> relative;  // every 1009th number of those from -1 to 1
        const std::uint32_t one = std::bit_cast<std::uint32_t>(1.0f);
        for (std::uint32_t bits = 0; bits <= one; bits += 1009) {
            relative.push_back(std::bit_cast<float>(bits));
            relative.push_back(-relative.back());
        }
        expect_codes_of_table(with_ones(relative), type);
    }
}

TEST(DynamicLanes, HaveTheTablesCodesOfRandomBlocks) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> exponent(-140.0f, 120.0f);
    for (const zcore::Type type : types) {
        for (const std::size_t numel : {1, 7, 15, 16, 17, 255, 256, 257, 70001}) {
            std::vector<float> values(numel);
            float size = 1.0f;
            for (std::size_t at = 0; at < numel; ++at) {
                size = at % block == 0 ? std::exp2(exponent(random)) : size;  // subnormal blocks among them
                values[at] = normal(random) * size;
                values[at] = type == zcore::Type::unsigned_code ? values[at] * (values[at] / size) : values[at];
            }
            expect_codes_of_table(values, type);
        }
    }
}

TEST(DynamicLanes, HaveTheTablesValues) {
    for (const zcore::Type type : types) {
        for (const float scale : {1.0f, 0.37f, 1e-38f, 3e38f, 0.0f}) {
            for (const std::size_t numel : {256, 250, 3}) {
                Coded coded(numel);
                coded.scales[0] = scale;
                for (std::size_t at = 0; at < numel; ++at) {
                    coded.codes[at] = static_cast<std::uint8_t>(255 - at);
                }
                const std::vector<float> values = decode(coded, type);
                for (std::size_t at = 0; at < numel; ++at) {
                    ASSERT_EQ(values[at], table_of(type).values[255 - at] * scale);
                }
            }
        }
    }
}

TEST(DynamicLanes, WriteZeroWhereABlockIsNotFinite) {
    for (const zcore::Type type : types) {
        for (const float bad : {INFINITY, -INFINITY, std::numeric_limits<float>::quiet_NaN()}) {
            std::vector<float> values(300, 0.5f);
            values[17] = bad;
            const Coded made = encode(values, type);
            EXPECT_TRUE(std::isnan(made.scales[0]));
            EXPECT_EQ(made.scales[1], 0.5f);
            EXPECT_EQ(std::count(made.codes.begin(), made.codes.begin() + block, code_of(0.0f, table_of(type))), 256);
            EXPECT_TRUE(std::isnan(decode(made, type)[3]));
        }
    }
}
