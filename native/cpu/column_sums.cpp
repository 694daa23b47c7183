#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"

namespace zcore::ZCORE_ISA {

void add_rows_part(const float* parts, std::size_t rows, std::size_t hidden, Flat out, std::size_t begin,
                   std::size_t end) {
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        double sums[block_numel] = {};
        for (std::size_t row = 0; row < rows; ++row) {
            const float* ZCORE_RESTRICT part = parts + row * hidden + at;
            for (std::size_t each = 0; each < count; ++each) {
                sums[each] += static_cast<double>(part[each]);
            }
        }
        float rounded[block_numel];
        for (std::size_t each = 0; each < count; ++each) {
            rounded[each] = static_cast<float>(sums[each]);
        }
        store_block(out, at, count, rounded);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void add_rows_part(const float*, std::size_t, std::size_t, Flat, std::size_t, std::size_t))

void ColumnSums::write(Flat out, int threads) const {
    if (!out || hidden_ == 0) {
        return;
    }
    const auto add = ZCORE_CHOOSE(add_rows_part);
    const std::size_t rows = parts_.size() / hidden_;
    parallel_for(hidden_, 1024, threads, [&](std::size_t begin, std::size_t end) {
        add(parts_.data(), rows, hidden_, out, begin, end);
    });
}

}  // namespace zcore

#endif
