#include "zcore/stream.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

namespace zcore::ZCORE_ISA {

constexpr std::size_t lanes = 16;

static float sum_of(const float* values, std::size_t count) {
    float sums[lanes] = {};
    const std::size_t whole = count - count % lanes;
    for (std::size_t row = 0; row < whole; row += lanes) {
        for (std::size_t lane = 0; lane < lanes; ++lane) {
            sums[lane] += values[row + lane];
        }
    }
    for (std::size_t rest = whole; rest < count; ++rest) {
        sums[rest - whole] += values[rest];
    }
    float all = 0.0f;
    for (std::size_t lane = 0; lane < lanes; ++lane) {
        all += sums[lane];
    }
    return all;
}

// Block `index` of `count` of each array.
void stream_block(const Words* read, std::size_t num_read, const Words* written, std::size_t num_written,
                  std::size_t index, std::size_t count) {
    float sum = 0.0f;
    for (std::size_t each = 0; each < num_read; ++each) {
        const std::size_t begin = read[each].count * index / count, end = read[each].count * (index + 1) / count;
        sum += sum_of(read[each].data + begin, end - begin);
    }
    const float value = sum > 0.0f ? 1.0f : 0.0f;
    for (std::size_t each = 0; each < num_written; ++each) {
        const std::size_t begin = written[each].count * index / count, end = written[each].count * (index + 1) / count;
        float* const out = written[each].data + begin;
        for (std::size_t at = 0; at < end - begin; ++at) {
            out[at] = value;
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include <algorithm>

#include "cpu/each_set.hpp"
#include "zcore/parallel.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void stream_block(const Words*, std::size_t, const Words*, std::size_t, std::size_t, std::size_t))

constexpr std::size_t block_words = 1024, blocks_at_once = 32;  // 4 KiB of the largest array, and a part of a thread

void stream(std::span<const Words> read, std::span<const Words> written, int threads) {
    std::size_t largest = 1;
    for (const std::span<const Words> arrays : {read, written}) {
        for (const Words& each : arrays) {
            largest = std::max(largest, each.count);
        }
    }
    const auto block = ZCORE_CHOOSE(stream_block);
    const std::size_t count = (largest + block_words - 1) / block_words;
    parallel_for(count, blocks_at_once, threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t index = begin; index < end; ++index) {
            block(read.data(), read.size(), written.data(), written.size(), index, count);
        }
    });
}

}  // namespace zcore

#endif
