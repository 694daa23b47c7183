#include "table.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "zcore/flat.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

// Attributes of tensors, as Python strings that are made once and never freed: the module outlives no use of them.
struct Names {
    PyObject* numel = PyUnicode_InternFromString("numel");
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
    PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
    PyObject* get_device = PyUnicode_InternFromString("get_device");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
};

const Names& names() {
    static const Names all;
    return all;
}

nb::object attribute(nb::handle tensor, PyObject* name) { return tensor.attr(nb::handle(name)); }

template <typename Value>
Value call(nb::handle tensor, PyObject* name) {
    return nb::cast<Value>(tensor.attr(nb::handle(name))());
}

std::optional<zcore::Type> type_of(const Column& column, nb::handle dtype) {
    for (const auto& [served, type] : column.types) {
        if (served.is(dtype)) {
            return type;
        }
    }
    return std::nullopt;
}

bool is_on(nb::handle tensor, std::optional<int> cuda_index) {
    if (!cuda_index) {
        return attribute(tensor, names().is_cpu).ptr() == Py_True;
    }
    return attribute(tensor, names().is_cuda).ptr() == Py_True && call<int>(tensor, names().get_device) == *cuda_index;
}

std::size_t num_blocks(std::size_t numel) { return (numel + zcore::code_block_numel - 1) / zcore::code_block_numel; }

bool is_of_codes(zcore::Type type) { return type == zcore::Type::signed_code || type == zcore::Type::unsigned_code; }

}  // namespace

std::optional<Table> Layout::read(const nb::sequence& operands, std::optional<int> cuda_index) const {
    if (nb::len(operands) != columns_.size() || columns_.empty()) {
        return std::nullopt;
    }
    std::vector<nb::object> lists;
    for (nb::handle each : operands) {
        lists.push_back(nb::borrow(each));
    }
    const std::size_t rows = nb::len(lists[0]);
    std::vector<std::size_t> numels;
    for (nb::handle tensor : lists[0]) {
        numels.push_back(call<std::size_t>(tensor, names().numel));
    }
    Table table(rows, columns_.size());
    std::vector<bool> has_codes(columns_.size(), false);
    for (std::size_t row = 0; row < rows; ++row) {
        table.set_numel(row, numels[row]);
    }
    for (std::size_t index = 0; index < columns_.size(); ++index) {
        const Column& column = columns_[index];
        const std::size_t count = nb::len(lists[index]);
        const bool scales = column.scales_of >= 0;
        if (scales && rows > 0 && has_codes[static_cast<std::size_t>(column.scales_of)] != (count > 0)) {
            return std::nullopt;
        }
        if (count == 0 && column.is_optional) {
            continue;  // addresses of 0
        }
        if (count != rows) {
            return std::nullopt;
        }
        nb::object dtype;
        std::size_t row = 0;
        for (nb::handle tensor : lists[index]) {
            const nb::object own = attribute(tensor, names().dtype);
            if (row == 0) {
                const std::optional<zcore::Type> type = type_of(column, own);
                if (!type) {
                    return std::nullopt;
                }
                table.set_type(index, *type);
                has_codes[index] = is_of_codes(*type);
                dtype = own;
            }
            const std::size_t expected = scales ? num_blocks(numels[row]) : numels[row];
            const std::size_t numel = index == 0 ? expected : call<std::size_t>(tensor, names().numel);
            if (!own.is(dtype) || numel != expected || !is_on(tensor, cuda_index) ||
                !call<bool>(tensor, names().is_contiguous)) {
                return std::nullopt;
            }
            table.set_address(row++, index, call<std::uintptr_t>(tensor, names().data_ptr));
        }
    }
    return table;
}

void bind_table(nb::module_& module) {
    nb::class_<Table>(module, "Table").def("__len__", &Table::size);
    using Types = std::vector<std::pair<nb::object, int>>;
    nb::class_<Layout>(module, "Layout")
        .def("__init__",
             [](Layout* self, const std::vector<std::tuple<Types, bool, int>>& columns) {
                 std::vector<Column> made;
                 for (const auto& [types, is_optional, scales_of] : columns) {
                     Column column{{}, is_optional, scales_of};
                     for (const auto& [dtype, type] : types) {
                         column.types.emplace_back(dtype, static_cast<zcore::Type>(type));
                     }
                     made.push_back(std::move(column));
                 }
                 new (self) Layout(std::move(made));
             },
             "columns"_a)
        .def("read", &Layout::read, "operands"_a, "cuda_index"_a = nb::none());
}
