// Which kernel serves which device and type, and what none has to: groups, and sums, without a term.
#include "zcore/cuda/grouped_matmul.hpp"

#include <algorithm>

#include "kernels.hpp"
#include "requirements.hpp"

namespace zcore::cuda {

namespace {

using grouped::Layout;
using grouped::Products;

struct Device {
    int capability;  // 80 of sm_80
    int num_multiprocessors;
};

int attribute_of(int device, cudaDeviceAttr attribute) {
    int value = 0;
    grouped::check(cudaDeviceGetAttribute(&value, attribute, device));
    return value;
}

Device current_device() {
    int device = 0;
    grouped::check(cudaGetDevice(&device));
    return {10 * attribute_of(device, cudaDevAttrComputeCapabilityMajor) +
                attribute_of(device, cudaDevAttrComputeCapabilityMinor),
            attribute_of(device, cudaDevAttrMultiProcessorCount)};
}

// What fails inside is told with the name of the op.
template <typename Function>
auto named(const char* op, Function function) {
    try {
        return function();
    } catch (const grouped::Failure& failure) {
        throw LaunchError(op, failure.what());
    }
}

constexpr int zeroing_threads = 256, zeroing_blocks = 32;  // blocks of a group

// Zeroes the matrices, of so many words each, that belong to groups without rows: of none, or of which `total` leaves
// none. No product is written there.
__global__ void __launch_bounds__(zeroing_threads)
    zero_unused(const std::int64_t* counts, std::int64_t total, uint4* matrices, std::int64_t words) {
    __shared__ unsigned long long before;
    if (threadIdx.x == 0) {
        before = 0;
    }
    __syncthreads();
    std::int64_t sum = 0;
    for (std::int64_t group = threadIdx.x; group < blockIdx.x; group += zeroing_threads) {
        sum += grouped::bounded(counts[group], total);
    }
    atomicAdd(&before, static_cast<unsigned long long>(sum));
    __syncthreads();
    const grouped::Rows rows = grouped::rows_of(static_cast<std::int64_t>(before), counts[blockIdx.x], total);
    if (rows.begin != rows.end) {
        return;
    }
    uint4* const matrix = matrices + static_cast<std::int64_t>(blockIdx.x) * words;
    for (std::int64_t at = blockIdx.y * zeroing_threads + threadIdx.x; at < words;
         at += zeroing_blocks * zeroing_threads) {
        matrix[at] = uint4{0, 0, 0, 0};
    }
}

void run(const Products& all, Type type, const Device& device, std::span<std::byte> workspace, Stream stream) {
    const bool is_hopper = device.capability == 90;
    if (type == Type::bf16) {
        (is_hopper ? grouped::run_sm90_bf16 : grouped::run_sm80_bf16)(all, workspace, stream);
    } else {
        (is_hopper ? grouped::run_sm90_f16 : grouped::run_sm80_f16)(all, workspace, stream);
    }
}

// Whether there is nothing to multiply; then out is written: NaN, of all bits, for rows that have no group, or zeros.
template <typename Op>
bool is_trivial(const Op& op, Stream stream) {
    const auto out_bytes = static_cast<std::size_t>(op.total * op.num_out) * 2;
    if (out_bytes != 0 && (op.num_groups == 0 || op.num_in == 0)) {
        grouped::check(cudaMemsetAsync(op.out, op.num_groups == 0 ? 0xff : 0, out_bytes, stream));
    }
    return out_bytes == 0 || op.num_groups == 0 || op.num_in == 0;
}

const std::byte* bytes(const void* memory) { return static_cast<const std::byte*>(memory); }

}  // namespace

std::size_t grouped_matmul_workspace_bytes(std::int64_t num_groups) {
    return named("grouped_matmul", [&] {
        return grouped::workspace_bytes(static_cast<std::size_t>(num_groups),
                                        static_cast<std::size_t>(current_device().num_multiprocessors));
    });
}

void grouped_matmul(const GroupedMatmul& op, std::span<std::byte> workspace, Stream stream) {
    grouped::require_sides("grouped_matmul", {op.total, op.num_groups, op.num_in, op.num_out}, 8);
    grouped::require_type("grouped_matmul", op.type);
    named("grouped_matmul", [&] {
        if (is_trivial(op, stream)) {
            return;
        }
        const Device device = current_device();
        grouped::require_device("grouped_matmul", device.capability);
        run({op.is_transposed ? Layout::rows_by_transposed : Layout::rows_by_matrix, bytes(op.rows), bytes(op.weights),
             static_cast<std::byte*>(op.out), op.counts, op.num_groups, op.total, 0, op.num_out, op.num_in},
            op.type, device, workspace, stream);
    });
}

void grouped_matmul_backward(const GroupedMatmulBackward& op, std::span<std::byte> workspace, Stream stream) {
    const char* const name = "grouped_matmul_backward";
    grouped::require_sides(name, {op.total, op.num_groups, op.num_in, op.num_out}, 8);
    grouped::require_type(name, op.type);
    if (op.num_groups == 0 || op.num_in == 0 || op.num_out == 0) {
        return;
    }
    named(name, [&] {
        zero_unused<<<dim3(static_cast<unsigned>(op.num_groups), zeroing_blocks), zeroing_threads, 0, stream>>>(
            op.counts, op.total, static_cast<uint4*>(op.dweights), op.num_in * op.num_out / 8);
        grouped::check(cudaGetLastError());
        if (op.total == 0) {
            return;
        }
        const Device device = current_device();
        grouped::require_device(name, device.capability);
        const void* const first = op.is_transposed ? op.dout : op.rows;
        const void* const second = op.is_transposed ? op.rows : op.dout;
        run({Layout::transposed_by_rows, bytes(first), bytes(second), static_cast<std::byte*>(op.dweights), op.counts,
             op.num_groups, op.total, op.is_transposed ? op.num_out : op.num_in,
             op.is_transposed ? op.num_in : op.num_out, 0},
            op.type, device, workspace, stream);
    });
}

void grouped_matmul_fp8(const GroupedMatmulFp8& op, std::span<std::byte> workspace, Stream stream) {
    const char* const name = "grouped_matmul_fp8";
    grouped::require_sides(name, {op.total, op.num_groups, op.num_in, op.num_out}, 16);
    named(name, [&] {
        if (is_trivial(op, stream)) {
            return;
        }
        grouped::require_fp8_device(name, current_device().capability);
        grouped::run_sm90_fp8({Layout::rows_by_transposed, bytes(op.rows), bytes(op.weights),
                               static_cast<std::byte*>(op.out), op.counts, op.num_groups, op.total, 0, op.num_out,
                               op.num_in},
                              {op.row_scales, op.weight_scales}, workspace, stream);
    });
}

}  // namespace zcore::cuda
