// The arithmetic of grouped products: where each group's matrices begin, what a workspace holds, what is refused.
#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <utility>
#include <vector>

#include "cutlass/groups.hpp"
#include "cutlass/requirements.hpp"

namespace {

using zcore::grouped::Cutter;
using zcore::grouped::Group;
using zcore::grouped::group_at;
using zcore::grouped::Layout;
using zcore::grouped::Products;

using Matrix = std::vector<double>;

constexpr std::int64_t in = 3, out = 2;
constexpr std::array<std::int64_t, 4> counts{2, 0, 4, 1};
constexpr std::int64_t total = 7;

Products products(Layout layout, std::int64_t m, std::int64_t n, std::int64_t k) {
    return {layout, nullptr, nullptr, nullptr, counts.data(), counts.size(), total, m, n, k};
}

Matrix ramp(std::int64_t numel, double first) {
    Matrix values(static_cast<std::size_t>(numel));
    std::iota(values.begin(), values.end(), first);
    return values;
}

// d as the descriptions of groups say it is computed, with all that is not written left at -1.
Matrix multiplied(const Products& all, const Matrix& a, const Matrix& b, std::int64_t numel) {
    Matrix d(static_cast<std::size_t>(numel), -1.0);
    const bool is_a_transposed = all.layout == Layout::transposed_by_rows;
    const bool is_b_transposed = all.layout == Layout::rows_by_transposed;
    std::int64_t end = 0;
    for (std::int64_t index = 0; index < all.num_groups; ++index) {
        const std::int64_t begin = end;
        end += counts.at(static_cast<std::size_t>(index));
        const Group group = group_at(all, index, begin, end);
        for (std::int64_t row = 0; row < group.m; ++row) {
            for (std::int64_t column = 0; column < group.n; ++column) {
                double sum = 0.0;
                for (std::int64_t each = 0; each < group.k; ++each) {
                    const std::int64_t at_a =
                        group.a + (is_a_transposed ? each * leading_a(all) + row : row * leading_a(all) + each);
                    const std::int64_t at_b =
                        group.b + (is_b_transposed ? column * leading_b(all) + each : each * leading_b(all) + column);
                    sum += a.at(static_cast<std::size_t>(at_a)) * b.at(static_cast<std::size_t>(at_b));
                }
                d.at(static_cast<std::size_t>(group.d + row * all.n + column)) = sum;
            }
        }
    }
    return d;
}

}  // namespace

TEST(GroupedMatmul, EachRowMeetsTheWeightOfItsGroup) {
    const Matrix rows = ramp(total * in, 1.0), weights = ramp(4 * in * out, -5.0);
    for (const bool is_transposed : {false, true}) {
        const Layout layout = is_transposed ? Layout::rows_by_transposed : Layout::rows_by_matrix;
        const Matrix found = multiplied(products(layout, 0, out, in), rows, weights, total * out);
        const std::array<std::size_t, total> group_of{0, 0, 2, 2, 2, 2, 3};
        for (std::size_t row = 0; row < total; ++row) {
            for (std::size_t column = 0; column < out; ++column) {
                double sum = 0.0;
                for (std::size_t each = 0; each < in; ++each) {
                    const std::size_t within = is_transposed ? column * in + each : each * out + column;
                    sum += rows[row * in + each] * weights[group_of[row] * in * out + within];
                }
                EXPECT_EQ(found[row * out + column], sum) << row << ' ' << column << ' ' << is_transposed;
            }
        }
    }
}

TEST(GroupedMatmul, TheGradientOfWeightsSumsOverTheRowsOfTheirGroupAndSkipsOneWithout) {
    const Matrix rows = ramp(total * in, 1.0), dout = ramp(total * out, -4.0);
    const Matrix found = multiplied(products(Layout::transposed_by_rows, in, out, 0), rows, dout, 4 * in * out);
    std::size_t begin = 0;
    for (std::size_t group = 0; group < counts.size(); ++group) {
        const std::size_t end = begin + static_cast<std::size_t>(counts[group]);
        for (std::size_t row = 0; row < in; ++row) {
            for (std::size_t column = 0; column < out; ++column) {
                double sum = begin == end ? -1.0 : 0.0;  // not written: zeroed by a kernel of its own
                for (std::size_t each = begin; each < end; ++each) {
                    sum += rows[each * in + row] * dout[each * out + column];
                }
                EXPECT_EQ(found[(group * in + row) * out + column], sum) << group << ' ' << row << ' ' << column;
            }
        }
        begin = end;
    }
}

TEST(GroupedMatmul, PlacesAreCountedIn64Bits) {
    const Products all{Layout::rows_by_matrix, nullptr, nullptr, nullptr, nullptr, 1000, 1 << 30, 0, 8192, 16384};
    const Group group = group_at(all, 999, (1 << 30) - 5, 1 << 30);
    EXPECT_EQ(group.m, 5);
    EXPECT_EQ(group.row, (1 << 30) - 5);
    EXPECT_EQ(group.a, ((std::int64_t{1} << 30) - 5) * 16384);
    EXPECT_EQ(group.b, std::int64_t{999} * 8192 * 16384);
    EXPECT_EQ(group.d, ((std::int64_t{1} << 30) - 5) * 8192);
}

TEST(GroupedMatmul, CountsThatReachOutsideMemoryAreCut) {
    EXPECT_EQ(zcore::grouped::bounded(-3, 7), 0);
    EXPECT_EQ(zcore::grouped::bounded(5, 7), 5);
    EXPECT_EQ(zcore::grouped::bounded(std::int64_t{1} << 62, 7), 7);
}

TEST(GroupedMatmul, RowsOfAGroupAreThoseThatTheGroupsBeforeItLeave) {
    using zcore::grouped::rows_of;
    const auto found = [](std::int64_t before, std::int64_t count, std::int64_t total) {
        const zcore::grouped::Rows rows = rows_of(before, count, total);
        return std::pair{rows.begin, rows.end};
    };
    EXPECT_EQ(found(0, 5, 8), std::pair(std::int64_t{0}, std::int64_t{5}));
    EXPECT_EQ(found(5, 3, 8), std::pair(std::int64_t{5}, std::int64_t{8}));
    EXPECT_EQ(found(5, 3, 7), std::pair(std::int64_t{5}, std::int64_t{7}));
    EXPECT_EQ(found(5, std::int64_t{1} << 62, 7), std::pair(std::int64_t{5}, std::int64_t{7}));
    // None are left, or there were none: its gradient is written by nobody else, and zeroed.
    for (const auto& [before, count, total] : {std::array<std::int64_t, 3>{5, 3, 5}, {9, 3, 5}, {2, 0, 5}, {2, -1, 5},
                                               {0, 3, 0}}) {
        const auto [begin, end] = found(before, count, total);
        EXPECT_EQ(begin, end) << before << ' ' << count << ' ' << total;
        const Products all{Layout::transposed_by_rows, nullptr, nullptr, nullptr, nullptr, 2, total, in, out, 0};
        EXPECT_EQ(group_at(all, 1, begin, end).m, 0);
    }
}

TEST(GroupedMatmul, AWorkspaceHoldsWhatItsSizeWasAskedFor) {
    for (const std::size_t groups : {1u, 31u, 32u, 33u, 1000u}) {
        for (const std::size_t multiprocessors : {1u, 108u, 132u}) {
            std::vector<std::byte> memory(zcore::grouped::workspace_bytes(groups, multiprocessors));
            Cutter cut(memory);
            std::byte* before = nullptr;
            // As fp8 on sm_90 does, which takes most: addresses of three matrices and two scales, three strides.
            for (int array = 0; array < 3 + 2 + 3; ++array) {
                auto* const taken = reinterpret_cast<std::byte*>(cut.take<void*>(groups));
                EXPECT_TRUE(before == nullptr || taken >= before + groups * sizeof(void*));
                EXPECT_EQ((taken - memory.data()) % static_cast<std::ptrdiff_t>(zcore::grouped::alignment), 0);
                before = taken;
            }
            cut.take<std::array<std::int32_t, 3>>(groups);
            const std::size_t of_each = zcore::grouped::num_descriptors * zcore::grouped::descriptor_bytes;
            EXPECT_NE(cut.take<std::byte>(multiprocessors * of_each), nullptr);
            EXPECT_THROW(cut.take<std::byte>(1), std::invalid_argument);
        }
    }
}

TEST(GroupedMatmul, WhatTensorCoresDoNotTakeIsRefusedWithTheReason) {
    const auto said = [](auto function) -> std::string {
        try {
            function();
        } catch (const std::invalid_argument& refused) {
            return refused.what();
        }
        return "";
    };
    using namespace zcore::grouped;
    EXPECT_EQ(said([] { require_sides("op", {5, 2, 64, 24}, 8); }), "");
    EXPECT_EQ(said([] { require_sides("op", {5, 2, 12, 24}, 8); }),
              "op: the sides of the weights are 12 (in) and 24 (out); expected multiples of 8 and 8. "
              "Pad them with zeros.");
    EXPECT_NE(said([] { require_sides("op", {5, 2, 8, 8}, 16); }), "");
    EXPECT_NE(said([] { require_sides("op", {5, 2, 16, 12}, 16); }), "");
    EXPECT_EQ(said([] { require_sides("op", {std::int64_t{1} << 31, 2, 8, 8}, 8); }),
              "op: a side is 2147483648; expected 0 to 2^31 - 1.");
    EXPECT_NE(said([] { require_sides("op", {-1, 2, 8, 8}, 8); }), "");
    EXPECT_EQ(said([] { require_type("op", zcore::Type::f16); }), "");
    EXPECT_NE(said([] { require_type("op", zcore::Type::f32); }).find("expected bf16 or fp16"), std::string::npos);
    EXPECT_EQ(said([] { require_device("op", 80); }), "");
    EXPECT_EQ(said([] { require_device("op", 120); }), "");
    EXPECT_EQ(said([] { require_device("op", 75); }),
              "op: this device is sm_75; expected sm_80 or later, whose tensor cores take bf16.");
    EXPECT_EQ(said([] { require_fp8_device("op", 90); }), "");
    EXPECT_EQ(said([] { require_fp8_device("op", 80); }),
              "op: this device is sm_80; expected sm_90, for which its kernel is written. Multiply in bf16 here.");
    EXPECT_NE(said([] { require_fp8_device("op", 100); }), "");
}
