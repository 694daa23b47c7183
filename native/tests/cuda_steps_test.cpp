// The arithmetic, layout and codes of the CUDA kernels beside the ops of the CPU, to the bit, without a GPU: see
// emulated_steps.hpp. Many pieces of odd sizes and alignments, every type, several launches.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <tuple>
#include <vector>

#include "cpu/dynamic_code.hpp"
#include "tests/emulated_steps.hpp"
#include "zcore/instruction_set.hpp"

namespace {

using zcore::Flat;
using zcore::Type;

using Bytes = std::vector<std::uint8_t>;
constexpr std::size_t sizes[] = {0, 1, 3, 4, 7, 127, 128, 255, 256, 257, 1023, 16384, 16385, 40001};

std::size_t bytes_of(Type type) { return type == Type::f32 ? 4 : type == Type::bf16 || type == Type::f16 ? 2 : 1; }
bool is_of_codes(Type type) { return type == Type::signed_code || type == Type::unsigned_code; }

// Memory of several pieces of one operand, each beginning `shift` elements after a multiple of 16 bytes.
struct Operand {
    Type type;
    std::vector<Bytes> data;
    std::vector<std::vector<float>> scales;
    std::size_t shift;

    Operand(const std::vector<std::size_t>& numels, Type type, std::size_t shift, std::mt19937& random,
            bool is_positive)
        : type(type), shift(shift) {
        std::normal_distribution<float> normal;
        for (const std::size_t numel : numels) {
            Bytes bytes((numel + shift) * bytes_of(type) + 64);
            for (std::size_t at = 0; at < numel; ++at) {
                float value = normal(random);
                value = is_positive ? std::abs(value) : value;
                const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
                std::uint8_t* const to = bytes.data() + (at + shift) * bytes_of(type);
                if (type == Type::f32) {
                    std::memcpy(to, &bits, 4);
                } else if (type == Type::bf16) {
                    const auto half = static_cast<std::uint16_t>(bits >> 16);
                    std::memcpy(to, &half, 2);
                } else if (type == Type::f16) {  // from 1/4 to 2
                    const std::uint32_t magnitude = 0x3400u + (bits & 0xbffu);
                    const auto half = static_cast<std::uint16_t>((bits & 0x80000000u) >> 16 | magnitude);
                    std::memcpy(to, &half, 2);
                } else {
                    *to = static_cast<std::uint8_t>(bits >> 8);
                }
            }
            data.push_back(std::move(bytes));
            std::vector<float> of_blocks((numel + 255) / 256);
            for (float& each : of_blocks) {
                each = 0.5f + std::abs(normal(random));
            }
            scales.push_back(std::move(of_blocks));
        }
    }

    Flat flat(std::size_t piece) {
        return {data[piece].data() + shift * bytes_of(type), type, is_of_codes(type) ? scales[piece].data() : nullptr};
    }

    bool operator==(const Operand& other) const { return data == other.data && scales == other.scales; }
};

struct Types {
    Type param, grad, first, second, copy;
    std::size_t shift;
};

constexpr Types kinds[] = {
    {Type::f32, Type::f32, Type::f32, Type::f32, Type::bf16, 0},
    {Type::f32, Type::bf16, Type::bf16, Type::f32, Type::f16, 1},
    {Type::bf16, Type::f16, Type::f16, Type::bf16, Type::f32, 2},
    {Type::f16, Type::f32, Type::signed_code, Type::unsigned_code, Type::bf16, 0},
    {Type::f32, Type::bf16, Type::signed_code, Type::unsigned_code, Type::bf16, 3},
};

// All operands of a step; two of one seed are equal.
struct State {
    std::vector<std::size_t> numels;
    Operand param, grad, first, second, copy;

    State(const std::vector<std::size_t>& numels, const Types& types, Type one_state,
          std::mt19937 random = std::mt19937(7))
        : numels(numels),
          param(numels, types.param, types.shift, random, false),
          grad(numels, types.grad, types.shift, random, false),
          first(numels, one_state, types.shift, random, one_state == Type::unsigned_code),
          second(numels, types.second, types.shift, random, true),
          copy(numels, types.copy, types.shift, random, false) {}
    State(const std::vector<std::size_t>& numels, const Types& types) : State(numels, types, types.first) {}

    template <typename Piece>
    std::vector<Piece> pieces() {
        std::vector<Piece> made;
        for (std::size_t index = 0; index < numels.size(); ++index) {
            const Flat p = param.flat(index), g = grad.flat(index), m = first.flat(index), low = copy.flat(index);
            if constexpr (requires(Piece piece) { piece.exp_avg_sq; }) {
                made.push_back({p, g, m, second.flat(index), low, numels[index]});
            } else {
                made.push_back({p, g, m, low, numels[index]});
            }
        }
        return made;
    }

    void expect_equal(const State& other) const {
        EXPECT_TRUE(param == other.param);
        EXPECT_TRUE(first == other.first);
        EXPECT_TRUE(second == other.second);
        EXPECT_TRUE(copy == other.copy);
    }
};

std::vector<std::size_t> all_sizes() { return {std::begin(sizes), std::end(sizes)}; }

// Every size, and so many small pieces that they take several launches.
std::vector<std::size_t> many_sizes() {
    std::vector<std::size_t> numels = all_sizes();
    while (numels.size() < 2 * zcore::emulated::adamw_capacity() + 3) {
        numels.push_back(numels.size() % 5);
    }
    return numels;
}

class CudaSteps : public testing::Test {
protected:
    // What rounds a b + c twice has other bits than a GPU, and the kernels are compiled with FMA here, too.
    void SetUp() override {
        if (zcore::name_of(zcore::instruction_set()) == std::string("baseline")) {
            GTEST_SKIP() << "the instruction set has no FMA";
        }
    }
};

// Runs `on_cpu` and `emulated` on equal operands of every kind.
template <typename Piece, typename OnCpu, typename Emulated>
void compare(const OnCpu& on_cpu, const Emulated& emulated, Type code = Type::signed_code) {
    for (const Types& types : kinds) {
        const Type one_state = is_of_codes(types.first) ? code : types.first;
        State left(many_sizes(), types, one_state), right(many_sizes(), types, one_state);
        const auto of_cpu = left.pieces<Piece>(), of_cuda = right.pieces<Piece>();
        on_cpu(std::span<const Piece>(of_cpu));
        emulated(of_cuda.data(), of_cuda.size());
        left.expect_equal(right);
    }
}

constexpr float on_device = 0.375f;

}  // namespace

TEST_F(CudaSteps, AdamWHasTheBitsOfTheCpu) {
    for (const bool is_decoupled : {true, false}) {
        zcore::AdamW hyper{1e-2, 0.9, 0.99, 1e-8, 0.1, 0.271, 0.172338, 0.7, is_decoupled};
        compare<zcore::AdamWPiece>(
            [&](auto pieces) { zcore::adamw_step(pieces, hyper, 2); },
            [&](auto... of) { zcore::emulated::adamw_step(of..., hyper, nullptr); });
        zcore::AdamW folded = hyper;
        folded.grad_factor = hyper.grad_factor * static_cast<double>(on_device);
        compare<zcore::AdamWPiece>(
            [&](auto pieces) { zcore::adamw_step(pieces, folded, 1); },
            [&](auto... of) { zcore::emulated::adamw_step(of..., hyper, &on_device); });
    }
}

TEST_F(CudaSteps, AdagradHasTheBitsOfTheCpu) {
    const zcore::Adagrad hyper{1e-2, 1e-10, 0.1, 0.7};
    compare<zcore::AdagradPiece>([&](auto pieces) { zcore::adagrad_step(pieces, hyper, 1); },
                                 [&](auto... of) { zcore::emulated::adagrad_step(of..., hyper, nullptr); },
                                 Type::unsigned_code);
}

TEST_F(CudaSteps, LionHasTheBitsOfTheCpu) {
    const zcore::Lion hyper{1e-2, 0.9, 0.99, 0.1, 0.7};
    compare<zcore::LionPiece>([&](auto pieces) { zcore::lion_step(pieces, hyper, 1); },
                              [&](auto... of) { zcore::emulated::lion_step(of..., hyper, nullptr); });
}

TEST_F(CudaSteps, SgdHasTheBitsOfTheCpu) {
    for (const auto& [is_nesterov, is_first] : {std::tuple(false, false), {true, false}, {false, true}}) {
        const zcore::Sgd hyper{1e-2, 0.9, 0.1, 0.1, is_nesterov, is_first, 0.7};
        compare<zcore::SgdPiece>([&](auto pieces) { zcore::sgd_step(pieces, hyper, 1); },
                                 [&](auto... of) { zcore::emulated::sgd_step(of..., hyper, nullptr); });
    }
    const zcore::Sgd hyper{1e-2, 0.0, 0.0, 0.1, false, false, 0.7};
    const auto without = [](std::span<const zcore::SgdPiece> pieces) {
        std::vector<zcore::SgdPiece> bare(pieces.begin(), pieces.end());
        for (zcore::SgdPiece& piece : bare) {
            piece.momentum_buffer = {};
        }
        return bare;
    };
    compare<zcore::SgdPiece>([&](auto pieces) { zcore::sgd_step(without(pieces), hyper, 1); },
                             [&](const zcore::SgdPiece* pieces, std::size_t count) {
                                 const auto bare = without({pieces, count});
                                 zcore::emulated::sgd_step_without_momentum(bare.data(), count, hyper, nullptr);
                             });
}

TEST_F(CudaSteps, LambHasTheBitsOfTheCpu) {
    const zcore::Lamb hyper{1e-2, 0.9, 0.99, 1e-8, 0.1, 0.271, 0.172338, 0.7};
    std::vector<zcore::LambSquares> of_cpu, of_cuda;
    compare<zcore::LambPiece>([&](auto pieces) { of_cpu = zcore::lamb_average(pieces, hyper, 1); },
                              [&](const zcore::LambPiece* pieces, std::size_t count) {
                                  of_cuda.assign(count, {});
                                  zcore::emulated::lamb_average(pieces, count, hyper, nullptr, of_cuda.data());
                              });
    for (std::size_t index = 0; index < of_cpu.size(); ++index) {
        EXPECT_NEAR(of_cuda[index].param, of_cpu[index].param, 1e-12 * of_cpu[index].param);
        EXPECT_NEAR(of_cuda[index].update, of_cpu[index].update, 1e-12 * of_cpu[index].update);
    }
    std::vector<double> ratios;
    for (std::size_t index = 0; index < of_cpu.size(); ++index) {
        ratios.push_back(0.25 + static_cast<double>(index % 7));
    }
    compare<zcore::LambPiece>([&](auto pieces) { zcore::lamb_apply(pieces, ratios, hyper, 1); },
                              [&](auto... of) { zcore::emulated::lamb_apply(of..., ratios.data(), hyper); });
}

TEST_F(CudaSteps, NormIsTheSumOfSquaresAndFiniteOnlyWhereAllAre) {
    for (const Type type : {Type::f32, Type::bf16, Type::f16}) {
        for (const std::size_t shift : {0ul, 1ul}) {
            State state(all_sizes(), {type, type, type, type, type, shift});
            for (std::size_t index = 0; index < state.numels.size(); ++index) {
                const zcore::NormPiece piece{state.param.flat(index), state.numels[index]};
                const double expected = zcore::squared_norm({{piece}}, 1);
                EXPECT_NEAR(zcore::emulated::squared_norm(piece), expected, 1e-12 * expected);
            }
        }
    }
    std::vector<float> values(5000, 1e38f);
    EXPECT_TRUE(std::isfinite(zcore::emulated::squared_norm({{values.data()}, values.size()})));
    values[4999] = INFINITY;
    EXPECT_TRUE(std::isinf(zcore::emulated::squared_norm({{values.data()}, values.size()})));
    values[0] = NAN;
    EXPECT_TRUE(std::isnan(zcore::emulated::squared_norm({{values.data()}, values.size()})));
}

TEST_F(CudaSteps, BlocksOfCodesWithZerosOrWhatIsNotFiniteAreThoseOfTheCpu) {
    const zcore::Lion hyper{0.0, 0.0, 0.0, 0.0, 1.0};  // the state becomes the gradient
    for (const float special : {0.0f, INFINITY, NAN}) {
        std::vector<float> grad(600, 0.0f), param(600);
        grad[300] = special;
        std::vector<std::uint8_t> left(600, 9), right(600, 9);
        std::vector<float> left_scales(3, 1.0f), right_scales(3, 1.0f);
        const auto piece = [&](std::vector<std::uint8_t>& codes, std::vector<float>& scales) -> zcore::LionPiece {
            return {{param.data()}, {grad.data()}, {codes.data(), Type::signed_code, scales.data()}, {}, 600};
        };
        const zcore::LionPiece on_cpu[] = {piece(left, left_scales)}, on_cuda[] = {piece(right, right_scales)};
        zcore::lion_step(on_cpu, hyper, 1);
        zcore::emulated::lion_step(on_cuda, 1, hyper, nullptr);
        EXPECT_EQ(left, right);
        EXPECT_EQ(std::memcmp(left_scales.data(), right_scales.data(), 12), 0);
        EXPECT_EQ(std::isnan(right_scales[1]), !std::isfinite(special));
    }
}

TEST_F(CudaSteps, CodesAreThoseOfTheTable) {
    for (const bool is_signed : {true, false}) {
        const zcore::DynamicCode& table = is_signed ? zcore::signed_dynamic_code : zcore::unsigned_dynamic_code;
        const auto expected = [&](float relative) {
            const std::uint8_t lowest = table.lowest[std::bit_cast<std::uint32_t>(relative) >> 16];
            return lowest + (relative > table.bounds[lowest] ? 1 : 0);
        };
        const auto compare = [&](float relative) {
            ASSERT_EQ(zcore::emulated::code_of(relative, is_signed), expected(relative)) << relative;
            ASSERT_LE(zcore::emulated::guess_off_by(relative, is_signed), 1) << relative;
        };
        for (int code = 0; code < zcore::code_count; ++code) {
            ASSERT_EQ(zcore::emulated::value_of(code, is_signed), table.values[code]) << code;
            ASSERT_EQ(zcore::emulated::bound_of(code, is_signed), table.bounds[code]) << code;
            if (code < zcore::code_count - 1) {
                const float bound = table.bounds[code];
                compare(bound);
                compare(std::nextafter(bound, 1.0f));
                if (is_signed || bound > 0.0f) {
                    compare(std::nextafter(bound, -1.0f));
                }
            }
            compare(table.values[code]);
        }
        for (std::uint32_t upper = 0; upper <= 0x3f80u; ++upper) {  // all beginnings up to 1
            const float value = std::bit_cast<float>(upper << 16);
            compare(value);
            if (is_signed) {
                compare(-value);
            }
        }
    }
}
