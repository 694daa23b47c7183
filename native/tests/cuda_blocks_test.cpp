// The kernels of cuda/ for quantised blocks, signs and roundings, run on the CPU (cuda_on_host.hpp) beside the CPU's
// ops: the same bits.
#include "zcore/cuda/blocks.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "tests/quantized_blocks.hpp"
#include "zcore/dequantize_blockwise.hpp"
#include "zcore/dequantize_reduce_requantize.hpp"
#include "zcore/pack_signs.hpp"
#include "zcore/quantize_blockwise.hpp"
#include "zcore/round_stochastic.hpp"
#include "zcore/round_with_noise.hpp"
#include "zcore/unpack_signs.hpp"

namespace {

using namespace quantized_blocks;
using zcore::Flat;
using zcore::QuantizedLayout;
using zcore::Rounding;
using zcore::SignsLayout;
using zcore::Type;

constexpr std::uint64_t next_key = (std::uint64_t{1} << 33) - 37;  // 37 elements before the key of noise changes

// Draws what to try, the same in each run.
struct Draw {
    std::mt19937 random;
    explicit Draw(unsigned seed) : random(seed) {}

    template <typename Value>
    Value of(std::initializer_list<Value> values) {
        return values.begin()[random() % values.size()];
    }
    unsigned seed() { return static_cast<unsigned>(random()); }
    bool coin() { return random() % 2 == 0; }
    std::size_t numel() { return of<std::size_t>({0, 1, 3, 4, 7, 8, 33, 255, 1001, 4096, 4099, 8197, 17001}); }
    Rounding rounding() { return {coin(), random(), of<std::uint64_t>({0, 1, 5, next_key, next_key - 4000})}; }
    QuantizedLayout layout() {
        const Format format = of({Format::int8, Format::int4, Format::e4m3, Format::e5m2});
        const auto odd = of<std::size_t>({1, 3, 7, 255, 4095, 5001}), even = 2 * of<std::size_t>({1, 3, 125, 2501});
        const auto usual = of<std::size_t>(
            {4, 8, 12, 16, 32, 48, 64, 100, 128, 256, 384, 512, 1024, 4096, 8192, 16384});
        return {numel(), random() % 3 != 0 ? usual : format == Format::int4 || coin() ? even : odd, format};
    }
    bool is_symmetric(Format format) { return !is_integer(format) || coin(); }
};

// Memory of floats of any type, some elements past an aligned address.
struct Floats {
    std::vector<float> memory;
    Type type;
    std::size_t shift, numel;

    Floats(std::size_t count, Type of, std::size_t shifted, unsigned seed, float mean = 0.0f, bool has_special = false)
        : memory(count + shifted), type(of), shift(shifted), numel(count) {
        std::vector<float> values = random_values(count, seed, mean);
        if (has_special && count > 0) {
            std::mt19937 random(seed);
            for (const float special : {0.0f, -0.0f, 1e-40f, 3e38f, INFINITY, NAN}) {
                values[random() % count] = special;
            }
        }
        for (std::size_t at = 0; at < count; ++at) {
            set(at, values[at]);
        }
    }

    std::size_t width() const { return type == Type::f32 ? 4 : 2; }
    char* address(std::size_t at) { return reinterpret_cast<char*>(memory.data()) + (shift + at) * width(); }
    Flat view() { return {address(0), type}; }

    void set(std::size_t at, float value) {
        std::uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        bits = type == Type::f32 ? bits : bits >> 16;  // of fp16 other numbers, and that is as good
        std::memcpy(address(at), &bits, width());
    }

    // Bit for bit, but that one NaN is as good as another, in front of the elements as well.
    bool operator==(const Floats& other) const {
        for (std::size_t at = 0; at < shift + numel; ++at) {
            std::uint32_t one = 0, another = 0;
            std::memcpy(&one, reinterpret_cast<const char*>(memory.data()) + at * width(), width());
            std::memcpy(&another, reinterpret_cast<const char*>(other.memory.data()) + at * width(), width());
            const std::uint32_t infinity = type == Type::f32 ? 0x7f800000u : type == Type::bf16 ? 0x7f80u : 0x7c00u;
            const std::uint32_t magnitude = type == Type::f32 ? 0x7fffffffu : 0x7fffu;
            const bool are_nan = (one & magnitude) > infinity && (another & magnitude) > infinity;
            if (one != another && !are_nan) {
                return false;
            }
        }
        return true;
    }
};

std::string name_of(const QuantizedLayout& layout, bool is_symmetric, const Rounding& rounding) {
    return "format " + std::to_string(static_cast<int>(layout.format)) + (is_symmetric ? "" : " asymmetric") +
           (rounding.is_stochastic ? " stochastic" : "") + ", " + std::to_string(layout.numel) + " in blocks of " +
           std::to_string(layout.block_size);
}

}  // namespace

TEST(CudaBlocks, QuantizeAndReadLikeTheCpu) {
    Draw draw(1);
    for (int turn = 0; turn < 150; ++turn) {
        const QuantizedLayout layout = draw.layout();
        const bool is_symmetric = draw.is_symmetric(layout.format);
        const Rounding rounding = draw.rounding();
        const Type type = draw.of({Type::f32, Type::bf16, Type::f16});
        const auto shift = draw.of<std::size_t>({0, 0, 1, 3});
        Floats values(layout.numel, type, shift, draw.seed(), draw.coin() ? 0.0f : 5.0f, draw.coin());
        Blocks here(layout, is_symmetric, shift), there = here;
        zcore::quantize_blockwise(values.view(), here.view(), layout, rounding, 1);
        zcore::cuda::quantize_blockwise(values.view(), there.view(), layout, rounding, nullptr);
        ASSERT_TRUE(here == there) << name_of(layout, is_symmetric, rounding);
        Floats read(layout.numel, type, shift, 0), same = read;
        zcore::dequantize_blockwise(here.view(), layout, read.view(), 1);
        zcore::cuda::dequantize_blockwise(here.view(), layout, same.view(), nullptr);
        ASSERT_TRUE(read == same) << name_of(layout, is_symmetric, rounding);
    }
}

TEST(CudaBlocks, ReadEveryCode) {
    for (const Format format : formats) {
        const QuantizedLayout layout{512, 256, format};
        Blocks blocks(layout, true);
        blocks.scales = {0.5f, -3.0f};
        for (std::size_t at = 0; at < blocks.codes.size(); ++at) {
            blocks.codes[at] = static_cast<std::uint8_t>(at);
        }
        Floats read(layout.numel, Type::f32, 0, 0), same = read;
        zcore::dequantize_blockwise(blocks.view(), layout, read.view(), 1);
        zcore::cuda::dequantize_blockwise(blocks.view(), layout, same.view(), nullptr);
        EXPECT_TRUE(read == same);
    }
}

TEST(CudaBlocks, ReduceLikeTheCpu) {
    Draw draw(2);
    for (int turn = 0; turn < 60; ++turn) {
        const QuantizedLayout layout = draw.layout();
        const bool is_symmetric = draw.is_symmetric(layout.format);
        const Rounding rounding = draw.rounding();
        const auto count = draw.of<std::size_t>({1, 2, 3, 8, 17});
        std::vector<Blocks> shards;
        std::vector<zcore::Quantized> views;
        for (std::size_t each = 0; each < count; ++each) {
            Floats values(layout.numel, Type::f32, 0, draw.seed(), 0.0f, draw.seed() % 8 == 0);
            shards.emplace_back(layout, is_symmetric, each % 4);
            zcore::quantize_blockwise(values.view(), shards.back().view(), layout, {}, 1);
        }
        std::transform(shards.begin(), shards.end(), std::back_inserter(views),
                       [](Blocks& each) { return each.view(); });
        const float factor = draw.coin() ? 1.0f : 1.0f / static_cast<float>(count);
        Blocks here(layout, is_symmetric);
        zcore::dequantize_reduce_requantize(views, factor, here.view(), layout, rounding, 1);
        Blocks there = here;
        zcore::cuda::dequantize_reduce_requantize(views, factor, there.view(), layout, rounding, nullptr);
        ASSERT_TRUE(here == there) << name_of(layout, is_symmetric, rounding) << ", " << count << " shards";
        zcore::cuda::dequantize_reduce_requantize(views, factor, views[0], layout, rounding, nullptr);  // in place
        ASSERT_EQ(shards[0].scales.size(), here.scales.size());
        ASSERT_TRUE(std::equal(here.codes.begin(), here.codes.end(), shards[0].codes.begin()));
    }
}

TEST(CudaBlocks, RefuseNoShardsAndTooMany) {
    const QuantizedLayout layout{1, 2, Format::int8};
    Blocks out(layout, true);
    const std::vector<zcore::Quantized> many(zcore::cuda::largest_num_shards + 1, out.view());
    EXPECT_THROW(zcore::cuda::dequantize_reduce_requantize({}, 1.0f, out.view(), layout, {}, nullptr),
                 std::invalid_argument);
    EXPECT_THROW(zcore::cuda::dequantize_reduce_requantize(many, 1.0f, out.view(), layout, {}, nullptr),
                 std::invalid_argument);
}

TEST(CudaBlocks, PackSignsLikeTheCpu) {
    Draw draw(3);
    for (int turn = 0; turn < 80; ++turn) {
        const SignsLayout layout{
            draw.numel(), draw.of<std::size_t>({8, 16, 24, 32, 64, 256, 264, 2048, 4104, 12032, 12272, 16384})};
        const Type type = draw.of({Type::f32, Type::bf16, Type::f16});
        const auto shift = draw.of<std::size_t>({0, 0, 1, 3});
        Floats values(layout.numel, type, shift, draw.seed()), error(layout.numel, Type::f32, shift, draw.seed());
        if (draw.coin() && layout.numel > 0) {
            values.set(draw.seed() % layout.numel, NAN);
        }
        std::vector<std::uint8_t> signs((layout.numel + 7) / 8, 0xee);
        std::vector<float> scales(layout.num_blocks(), -1.0f);
        Floats error_there = error;
        std::vector<std::uint8_t> signs_there = signs;
        std::vector<float> scales_there = scales;
        zcore::pack_signs(values.view(), reinterpret_cast<float*>(error.address(0)), signs.data(),
                          scales.data(), layout, 1);
        zcore::cuda::pack_signs(values.view(), reinterpret_cast<float*>(error_there.address(0)), signs_there.data(),
                                scales_there.data(), layout, nullptr);
        const std::string name = std::to_string(layout.numel) + " in blocks of " + std::to_string(layout.block_size);
        ASSERT_EQ(signs, signs_there) << name;
        ASSERT_TRUE(scales.empty() || std::memcmp(scales.data(), scales_there.data(), scales.size() * 4) == 0) << name;
        ASSERT_TRUE(error == error_there) << name;
        Floats read(layout.numel, type, shift, 0), same = read;
        zcore::unpack_signs(signs.data(), scales.data(), layout, read.view(), 1);
        zcore::cuda::unpack_signs(signs.data(), scales.data(), layout, same.view(), nullptr);
        ASSERT_TRUE(read == same) << name;
    }
}

TEST(CudaBlocks, RoundLikeTheCpu) {
    Draw draw(4);
    for (int turn = 0; turn < 60; ++turn) {
        const std::size_t numel = draw.numel();
        const auto shift = draw.of<std::size_t>({0, 0, 1, 3});
        const Rounding rounding = draw.rounding();
        Floats values(numel, Type::f32, shift, draw.seed(), 0.0f, draw.coin());
        Floats out(numel, Type::bf16, shift, 0), same = out;
        const auto* const from = reinterpret_cast<const float*>(values.address(0));
        auto* const to = reinterpret_cast<std::uint16_t*>(out.address(0));
        auto* const to_there = reinterpret_cast<std::uint16_t*>(same.address(0));
        zcore::round_stochastic(from, to, numel, rounding.seed, rounding.offset, 1);
        zcore::cuda::round_stochastic(from, to_there, numel, rounding.seed, rounding.offset, nullptr);
        ASSERT_TRUE(out == same) << numel;
        std::vector<std::int32_t> noise(numel);
        std::generate(noise.begin(), noise.end(), [&] { return static_cast<std::int32_t>(draw.seed() >> 16); });
        zcore::round_with_noise(from, noise.data(), to, numel, 1);
        zcore::cuda::round_with_noise(from, noise.data(), to_there, numel, nullptr);
        ASSERT_TRUE(out == same) << numel;
    }
}
