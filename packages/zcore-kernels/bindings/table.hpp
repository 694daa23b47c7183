// Operands of an op over flat pieces, read from lists of torch tensors into a table of addresses:
//
//     words    numel | params[0] | grads[0] | exp_avgs[0] | ... | exp_avg_scales[0]     a row for each piece
//              numel | params[1] | grads[1] | exp_avgs[1] | ... | exp_avg_scales[1]
//     types            0 fp32      1 bf16     3 codes      ...   0                     one for each column after numel
//
// All tensors of a column have one dtype; all of a row have as many elements, but for scales, one for each block of
// codes. Tensors are read through their own methods, 0.05 us each, where DLPack takes 4 us a tensor. What is not as the
// columns want it makes no table, and the Python side says why.
#pragma once

#include <nanobind/nanobind.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "zcore/flat.hpp"

// Whoever holds a table holds its tensors.
class Table {
public:
    Table(std::size_t rows, std::size_t columns) : words_(rows * (columns + 1)), types_(columns) {}

    std::size_t size() const { return words_.size() / (types_.size() + 1); }
    std::size_t numel(std::size_t row) const { return words_[first_of(row)]; }
    zcore::Flat flat(std::size_t row, std::size_t column) const { return {memory<void>(row, column), types_[column]}; }
    zcore::Flat flat(std::size_t row, std::size_t column, std::size_t scales) const {
        return {memory<void>(row, column), types_[column], memory<float>(row, scales)};
    }

    void set_numel(std::size_t row, std::size_t numel) { words_[first_of(row)] = numel; }
    void set_type(std::size_t column, zcore::Type type) { types_[column] = type; }
    void set_address(std::size_t row, std::size_t column, std::uintptr_t address) {
        words_[first_of(row) + column + 1] = address;
    }

    template <typename Piece, typename Make>
    std::vector<Piece> pieces(Make make) const {
        std::vector<Piece> made;
        made.reserve(size());
        for (std::size_t row = 0; row < size(); ++row) {
            made.push_back(make(row));
        }
        return made;
    }

private:
    std::size_t first_of(std::size_t row) const { return row * (types_.size() + 1); }
    template <typename T>
    T* memory(std::size_t row, std::size_t column) const {
        return reinterpret_cast<T*>(words_[first_of(row) + column + 1]);
    }

    std::vector<std::uintptr_t> words_;
    std::vector<zcore::Type> types_;
};

// What one column takes.
struct Column {
    std::vector<std::pair<nanobind::object, zcore::Type>> types;  // by torch.dtype, what it is here
    bool is_optional;
    int scales_of;  // the column of codes that this one scales; -1 where it is not of scales
};

// The columns of an op.
class Layout {
public:
    explicit Layout(std::vector<Column> columns) : columns_(std::move(columns)) {}

    // The table of one list of tensors for each column; none where they are not as the columns want them. All are to lie
    // on the CPU, or on the CUDA device of this index.
    std::optional<Table> read(const nanobind::sequence& operands, std::optional<int> cuda_index) const;

private:
    std::vector<Column> columns_;
};

void bind_table(nanobind::module_& module);
