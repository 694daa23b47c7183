// The products of groups of rows as plain numbers: which matrices, where they begin, and how a workspace is cut.
// Nothing here knows CUDA, so that it is tested on the CPU; what is constexpr runs on a device, too.
//
//     d = a b, [m, n] = [m, k] [k, n], of each group:
//
//     layout                a lies as      b lies as      d           what a group has by itself
//     rows_by_matrix        [rows, k]      [k, n]         [rows, n]   m, its rows; a matrix b
//     rows_by_transposed    [rows, k]      [n, k]         [rows, n]   m, its rows; a matrix b
//     transposed_by_rows    [rows, m]      [rows, n]      [m, n]      k, its rows; a matrix d
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>

namespace zcore::grouped {

enum class Layout : std::uint8_t { rows_by_matrix, rows_by_transposed, transposed_by_rows };

struct Products {
    Layout layout;
    const std::byte* a;
    const std::byte* b;
    std::byte* d;
    const std::int64_t* counts;  // on the device; rows of each group
    std::int64_t num_groups;
    std::int64_t total;  // rows of all groups
    std::int64_t m, n, k;  // the one that counts tell is 0
};

// The sides of a group's matrices, its first row, and of each matrix its first element. A group without rows has m of
// 0, so that no tile of it is computed.
struct Group {
    std::int32_t m, n, k;
    std::int64_t row, a, b, d;
};

// Elements from a row of what lies in memory to the next.
constexpr std::int64_t leading_a(const Products& all) {
    return all.layout == Layout::transposed_by_rows ? all.m : all.k;
}
constexpr std::int64_t leading_b(const Products& all) {
    return all.layout == Layout::rows_by_transposed ? all.k : all.n;
}

// Group `index`, with the rows from `begin` to `end`.
constexpr Group group_at(const Products& all, std::int64_t index, std::int64_t begin, std::int64_t end) {
    const auto rows = static_cast<std::int32_t>(end - begin);
    const auto m = static_cast<std::int32_t>(all.m), n = static_cast<std::int32_t>(all.n);
    if (all.layout == Layout::transposed_by_rows) {
        return {rows == 0 ? 0 : m, n, rows, begin, begin * all.m, begin * all.n, index * all.m * all.n};
    }
    return {rows, n, static_cast<std::int32_t>(all.k), begin, begin * all.k, index * all.k * all.n, begin * all.n};
}

// A count as it is used: what would reach outside memory is cut.
constexpr std::int64_t bounded(std::int64_t count, std::int64_t total) {
    return count < 0 ? 0 : count < total ? count : total;
}

// The rows of a group of `count`, behind so many of the groups before it, whose counts are cut: of `total` at most.
struct Rows {
    std::int64_t begin, end;
};
constexpr Rows rows_of(std::int64_t before, std::int64_t count, std::int64_t total) {
    return {bounded(before, total), bounded(before + bounded(count, total), total)};
}

constexpr std::size_t alignment = 256;  // of each array of a workspace, in bytes

constexpr std::size_t rounded(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment; }

// Gives out a workspace from the front, array by array.
class Cutter {
public:
    explicit Cutter(std::span<std::byte> memory) : memory_(memory) {}

    template <typename T>
    T* take(std::size_t count) {
        const std::size_t bytes = rounded(count * sizeof(T));
        if (bytes > memory_.size() - used_) {
            throw std::invalid_argument("a workspace of " + std::to_string(memory_.size()) +
                                        " bytes is too small; expected grouped_matmul_workspace_bytes of this device.");
        }
        used_ += bytes;
        return reinterpret_cast<T*>(memory_.data() + used_ - bytes);
    }

private:
    std::span<std::byte> memory_;
    std::size_t used_ = 0;
};

// What a group's description takes at most: three sides in one array, then as many of pointers and leading dimensions.
constexpr std::size_t sides_bytes = 3 * sizeof(std::int32_t), num_word_arrays = 8;
// Descriptors of tensors that a multiprocessor of sm_90 writes for itself: of a, of b, and of d for each warp group.
constexpr std::size_t descriptor_bytes = 128, num_descriptors = 4;

constexpr std::size_t workspace_bytes(std::size_t num_groups, std::size_t num_multiprocessors) {
    return rounded(num_groups * sides_bytes) + num_word_arrays * rounded(num_groups * sizeof(void*)) +
           rounded(num_multiprocessors * num_descriptors * descriptor_bytes);
}

}  // namespace zcore::grouped
