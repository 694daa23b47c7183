// Products of fp8 (e4m3), scaled by row and by column when they are written as bf16.
#include "sm90.cuh"

namespace zcore::grouped {

namespace {

// d = row scale * column scale * sum. WGMMA keeps fewer bits of sums of fp8 than fp32 has, so the collective adds what
// comes of every four of them in registers of its own: with these, tiles of 128 x 128 are what fits without spilling.
struct Scaled {
    using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
    template <typename Element>
    using Product = cutlass::epilogue::fusion::Sm90Compute<cutlass::multiplies, Element, float,
                                                           cutlass::FloatRoundStyle::round_to_nearest>;
    using OfRows = cutlass::epilogue::fusion::Sm90ColBroadcast<0, Tile, float*, float,
                                                               cute::Stride<cute::_1, cute::_0, cute::_0>>;
    using OfColumns = cutlass::epilogue::fusion::Sm90RowBroadcast<0, Tile, float*, float,
                                                                  cute::Stride<cute::_0, cute::_1, cute::_0>>;
    using ByColumn = cutlass::epilogue::fusion::Sm90EVT<Product<float>, OfColumns,
                                                        cutlass::epilogue::fusion::Sm90AccFetch>;
    using Callbacks = cutlass::epilogue::fusion::Sm90EVT<Product<cutlass::bfloat16_t>, OfRows, ByColumn>;

    const float* row_scales;     // [total]
    const float* column_scales;  // [num_groups, n]
    const float** of_rows = nullptr;
    const float** of_columns = nullptr;

    void take(Cutter& cut, std::size_t count) {
        of_rows = cut.take<const float*>(count);
        of_columns = cut.take<const float*>(count);
    }
    __device__ void operator()(std::int64_t index, const Group& group) const {
        of_rows[index] = row_scales + group.row;
        of_columns[index] = column_scales + index * group.n;
    }
    Callbacks::Arguments arguments() const {
        return {{of_rows, 0.0f, {}}, {{of_columns, 0.0f, {}}, {}, {}}, {}};
    }
};

}  // namespace

void run_sm90_fp8(const Products& all, const Scales& scales, std::span<std::byte> workspace, cudaStream_t stream) {
    Sm90<cutlass::float_e4m3_t, cutlass::bfloat16_t, Layout::rows_by_transposed, Scaled>::run(
        all, workspace, stream, {scales.rows, scales.columns});
}

}  // namespace zcore::grouped
