#include "zcore/permute.hpp"

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/column_sums.hpp"

namespace zcore {

// The places are counted on one thread: a choice takes a nanosecond or two, and a row of it to copy a hundred times that.
void permute(const Permute& op, int threads) {
    const std::size_t choices = op.tokens * op.k;
    std::fill_n(op.counts, op.num_experts, 0);
    for (std::size_t choice = 0; choice < choices; ++choice) {
        ++op.counts[op.experts[choice]];
    }
    std::vector<std::int64_t> next(op.num_experts);
    for (std::size_t expert = 1; expert < op.num_experts; ++expert) {
        next[expert] = next[expert - 1] + op.counts[expert - 1];
    }
    for (std::size_t choice = 0; choice < choices; ++choice) {
        op.places[choice] = next[static_cast<std::size_t>(op.experts[choice])]++;
    }
    const std::size_t row_bytes = op.hidden * (op.x.type == Type::f32 ? 4 : 2);
    if (row_bytes == 0) {
        return;
    }
    const char* const x = static_cast<const char*>(op.x.data);
    char* const rows = static_cast<char*>(op.rows.data);
    parallel_for(op.tokens, row_grain(op.hidden * op.k), threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t choice = begin * op.k; choice < end * op.k; ++choice) {
            std::memcpy(rows + static_cast<std::size_t>(op.places[choice]) * row_bytes, x + choice / op.k * row_bytes,
                        row_bytes);
        }
    });
}

bool is_permutation(const std::int64_t* places, std::size_t count) {
    std::vector<unsigned char> is_taken(count);
    for (std::size_t at = 0; at < count; ++at) {
        const std::size_t place = static_cast<std::size_t>(places[at]);  // below zero: beyond all
        if (place >= count || is_taken[place]) {
            return false;
        }
        is_taken[place] = 1;
    }
    return true;
}

}  // namespace zcore
