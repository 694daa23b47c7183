// Grouped products by CUTLASS 2.x's persistent kernel: tensor cores fed by cp.async. For sm_80 and all later devices
// but sm_90, which has its own (sm90.cuh).
//
// Tiles of 128 x 128 x 32 in four stages, 64 KiB of shared memory: two blocks fit on a multiprocessor of sm_80, one on
// those of sm_86 and sm_89, which have 100 KiB.
#pragma once

#include <cutlass/epilogue/thread/linear_combination.h>
#include <cutlass/gemm/device/gemm_grouped.h>
#include <cutlass/gemm/kernel/default_gemm_grouped.h>

#include "describe.cuh"
#include "kernels.hpp"

namespace zcore::grouped {

template <typename Element, Layout layout>
struct Sm80 {
    static constexpr int aligned = 16 / sizeof(Element);  // elements that one load or store moves
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    using Kernel = typename cutlass::gemm::kernel::DefaultGemmGrouped<
        Element, std::conditional_t<layout == Layout::transposed_by_rows, Column, Row>,
        cutlass::ComplexTransform::kNone, aligned,
        Element, std::conditional_t<layout == Layout::rows_by_transposed, Column, Row>,
        cutlass::ComplexTransform::kNone, aligned,
        Element, Row, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
        cutlass::gemm::GemmShape<128, 128, 32>, cutlass::gemm::GemmShape<64, 64, 32>,
        cutlass::gemm::GemmShape<16, 8, 16>,
        cutlass::epilogue::thread::LinearCombination<Element, aligned, float, float,
                                                     cutlass::epilogue::thread::ScaleType::Nothing>,
        cutlass::gemm::threadblock::GemmBatchedIdentityThreadblockSwizzle, 4,
        cutlass::gemm::kernel::GroupScheduleMode::kDeviceOnly>::GemmKernel;
    using Device = cutlass::gemm::device::GemmGrouped<Kernel>;
    static_assert(sizeof(cutlass::gemm::GemmCoord) == sides_bytes);

    // What `describe` writes.
    struct Arrays {
        Products all;
        cutlass::gemm::GemmCoord* sides;
        Element **a, **b, **d;
        std::int64_t *leading_a, *leading_b, *leading_d;

        __device__ void operator()(std::int64_t index, const Group& group) const {
            sides[index] = {group.m, group.n, group.k};
            a[index] = const_cast<Element*>(reinterpret_cast<const Element*>(all.a)) + group.a;
            b[index] = const_cast<Element*>(reinterpret_cast<const Element*>(all.b)) + group.b;
            d[index] = reinterpret_cast<Element*>(all.d) + group.d;
            leading_a[index] = grouped::leading_a(all);
            leading_b[index] = grouped::leading_b(all);
            leading_d[index] = all.n;
        }
    };

    static void run(const Products& all, std::span<std::byte> workspace, cudaStream_t stream) {
        Cutter cut(workspace);
        const auto count = static_cast<std::size_t>(all.num_groups);
        const Arrays arrays{all,
                            cut.take<cutlass::gemm::GemmCoord>(count),
                            cut.take<Element*>(count),
                            cut.take<Element*>(count),
                            cut.take<Element*>(count),
                            cut.take<std::int64_t>(count),
                            cut.take<std::int64_t>(count),
                            cut.take<std::int64_t>(count)};
        describe<<<1, warp, 0, stream>>>(all, arrays);
        check(cudaGetLastError());
        // Addresses of c are read, but never what lies there.
        const typename Device::Arguments arguments(arrays.sides, static_cast<int>(count), Device::sufficient(), {},
                                                   arrays.a, arrays.b, arrays.d, arrays.d, arrays.leading_a,
                                                   arrays.leading_b, arrays.leading_d, arrays.leading_d);
        Device device;
        check(device.initialize(arguments, nullptr, stream));
        check(device.run(stream));
    }
};

template <typename Element>
void run_sm80(const Products& all, std::span<std::byte> workspace, cudaStream_t stream) {
    switch (all.layout) {
        case Layout::rows_by_matrix:
            return Sm80<Element, Layout::rows_by_matrix>::run(all, workspace, stream);
        case Layout::rows_by_transposed:
            return Sm80<Element, Layout::rows_by_transposed>::run(all, workspace, stream);
        case Layout::transposed_by_rows:
            return Sm80<Element, Layout::transposed_by_rows>::run(all, workspace, stream);
    }
}

}  // namespace zcore::grouped
