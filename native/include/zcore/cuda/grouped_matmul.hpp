// grouped_matmul: a matrix product for each group of rows, as the experts of a layer have them. Groups lie one behind
// the other; how many rows each has is known to the device alone.
//
//     rows       [total, num_in]                    counts[0] rows of group 0, then counts[1] of group 1
//     weights    [num_groups, num_in, num_out]      [num_groups, num_out, num_in] where transposed
//     out        [total, num_out]                   rows of group g times weights[g]
//
// The gradient of rows is the same product with the weights the other way round. That of weights is rows_g^T dout_g,
// zero for groups without rows. 2 total num_in num_out operations each, summed in fp32: bound by tensor cores where
// groups have some hundred rows, below by reading weights, 2 num_groups num_in num_out bytes (fp8: 1).
//
// Counts below zero are taken as zero, and what reaches beyond `total` is cut; rows of out beyond their sum become NaN.
// Memory begins at multiples of 16 bytes; num_in and num_out are multiples of 8, for fp8 num_in of 16. What is not so
// is refused with std::invalid_argument, as is a device below sm_80 (for fp8: any but sm_90).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "zcore/cuda/stream.hpp"
#include "zcore/flat.hpp"

namespace zcore::cuda {

struct GroupedMatmul {
    const void* rows;
    const void* weights;
    const std::int64_t* counts;  // [num_groups]
    void* out;                   // written
    Type type;                   // of rows, weights and out: bf16 or f16
    std::int64_t total;
    std::int64_t num_groups;
    std::int64_t num_in;
    std::int64_t num_out;
    bool is_transposed = false;
};

struct GroupedMatmulBackward {
    const void* rows;            // [total, num_in]
    const void* dout;            // [total, num_out]
    const std::int64_t* counts;  // [num_groups]
    void* dweights;              // as weights above, written
    Type type;
    std::int64_t total;
    std::int64_t num_groups;
    std::int64_t num_in;
    std::int64_t num_out;
    bool is_transposed = false;
};

// out = row_scales * weight_scales * (rows times weights), in bf16; rows and weights are e4m3.
struct GroupedMatmulFp8 {
    const void* rows;            // [total, num_in]
    const void* weights;         // [num_groups, num_out, num_in]
    const float* row_scales;     // [total]
    const float* weight_scales;  // [num_groups, num_out]
    const std::int64_t* counts;  // [num_groups]
    void* out;                   // [total, num_out], written
    std::int64_t total;
    std::int64_t num_groups;
    std::int64_t num_in;
    std::int64_t num_out;
};

// How many bytes of scratch memory, of any content, each of these wants on the current device.
std::size_t grouped_matmul_workspace_bytes(std::int64_t num_groups);

void grouped_matmul(const GroupedMatmul& op, std::span<std::byte> workspace, Stream stream);
void grouped_matmul_backward(const GroupedMatmulBackward& op, std::span<std::byte> workspace, Stream stream);
void grouped_matmul_fp8(const GroupedMatmulFp8& op, std::span<std::byte> workspace, Stream stream);

}  // namespace zcore::cuda
