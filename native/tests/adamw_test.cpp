#include "zcore/adamw_step.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

namespace {

constexpr zcore::AdamW hyper{1e-2, 0.9, 0.99, 1e-8, 0.1, 0.271, 0.172338, 0.5, true};

struct State {
    std::vector<float> p, g, m, v;

    explicit State(std::size_t numel) : p(numel), g(numel), m(numel), v(numel) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        for (std::size_t at = 0; at < numel; ++at) {
            p[at] = normal(random), g[at] = normal(random), m[at] = normal(random), v[at] = std::abs(normal(random));
        }
    }

    zcore::AdamWPiece piece(std::size_t begin, std::size_t end) {
        return {{&p[begin]}, {&g[begin]}, {&m[begin]}, {&v[begin]}, {}, end - begin};
    }
};

// In double, straight from the formula.
void expect_step(const State& before, const State& after, const zcore::AdamW& h) {
    for (std::size_t at = 0; at < before.p.size(); ++at) {
        const double p = before.p[at] * (h.is_decoupled ? 1.0 - h.lr * h.weight_decay : 1.0);
        const double g = double(before.g[at]) * h.grad_factor + (h.is_decoupled ? 0.0 : h.weight_decay * p);
        const double m = before.m[at] + (1.0 - h.beta1) * (g - before.m[at]);
        const double v = h.beta2 * before.v[at] + (1.0 - h.beta2) * g * g;
        const double stepped = p - h.lr / h.bias_correction1 * m / (std::sqrt(v) / h.bias_correction2_sqrt + h.eps);
        ASSERT_NEAR(after.m[at], m, 1e-6 * (1 + std::abs(m)));
        ASSERT_NEAR(after.v[at], v, 1e-6 * (1 + v));
        ASSERT_NEAR(after.p[at], stepped, 1e-6 * (1 + std::abs(stepped)));
    }
}

}  // namespace

TEST(AdamW, StepsAsTheFormulaSays) {
    for (const bool is_decoupled : {true, false}) {
        for (const std::size_t numel : {1ul, 7ul, 255ul, 256ul, 257ul, 70001ul}) {
            State state(numel);
            const State before = state;
            zcore::AdamW h = hyper;
            h.is_decoupled = is_decoupled;
            const zcore::AdamWPiece pieces[] = {state.piece(0, numel)};
            zcore::adamw_step(pieces, h, 2);
            expect_step(before, state, h);
        }
    }
}

TEST(AdamW, IsTheSameInPiecesAndOnAnyNumberOfThreads) {
    State whole(70001), cut = whole;
    const zcore::AdamWPiece one[] = {whole.piece(0, 70001)};
    zcore::adamw_step(one, hyper, 1);
    const zcore::AdamWPiece several[] = {cut.piece(0, 1), cut.piece(1, 1), cut.piece(1, 50000), cut.piece(50000, 70001)};
    zcore::adamw_step(several, hyper, 3);
    EXPECT_EQ(whole.p, cut.p);
    EXPECT_EQ(whole.m, cut.m);
    EXPECT_EQ(whole.v, cut.v);
}

TEST(AdamW, TakesNothing) { zcore::adamw_step({}, hyper, 2); }
