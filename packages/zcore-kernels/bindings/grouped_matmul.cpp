// Grouped products of native/cutlass for Python. The interpreter lock is kept: a launch takes microseconds.
#include "grouped_matmul.hpp"

#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "zcore/cuda/grouped_matmul.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

template <std::size_t count>
using Addresses = std::array<std::uintptr_t, count>;
using Lengths = std::array<std::int64_t, 4>;  // total, num_groups, num_in, num_out
using Workspace = std::pair<std::uintptr_t, std::size_t>;

template <typename T = void>
T* memory(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

std::span<std::byte> span_of(const Workspace& workspace) {
    return {memory<std::byte>(workspace.first), workspace.second};
}

zcore::cuda::Stream stream_of(std::uintptr_t stream) { return reinterpret_cast<zcore::cuda::Stream>(stream); }

void grouped_matmul(const Addresses<4>& at, int type, const Lengths& lengths, bool is_transposed,
                    const Workspace& workspace, std::uintptr_t stream) {
    const auto [total, num_groups, num_in, num_out] = lengths;
    zcore::cuda::grouped_matmul({memory(at[0]), memory(at[1]), memory<const std::int64_t>(at[2]), memory(at[3]),
                                 static_cast<zcore::Type>(type), total, num_groups, num_in, num_out, is_transposed},
                                span_of(workspace), stream_of(stream));
}

void grouped_matmul_backward(const Addresses<4>& at, int type, const Lengths& lengths, bool is_transposed,
                             const Workspace& workspace, std::uintptr_t stream) {
    const auto [total, num_groups, num_in, num_out] = lengths;
    zcore::cuda::grouped_matmul_backward({memory(at[0]), memory(at[1]), memory<const std::int64_t>(at[2]),
                                          memory(at[3]), static_cast<zcore::Type>(type), total, num_groups, num_in,
                                          num_out, is_transposed},
                                         span_of(workspace), stream_of(stream));
}

void grouped_matmul_fp8(const Addresses<6>& at, const Lengths& lengths, const Workspace& workspace,
                        std::uintptr_t stream) {
    const auto [total, num_groups, num_in, num_out] = lengths;
    zcore::cuda::grouped_matmul_fp8({memory(at[0]), memory(at[1]), memory<const float>(at[2]),
                                     memory<const float>(at[3]), memory<const std::int64_t>(at[4]), memory(at[5]),
                                     total, num_groups, num_in, num_out},
                                    span_of(workspace), stream_of(stream));
}

}  // namespace

void bind_grouped_matmul(nb::module_& module) {
    module.def("grouped_matmul_workspace_bytes", &zcore::cuda::grouped_matmul_workspace_bytes, "num_groups"_a);
    module.def("grouped_matmul", &grouped_matmul, "addresses"_a, "type"_a, "lengths"_a, "is_transposed"_a,
               "workspace"_a, "stream"_a);
    module.def("grouped_matmul_backward", &grouped_matmul_backward, "addresses"_a, "type"_a, "lengths"_a,
               "is_transposed"_a, "workspace"_a, "stream"_a);
    module.def("grouped_matmul_fp8", &grouped_matmul_fp8, "addresses"_a, "lengths"_a, "workspace"_a, "stream"_a);
}
