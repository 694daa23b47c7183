// What moving memory takes on this machine, with next to nothing computed: the limit of an op that memory bounds.
#pragma once

#include <cstddef>
#include <span>

namespace zcore {

struct Words {
    float* data;
    std::size_t count;
};

// Reads all of `read` and writes all of `written`, in small blocks of each in turn, as an op does that works on them side
// by side. What stands in both is read and written in place; what is written are zeros and ones.
void stream(std::span<const Words> read, std::span<const Words> written, int threads);

}  // namespace zcore
