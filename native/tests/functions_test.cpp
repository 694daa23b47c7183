// exp and the normal distribution's tail against libm in double: every 241st fp32 number, both signs, subnormals and
// infinities among them.
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

TEST(Functions, ExponentialIsWithinTwoUnits) {
    const double found = worst(zcore::here::exp_of, [](double x) { return std::exp(x); });
    std::printf("units in the last place: %.2f\n", found);
    EXPECT_LE(found, 2.0);
}

TEST(Functions, NormalTailIsWithinAUnitOfOne) {
    double largest = 0.0;
    for (std::uint64_t bits = 0; bits <= 0x7f800000; bits += 241) {
        const float x = zcore::here::float_of_bits(static_cast<std::uint32_t>(bits));
        const double truth = 0.5 * std::erfc(static_cast<double>(x) / std::sqrt(2.0));
        largest = std::max(largest, std::abs(static_cast<double>(zcore::here::normal_tail_of(x)) - truth));
    }
    std::printf("largest error: %.2g\n", largest);
    EXPECT_LE(largest, 7e-8);  // 6.2e-8 without FMA
    EXPECT_EQ(zcore::here::normal_tail_of(0.0f), 0.5f);
    EXPECT_EQ(zcore::here::normal_tail_of(INFINITY), 0.0f);
}
