// Both norms against their formulas in double, over odd sizes, with and without a residual, on one thread and on more.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "zcore/layer_norm.hpp"
#include "zcore/rms_norm.hpp"

namespace {

using Floats = std::vector<float>;

Floats normal(std::size_t numel, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> draw;
    Floats values(numel);
    for (float& each : values) {
        each = draw(random);
    }
    return values;
}

struct Case {
    std::size_t rows, hidden;
    Floats x, residual, weight, bias, dy, dsum;

    Case(std::size_t rows, std::size_t hidden)
        : rows(rows), hidden(hidden), x(normal(rows * hidden, 1)), residual(normal(rows * hidden, 2)),
          weight(normal(hidden, 3)), bias(normal(hidden, 4)), dy(normal(rows * hidden, 5)),
          dsum(normal(rows * hidden, 6)) {}
};

struct Result {
    Floats sum, y, ds, dweight, dbias;

    explicit Result(const Case& of)
        : sum(of.x.size()), y(of.x.size()), ds(of.x.size()), dweight(of.hidden), dbias(of.hidden) {}
    bool operator==(const Result&) const = default;
};

zcore::Flat flat(const Floats& values) { return {const_cast<float*>(values.data()), zcore::Type::f32}; }

Result rms(const Case& of, int threads) {
    Result out(of);
    zcore::rms_norm({flat(of.x), flat(of.residual), flat(of.weight), flat(out.sum), flat(out.y), of.rows, of.hidden,
                     1e-6f, 1.0f}, threads);
    zcore::rms_norm_backward({flat(of.dy), flat(out.sum), flat(of.weight), flat(of.dsum), flat(out.ds),
                              flat(out.dweight), of.rows, of.hidden, 1e-6f, 1.0f}, threads);
    return out;
}

Result layer(const Case& of, int threads) {
    Result out(of);
    zcore::layer_norm({flat(of.x), flat(of.residual), flat(of.weight), flat(of.bias), flat(out.sum), flat(out.y),
                       of.rows, of.hidden, 1e-5f}, threads);
    zcore::layer_norm_backward({flat(of.dy), flat(out.sum), flat(of.weight), flat(of.dsum), flat(out.ds),
                                flat(out.dweight), flat(out.dbias), of.rows, of.hidden, 1e-5f}, threads);
    return out;
}

// In double, straight from the formulas; `centred` subtracts the mean.
void expect_norm(const Case& of, const Result& out, bool centred, double eps, double offset) {
    std::vector<double> dweight(of.hidden), dbias(of.hidden);
    const double hidden = static_cast<double>(of.hidden);
    for (std::size_t row = 0; row < of.rows; ++row) {
        const std::size_t start = row * of.hidden;
        double mean = 0, square = 0, mean_u = 0, mean_un = 0;
        for (std::size_t at = 0; at < of.hidden; ++at) {
            mean += centred ? out.sum[start + at] / hidden : 0.0;
        }
        for (std::size_t at = 0; at < of.hidden; ++at) {
            square += std::pow(out.sum[start + at] - mean, 2) / hidden;
        }
        const double root = 1.0 / std::sqrt(square + eps);
        for (std::size_t at = 0; at < of.hidden; ++at) {
            const double u = of.dy[start + at] * (of.weight[at] + offset);
            mean_u += centred ? u / hidden : 0.0;
            mean_un += u * (out.sum[start + at] - mean) * root / hidden;
        }
        for (std::size_t at = 0; at < of.hidden; ++at) {
            const double n = (out.sum[start + at] - mean) * root, u = of.dy[start + at] * (of.weight[at] + offset);
            ASSERT_EQ(out.sum[start + at], of.x[start + at] + of.residual[start + at]);
            ASSERT_NEAR(out.y[start + at], n * (of.weight[at] + offset) + (centred ? of.bias[at] : 0.0), 2e-5);
            // A row of one element or two has hardly any deviation, so that r, and with it an error, is large.
            ASSERT_NEAR(out.ds[start + at], root * (u - mean_u - n * mean_un) + of.dsum[start + at], 1e-5 * (1 + root));
            dweight[at] += of.dy[start + at] * n;
            dbias[at] += of.dy[start + at];
        }
    }
    for (std::size_t at = 0; at < of.hidden; ++at) {
        ASSERT_NEAR(out.dweight[at], dweight[at], 1e-5 * (1 + std::sqrt(static_cast<double>(of.rows))));
        if (centred) {
            ASSERT_NEAR(out.dbias[at], dbias[at], 1e-5 * (1 + std::sqrt(static_cast<double>(of.rows))));
        }
    }
}

const std::pair<std::size_t, std::size_t> shapes[] = {{0, 5}, {3, 0}, {1, 1}, {3, 7}, {2, 31}, {5, 33}, {2, 256},
                                                      {3, 257}, {7, 1000}, {700, 100}};

}  // namespace

TEST(RmsNorm, IsAsTheFormulaSays) {
    for (const auto& [rows, hidden] : shapes) {
        const Case of(rows, hidden);
        expect_norm(of, rms(of, 2), false, 1e-6f, 1.0);
    }
}

TEST(LayerNorm, IsAsTheFormulaSays) {
    for (const auto& [rows, hidden] : shapes) {
        const Case of(rows, hidden);
        expect_norm(of, layer(of, 2), true, 1e-5f, 0.0);
    }
}

TEST(LayerNorm, KeepsItsDigitsFarFromZero) {
    Case of(1, 1000);
    for (std::size_t at = 0; at < of.hidden; ++at) {
        of.x[at] = 10000.0f, of.residual[at] = static_cast<float>(at % 2);
    }
    const Result out = layer(of, 1);
    for (std::size_t at = 0; at < of.hidden; ++at) {
        ASSERT_NEAR(out.y[at], (at % 2 ? 1 : -1) * of.weight[at] + of.bias[at], 1e-3);
    }
}

TEST(Norms, AreTheSameOnAnyNumberOfThreads) {
    const Case of(700, 100);
    EXPECT_EQ(rms(of, 1), rms(of, 3));
    EXPECT_EQ(layer(of, 1), layer(of, 3));
}
