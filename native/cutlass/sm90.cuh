// Grouped products by CUTLASS 3.x's pointer-array collectives: WGMMA on tiles that TMA brings, through descriptors that
// each multiprocessor rewrites for the group at hand. For sm_90 alone.
//
// Clusters of two blocks share their tiles of b. A block has two warp groups that compute and one that loads, and as
// many stages as fit in shared memory beside what the epilogue wants. `Finish` says what becomes of the sums.
#pragma once

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/group_array_problem_shape.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "describe.cuh"
#include "kernels.hpp"

namespace zcore::grouped {

// Leading dimensions as CuTe keeps them: the side that lies side by side is known, the other is a number.
template <typename Stride>
__device__ Stride strided(std::int64_t leading) {
    Stride stride{};
    if constexpr (cute::is_static_v<decltype(cute::get<0>(stride))>) {
        cute::get<1>(stride) = leading;
    } else {
        cute::get<0>(stride) = leading;
    }
    return stride;
}

template <typename Input, typename Output, Layout layout, typename Finish>
struct Sm90 {
    template <typename Element>
    static constexpr int aligned = 16 / sizeof(Element);  // elements that TMA moves at least
    using Row = cutlass::layout::RowMajor;
    using Column = cutlass::layout::ColumnMajor;
    using OfA = std::conditional_t<layout == Layout::transposed_by_rows, Column, Row>;
    using OfB = std::conditional_t<layout == Layout::rows_by_transposed, Column, Row>;
    using Tile = typename Finish::Tile;
    using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
    using Sides = cute::Shape<int, int, int>;

    using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
        cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, Row*, aligned<Output>, Output, Row*,
        aligned<Output>, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
        typename Finish::Callbacks>::CollectiveOp;
    using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
        cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Input, OfA*, aligned<Input>, Input, OfB*, aligned<Input>,
        float, Tile, Cluster,
        cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
        cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
    using Kernel = cutlass::gemm::kernel::GemmUniversal<cutlass::gemm::GroupProblemShape<Sides>, Mainloop, Epilogue>;
    using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
    using StrideA = typename Kernel::InternalStrideA;
    using StrideB = typename Kernel::InternalStrideB;
    using StrideD = typename Kernel::InternalStrideD;
    static_assert(sizeof(Sides) == sides_bytes && sizeof(StrideA) == sizeof(void*) &&
                  sizeof(StrideB) == sizeof(void*) && sizeof(StrideD) == sizeof(void*));

    // What `describe` writes.
    struct Arrays {
        Products all;
        Finish finish;
        Sides* sides;
        const Input **a, **b;
        Output** d;
        StrideA* leading_a;
        StrideB* leading_b;
        StrideD* leading_d;

        __device__ void operator()(std::int64_t index, const Group& group) const {
            sides[index] = {group.m, group.n, group.k};
            a[index] = reinterpret_cast<const Input*>(all.a) + group.a;
            b[index] = reinterpret_cast<const Input*>(all.b) + group.b;
            d[index] = reinterpret_cast<Output*>(all.d) + group.d;
            leading_a[index] = strided<StrideA>(grouped::leading_a(all));
            leading_b[index] = strided<StrideB>(grouped::leading_b(all));
            leading_d[index] = strided<StrideD>(all.n);
            finish(index, group);
        }
    };

    static void run(const Products& all, std::span<std::byte> workspace, cudaStream_t stream, Finish finish = {}) {
        Cutter cut(workspace);
        const auto count = static_cast<std::size_t>(all.num_groups);
        finish.take(cut, count);
        const Arrays arrays{all,
                            finish,
                            cut.take<Sides>(count),
                            cut.take<const Input*>(count),
                            cut.take<const Input*>(count),
                            cut.take<Output*>(count),
                            cut.take<StrideA>(count),
                            cut.take<StrideB>(count),
                            cut.take<StrideD>(count)};
        describe<<<1, warp, 0, stream>>>(all, arrays);
        check(cudaGetLastError());
        typename Device::Arguments arguments{};
        arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
        arguments.problem_shape = {static_cast<int>(count), arrays.sides, nullptr};
        arguments.mainloop = {arrays.a, arrays.leading_a, arrays.b, arrays.leading_b};
        arguments.epilogue = {finish.arguments(), nullptr, nullptr, arrays.d, arrays.leading_d};
        check(cudaGetDevice(&arguments.hw_info.device_id));
        check(cudaDeviceGetAttribute(&arguments.hw_info.sm_count, cudaDevAttrMultiProcessorCount,
                                     arguments.hw_info.device_id));
        Device device;
        check(device.initialize(arguments, cut.take<std::byte>(Device::get_workspace_size(arguments)), stream));
        check(device.run(stream));
    }
};

// The sums rounded to the type of d. Tiles of 128 x 256: half of the registers of a warp group hold their sums.
template <typename Output>
struct Rounded {
    using Tile = cute::Shape<cute::_128, cute::_256, cute::_64>;
    using Callbacks = cutlass::epilogue::fusion::Sm90EVT<
        cutlass::epilogue::fusion::Sm90Compute<cutlass::epilogue::thread::Identity, Output, float,
                                               cutlass::FloatRoundStyle::round_to_nearest>,
        cutlass::epilogue::fusion::Sm90AccFetch>;

    void take(Cutter&, std::size_t) {}
    __device__ void operator()(std::int64_t, const Group&) const {}
    typename Callbacks::Arguments arguments() const { return {}; }
};

template <typename Element>
void run_sm90(const Products& all, std::span<std::byte> workspace, cudaStream_t stream) {
    switch (all.layout) {
        case Layout::rows_by_matrix:
            return Sm90<Element, Element, Layout::rows_by_matrix, Rounded<Element>>::run(all, workspace, stream);
        case Layout::rows_by_transposed:
            return Sm90<Element, Element, Layout::rows_by_transposed, Rounded<Element>>::run(all, workspace, stream);
        case Layout::transposed_by_rows:
            return Sm90<Element, Element, Layout::transposed_by_rows, Rounded<Element>>::run(all, workspace, stream);
    }
}

}  // namespace zcore::grouped
