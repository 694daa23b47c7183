#include "cpu/dynamic_code.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "zcore/adamw_step.hpp"

namespace {

constexpr zcore::AdamW hyper{1e-2, 0.9, 0.99, 1e-8, 0.1, 0.271, 0.172338, 0.5, true};

// Parameters and gradients in fp32, both averages in codes.
struct State {
    std::vector<float> p, g;
    std::vector<std::uint8_t> m, v;
    std::vector<float> m_scales, v_scales;

    explicit State(std::size_t numel)
        : p(numel), g(numel), m(numel, 127), v(numel), m_scales(blocks(numel)), v_scales(blocks(numel)) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        for (std::size_t at = 0; at < numel; ++at) {
            p[at] = normal(random), g[at] = normal(random);
        }
    }

    static std::size_t blocks(std::size_t numel) {
        return (numel + zcore::code_block_numel - 1) / zcore::code_block_numel;
    }

    // `begin` is a whole number of blocks.
    zcore::AdamWPiece piece(std::size_t begin, std::size_t end) {
        const std::size_t block = begin / zcore::code_block_numel;
        return {{&p[begin]},
                {&g[begin]},
                {&m[begin], zcore::Type::signed_code, &m_scales[block]},
                {&v[begin], zcore::Type::unsigned_code, &v_scales[block]},
                {},
                end - begin};
    }
};

}  // namespace

TEST(DynamicCode, AscendsFromOneEndToTheOther) {
    for (const zcore::DynamicCode* code : {&zcore::signed_dynamic_code, &zcore::unsigned_dynamic_code}) {
        EXPECT_EQ(code->values[255], 1.0f);
        for (int each = 0; each < 255; ++each) {
            EXPECT_LT(code->values[each], code->values[each + 1]);
            EXPECT_LE(code->values[each], code->bounds[each]);
            EXPECT_LT(code->bounds[each], code->values[each + 1]);
        }
    }
    EXPECT_EQ(zcore::signed_dynamic_code.values[0], -1.0f);
    EXPECT_EQ(zcore::signed_dynamic_code.values[127], 0.0f);
    EXPECT_EQ(zcore::unsigned_dynamic_code.values[0], 0.0f);
}

TEST(DynamicCode, HasNoTwoBoundsWithTheSameUpperBits) {
    for (const zcore::DynamicCode* code : {&zcore::signed_dynamic_code, &zcore::unsigned_dynamic_code}) {
        for (int each = 0; each < 254; ++each) {
            const auto upper = [&](int at) { return std::bit_cast<std::uint32_t>(code->bounds[at]) >> 16; };
            EXPECT_NE(upper(each), upper(each + 1));
        }
    }
}

TEST(DynamicCode, KeepsTheLargestOfABlockAndWhatIsAboveZero) {
    State state(300);
    state.g[5] = -100.0f;
    const zcore::AdamWPiece pieces[] = {state.piece(0, 300)};
    zcore::adamw_step(pieces, hyper, 1);
    EXPECT_EQ(state.m[5], 0);  // -1 times the scale
    EXPECT_NEAR(state.m_scales[0], 0.1 * 50.0, 1e-5);
    EXPECT_EQ(state.v[5], 255);
    EXPECT_LT(state.m_scales[1], 1.0f);  // another block
    for (const std::uint8_t code : state.v) {
        EXPECT_GT(code, 0);
    }
}

TEST(DynamicCode, IsTheSameInPiecesAndOnAnyNumberOfThreads) {
    State whole(70001), cut = whole;
    const zcore::AdamWPiece one[] = {whole.piece(0, 70001)};
    const zcore::AdamWPiece several[] = {cut.piece(0, 256), cut.piece(256, 51200), cut.piece(51200, 70001)};
    for (int step = 0; step < 3; ++step) {
        zcore::adamw_step(one, hyper, 1);
        zcore::adamw_step(several, hyper, 3);
    }
    EXPECT_EQ(whole.p, cut.p);
    EXPECT_EQ(whole.m, cut.m);
    EXPECT_EQ(whole.v, cut.v);
    EXPECT_EQ(whole.m_scales, cut.m_scales);
    EXPECT_EQ(whole.v_scales, cut.v_scales);
}

TEST(DynamicCode, KeepsNaNToItsBlock) {
    State state(600);
    state.g[300] = std::numeric_limits<float>::quiet_NaN();
    const zcore::AdamWPiece pieces[] = {state.piece(0, 600)};
    zcore::adamw_step(pieces, hyper, 1);
    EXPECT_TRUE(std::isnan(state.m_scales[1]));
    EXPECT_TRUE(std::isfinite(state.m_scales[0]) && std::isfinite(state.m_scales[2]));
    EXPECT_TRUE(std::isnan(state.p[300]));
    EXPECT_TRUE(std::isfinite(state.p[301]));  // from the next step on it is NaN as well
}
