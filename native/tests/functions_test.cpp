// exp, tanh and erf against libm in double: every 241st fp32 number, both signs, subnormals and infinities among them.
#define ZCORE_ISA here
#include "cpu/functions.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace {

// How many units in the last place of the rounded truth lie between both.
double units(float found, double truth) {
    const float rounded = static_cast<float>(truth);
    if (std::isinf(rounded) || std::isnan(rounded)) {
        return (std::isnan(found) && std::isnan(rounded)) || found == rounded ? 0.0 : 1e9;
    }
    const float size = std::abs(rounded);
    const double unit = static_cast<double>(std::nextafter(size, INFINITY)) - static_cast<double>(size);
    return std::abs(static_cast<double>(found) - truth) / unit;
}

template <typename Function, typename Truth>
double worst(Function function, Truth truth) {
    double largest = 0.0;
    for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 241) {
        const float x = zcore::here::float_of_bits(static_cast<std::uint32_t>(bits));
        largest = std::max(largest, units(function(x), truth(static_cast<double>(x))));
    }
    for (const float x : {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 88.72283f, 88.72284f, -103.97f, -103.98f}) {
        largest = std::max(largest, units(function(x), truth(static_cast<double>(x))));
    }
    return largest;
}

}  // namespace

TEST(Functions, AreWithinTwoUnits) {
    const double of_exp = worst(zcore::here::exp_of, [](double x) { return std::exp(x); });
    const double of_tanh = worst(zcore::here::tanh_of, [](double x) { return std::tanh(x); });
    const double of_erf = worst(zcore::here::erf_of, [](double x) { return std::erf(x); });
    std::printf("units in the last place: exp %.2f, tanh %.2f, erf %.2f\n", of_exp, of_tanh, of_erf);
    EXPECT_LE(of_exp, 2.0);
    EXPECT_LE(of_tanh, 2.0);
    EXPECT_LE(of_erf, 2.0);
}
