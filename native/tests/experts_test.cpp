// The gate of experts and rows sorted by expert against their formulas in double, and on threads 1 and 3.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "zcore/permute.hpp"
#include "zcore/topk_gate.hpp"
#include "zcore/unpermute.hpp"

namespace {

using Floats = std::vector<float>;
using Integers = std::vector<std::int64_t>;

Floats normal(std::size_t numel, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw;
    Floats values(numel);
    for (float& each : values) {
        each = draw(random);
    }
    return values;
}

Integers chosen(std::size_t numel, std::size_t num_experts, unsigned seed) {
    std::mt19937 random(seed);
    Integers values(numel);
    for (std::int64_t& each : values) {
        each = static_cast<std::int64_t>(random() % num_experts);
    }
    return values;
}

zcore::Flat flat(const Floats& values) { return {const_cast<float*>(values.data()), zcore::Type::f32}; }

std::vector<double> scores_of(const float* logits, std::size_t count, zcore::Scoring scoring) {
    std::vector<double> scores(logits, logits + count);
    for (double& each : scores) {
        each = scoring == zcore::Scoring::softmax ? std::exp(each) : 1 / (1 + std::exp(-each));
    }
    const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
    for (double& each : scores) {
        each /= scoring == zcore::Scoring::softmax ? sum : 1.0;
    }
    return scores;
}

struct Gate {
    std::size_t num_experts, k;
    zcore::Scoring scoring;
    bool is_normalised;
};

// sum(dweights weights) of a token whose experts stay as they are.
double objective(const std::vector<float>& logits, const std::int64_t* experts, const float* dweights,
                 const Gate& gate) {
    const std::vector<double> scores = scores_of(logits.data(), logits.size(), gate.scoring);
    double total = 0.0, sum = 0.0;
    for (std::size_t each = 0; each < gate.k; ++each) {
        total += scores[static_cast<std::size_t>(experts[each])];
    }
    for (std::size_t each = 0; each < gate.k; ++each) {
        sum += dweights[each] * scores[static_cast<std::size_t>(experts[each])] / (gate.is_normalised ? total : 1.0);
    }
    return sum;
}

constexpr std::size_t tokens = 37;

}  // namespace

TEST(TopkGate, ChoosesAndWeighsAsTheFormulaSays) {
    for (const Gate gate : {Gate{1, 1, zcore::Scoring::softmax, true}, Gate{16, 2, zcore::Scoring::softmax, true},
                            Gate{17, 17, zcore::Scoring::sigmoid, true}, Gate{300, 8, zcore::Scoring::softmax, false},
                            Gate{257, 3, zcore::Scoring::sigmoid, false}}) {
        const Floats logits = normal(tokens * gate.num_experts, 1), dweights = normal(tokens * gate.k, 2);
        Floats weights(tokens * gate.k), dlogits(logits.size());
        Integers experts(tokens * gate.k);
        zcore::topk_gate({flat(logits), {}, weights.data(), experts.data(), tokens, gate.num_experts, gate.k,
                          gate.scoring, gate.is_normalised}, 3);
        zcore::topk_gate_backward({dweights.data(), flat(logits), weights.data(), experts.data(), flat(dlogits), tokens,
                                   gate.num_experts, gate.k, gate.scoring, gate.is_normalised}, 3);
        for (std::size_t token = 0; token < tokens; ++token) {
            const Floats row(logits.begin() + static_cast<std::ptrdiff_t>(token * gate.num_experts),
                             logits.begin() + static_cast<std::ptrdiff_t>((token + 1) * gate.num_experts));
            const float* const given = dweights.data() + token * gate.k;
            const std::int64_t* const found = experts.data() + token * gate.k;
            Integers order(gate.num_experts);
            std::iota(order.begin(), order.end(), 0);
            std::stable_sort(order.begin(), order.end(), [&](std::int64_t one, std::int64_t other) {
                return row[static_cast<std::size_t>(one)] > row[static_cast<std::size_t>(other)];
            });
            double total = 0.0;
            for (std::size_t each = 0; each < gate.k; ++each) {
                ASSERT_EQ(found[each], order[each]);
                total += weights[token * gate.k + each];
            }
            if (gate.is_normalised) {
                ASSERT_NEAR(total, 1.0, 1e-6);
            }
            double expected = 0.0;
            for (std::size_t each = 0; each < gate.k; ++each) {
                expected += double{given[each]} * weights[token * gate.k + each];
            }
            ASSERT_NEAR(objective(row, found, given, gate), expected, 1e-6 * static_cast<double>(gate.k));
            for (std::size_t expert = 0; expert < gate.num_experts; ++expert) {
                Floats more = row, less = row;
                more[expert] += 0.0078125f, less[expert] -= 0.0078125f;
                const double slope = (objective(more, found, given, gate) - objective(less, found, given, gate)) / 0.015625;
                ASSERT_NEAR(dlogits[token * gate.num_experts + expert], slope, 2e-5);
            }
        }
    }
}

TEST(TopkGate, PutsNanFirstAndTheLowerOfEquals) {
    constexpr float nan = std::numeric_limits<float>::quiet_NaN();
    const Floats logits = {0, 0, 0, 0, 1, nan, 1, nan}, bias = {0, 0, 0, 9};
    Floats weights(4);
    Integers experts(4);
    zcore::topk_gate({flat(logits), {}, weights.data(), experts.data(), 2, 4, 2, zcore::Scoring::sigmoid, false}, 1);
    EXPECT_EQ(experts, (Integers{0, 1, 1, 3}));
    zcore::topk_gate({flat(logits), flat(bias), weights.data(), experts.data(), 1, 4, 2, zcore::Scoring::sigmoid, false}, 1);
    EXPECT_EQ((Integers{experts[0], experts[1]}), (Integers{3, 0}));
    EXPECT_FLOAT_EQ(weights[0], 0.5f);
}

TEST(Permute, SortsRowsByExpertAndUnpermuteAddsThemUp) {
    for (const auto& [hidden, k] : {std::pair<std::size_t, std::size_t>{1, 1}, {7, 2}, {300, 3}, {0, 2}, {5, 0}}) {
        constexpr std::size_t num_experts = 6;
        const Floats x = normal(tokens * hidden, 1), weights = normal(tokens * k, 2), dout = normal(tokens * hidden, 3);
        const Integers experts = chosen(tokens * k, num_experts - 1, 4);  // the last has none
        Floats rows(tokens * k * hidden), out(x.size()), alone(x.size()), drows(rows.size()), dweights(weights.size());
        Integers counts(num_experts, -1), places(experts.size());
        zcore::permute({flat(x), experts.data(), flat(rows), counts.data(), places.data(), tokens, hidden, k,
                        num_experts}, 3);
        ASSERT_TRUE(zcore::is_permutation(places.data(), places.size()));
        ASSERT_EQ(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}), places.size());
        ASSERT_EQ(counts.back(), 0);
        for (std::size_t one = 0; one < places.size(); ++one) {
            for (std::size_t other = one + 1; other < places.size(); ++other) {
                ASSERT_EQ(places[one] < places[other], experts[one] <= experts[other]);
            }
            for (std::size_t at = 0; at < hidden; ++at) {
                ASSERT_EQ(rows[static_cast<std::size_t>(places[one]) * hidden + at], x[one / k * hidden + at]);
            }
        }
        zcore::unpermute({flat(rows), places.data(), flat(weights), flat(out), tokens, hidden, k}, 3);
        zcore::unpermute({flat(rows), places.data(), flat(weights), flat(alone), tokens, hidden, k}, 1);
        EXPECT_EQ(out, alone);
        zcore::unpermute_backward({flat(dout), flat(rows), places.data(), flat(weights), flat(drows), flat(dweights),
                                   tokens, hidden, k}, 3);
        for (std::size_t token = 0; token < tokens; ++token) {
            double factor = 0.0;
            for (std::size_t choice = token * k; choice < (token + 1) * k; ++choice) {
                factor += weights[choice];
                double product = 0.0;
                for (std::size_t at = 0; at < hidden; ++at) {
                    product += double{dout[token * hidden + at]} * x[token * hidden + at];
                    ASSERT_EQ(drows[static_cast<std::size_t>(places[choice]) * hidden + at],
                              weights[choice] * dout[token * hidden + at]);
                }
                ASSERT_NEAR(dweights[choice], product, 1e-4);
            }
            for (std::size_t at = 0; at < hidden; ++at) {
                ASSERT_NEAR(out[token * hidden + at], factor * x[token * hidden + at], 1e-5);
            }
        }
    }
}

TEST(Permute, KnowsWhatIsNoPermutation) {
    for (const Integers& wrong : {Integers{0, 0}, Integers{0, 2}, Integers{-1, 0}}) {
        EXPECT_FALSE(zcore::is_permutation(wrong.data(), wrong.size()));
    }
    EXPECT_TRUE(zcore::is_permutation(nullptr, 0));
}
