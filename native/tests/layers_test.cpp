// Gated units, bias-GELU, rotary embedding and dropout against their formulas in double, and on threads 1 and 3.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "zcore/bias_dropout_residual.hpp"
#include "zcore/bias_gelu.hpp"
#include "zcore/geglu.hpp"
#include "zcore/rotary.hpp"
#include "zcore/swiglu.hpp"

namespace {

using Floats = std::vector<float>;

Floats normal(std::size_t numel, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw(0.0f, 3.0f);
    Floats values(numel);
    for (float& each : values) {
        each = draw(random);
    }
    return values;
}

zcore::Flat flat(const Floats& values) { return {const_cast<float*>(values.data()), zcore::Type::f32}; }

// size: of what is rounded on the way, where that is larger than the result, as 1 + erf(x) is for x far below zero.
void expect_close(double found, double expected, double size = 0.0) {
    ASSERT_NEAR(found, expected, 1e-6 * (2 + std::abs(expected) + std::abs(size)));
}

double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu_erf(double x) { return x / 2 * (1 + std::erf(x / std::sqrt(2.0))); }
double gelu_tanh(double x) { return x / 2 * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }

// By differences, whose error of 1e-9 no test here sees.
double slope(double (*function)(double), double x) { return (function(x + 1e-5) - function(x - 1e-5)) / 2e-5; }

constexpr std::pair<std::size_t, std::size_t> shapes[] = {{0, 5}, {1, 1}, {3, 7}, {5, 33}, {3, 257}, {70, 1000}};

template <typename Forward, typename Backward>
void expect_gated(double (*activation)(double), Forward forward, Backward backward) {
    for (const auto& [rows, hidden] : shapes) {
        const Floats packed = normal(rows * 2 * hidden, 1), dout = normal(rows * hidden, 2);
        Floats out(rows * hidden), dpacked(packed.size());
        auto halves = [&, width = hidden](const Floats& of, bool up) {
            return zcore::Columns{flat(of), 2 * width, up ? width : 0};
        };
        forward(zcore::Glu{halves(packed, false), halves(packed, true), {flat(out), hidden}, rows, hidden});
        backward(zcore::GluBackward{{flat(dout), hidden}, halves(packed, false), halves(packed, true),
                                    halves(dpacked, false), halves(dpacked, true), rows, hidden});
        for (std::size_t at = 0; at < rows * hidden; ++at) {
            const std::size_t gate = at / hidden * 2 * hidden + at % hidden;
            const double g = packed[gate], up = packed[gate + hidden];
            expect_close(out[at], activation(g) * up, g * up);
            expect_close(dpacked[gate + hidden], dout[at] * activation(g), dout[at] * g);
            expect_close(dpacked[gate], dout[at] * up * slope(activation, g), dout[at] * up * (1 + g * g));
        }
    }
}

}  // namespace

TEST(SwiGlu, IsAsTheFormulaSays) {
    expect_gated(silu, [](const auto& op) { zcore::swiglu(op, 2); },
                 [](const auto& op) { zcore::swiglu_backward(op, 2); });
}

TEST(GeGlu, IsAsTheFormulaSays) {
    expect_gated(gelu_erf, [](const auto& op) { zcore::geglu(op, zcore::Gelu::erf, 2); },
                 [](const auto& op) { zcore::geglu_backward(op, zcore::Gelu::erf, 2); });
    expect_gated(gelu_tanh, [](const auto& op) { zcore::geglu(op, zcore::Gelu::tanh, 2); },
                 [](const auto& op) { zcore::geglu_backward(op, zcore::Gelu::tanh, 2); });
}

TEST(BiasGelu, IsAsTheFormulaSaysOnAnyNumberOfThreads) {
    for (const auto& [rows, hidden] : shapes) {
        const Floats x = normal(rows * hidden, 1), dout = normal(rows * hidden, 2), bias = normal(hidden, 3);
        Floats out(x.size()), dx(x.size()), dbias(hidden), again(hidden);
        zcore::bias_gelu({flat(x), flat(bias), flat(out), rows, hidden}, zcore::Gelu::erf, 2);
        zcore::bias_gelu_backward({flat(dout), flat(x), flat(bias), flat(dx), flat(dbias), rows, hidden},
                                  zcore::Gelu::erf, 3);
        zcore::bias_gelu_backward({flat(dout), flat(x), flat(bias), flat(dx), flat(again), rows, hidden},
                                  zcore::Gelu::erf, 1);
        EXPECT_EQ(dbias, again);
        std::vector<double> sums(hidden);
        for (std::size_t at = 0; at < x.size(); ++at) {
            const double sum = x[at] + bias[at % hidden];
            expect_close(out[at], gelu_erf(sum), sum);
            expect_close(dx[at], dout[at] * slope(gelu_erf, sum), dout[at] * sum);
            sums[at % hidden] += dx[at];
        }
        for (std::size_t at = 0; at < hidden; ++at) {
            ASSERT_NEAR(dbias[at], sums[at], 1e-4);
        }
    }
}

TEST(Rotary, TurnsAndTurnsBack) {
    constexpr std::size_t tokens = 3, heads = 2, dim = 10, width = 6;
    const Floats x = normal(tokens * heads * dim, 1);
    const std::int64_t position[tokens] = {4, 0, 2};
    for (const bool is_interleaved : {false, true}) {
        Floats cos(5 * width), sin(5 * width), y(x.size()), back(x.size());
        auto pair_of = [=](std::size_t at) { return is_interleaved ? at / 2 : at % (width / 2); };
        for (std::size_t at = 0; at < cos.size(); ++at) {
            const double angle = static_cast<double>(at / width) / (1.0 + static_cast<double>(pair_of(at % width)));
            cos[at] = static_cast<float>(std::cos(angle)), sin[at] = static_cast<float>(std::sin(angle));
        }
        zcore::rotary({flat(x), flat(y), flat(cos), flat(sin), position, tokens, heads, dim, width, is_interleaved,
                       false}, 2);
        zcore::rotary({flat(y), flat(back), flat(cos), flat(sin), position, tokens, heads, dim, width, is_interleaved,
                       true}, 2);
        for (std::size_t at = 0; at < x.size(); ++at) {
            const std::size_t in_head = at % dim, token = at / (heads * dim);
            ASSERT_NEAR(back[at], x[at], 1e-5);
            if (in_head >= width) {
                ASSERT_EQ(y[at], x[at]);
                continue;
            }
            const bool is_second = is_interleaved ? in_head % 2 : in_head >= width / 2;
            const std::size_t apart = is_interleaved ? 1 : width / 2;
            const double other = is_second ? x[at - apart] : -x[at + apart];
            const std::size_t table = static_cast<std::size_t>(position[token]) * width + in_head;
            expect_close(y[at], x[at] * double{cos[table]} + other * double{sin[table]});
        }
    }
}

TEST(BiasDropoutResidual, KeepsTheRightShareAndTheSameElementsBackward) {
    constexpr std::size_t rows = 700, hidden = 101;
    const Floats x(rows * hidden, 1.0f), bias(hidden, 2.0f), residual = normal(rows * hidden, 1);
    Floats out(x.size()), alone(x.size()), dx(x.size()), dbias(hidden);
    zcore::bias_dropout_residual({flat(x), flat(bias), flat(residual), flat(out), rows, hidden, 0.25, 7}, 3);
    zcore::bias_dropout_residual({flat(x), flat(bias), flat(residual), flat(alone), rows, hidden, 0.25, 7}, 1);
    zcore::bias_dropout_residual_backward({flat(x), flat(dx), flat(dbias), rows, hidden, 0.25, 7}, 3);
    EXPECT_EQ(out, alone);
    std::size_t kept = 0;
    for (std::size_t at = 0; at < x.size(); ++at) {
        expect_close(out[at], residual[at] + 3.0 * dx[at]);
        kept += dx[at] != 0.0f;
    }
    EXPECT_NEAR(static_cast<double>(kept) / static_cast<double>(x.size()), 0.75, 0.01);
}
