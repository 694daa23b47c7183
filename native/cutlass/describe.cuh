// The kernel that tells another one its groups: counts lie on the device, so sides and addresses are made there, and
// nothing waits for them on the host.
#pragma once

#include <cuda_runtime_api.h>

#include "groups.hpp"

namespace zcore::grouped {

constexpr int warp = 32;
constexpr unsigned two_nans = 0x7fff7fffu;  // of bf16 or fp16

// One warp; a lane for each group, 32 at a time. `write(index, group)` keeps what the product's kernel wants to know.
// Rows of d that no count covers become NaN here: there are none where counts are right, so one warp will do.
template <typename Write>
__global__ void __launch_bounds__(warp) describe(const Products all, const Write write) {
    const int lane = static_cast<int>(threadIdx.x);
    std::int64_t before = 0;
    for (std::int64_t first = 0; first < all.num_groups; first += warp) {
        const std::int64_t index = first + lane;
        const std::int64_t count = index < all.num_groups ? bounded(all.counts[index], all.total) : 0;
        std::int64_t end = count;
        for (int step = 1; step < warp; step *= 2) {
            const std::int64_t below = __shfl_up_sync(0xffffffffu, end, step);
            end += lane < step ? 0 : below;
        }
        end += before;
        if (index < all.num_groups) {
            const Rows rows = rows_of(end - count, count, all.total);
            write(index, group_at(all, index, rows.begin, rows.end));
        }
        before = __shfl_sync(0xffffffffu, end, warp - 1);
    }
    if (all.layout != Layout::transposed_by_rows) {
        auto* const words = reinterpret_cast<uint4*>(all.d);
        for (std::int64_t at = bounded(before, all.total) * all.n / 8 + lane; at < all.total * all.n / 8; at += warp) {
            words[at] = uint4{two_nans, two_nans, two_nans, two_nans};
        }
    }
}

}  // namespace zcore::grouped
