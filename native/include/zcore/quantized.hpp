// Numbers in 8 or 4 bits with a scale for each block of neighbours: how they lie in memory, for the ops that make them,
// read them and add them up.
//
//     numel 600, block_size 256    | block 0: 256 | block 1: 256 | block 2: 88 |
//     codes                        one byte an element; int4 two to a byte, the even element in the low half
//     scales                       fp32, one a block
//     zero_points                  int8, one a block; none where blocks are symmetric
//
//     x ~ scale (code - zero_point)
//
// A block that holds a NaN or an infinity, or that overflows while it is added up, has the scale NaN and codes of zero,
// so that all of it reads as NaN: one scale cannot tell which element it was, and an infinity would turn the others to
// zero in silence.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zcore {

// int8 and int4 are two's complement; the two of fp8 are as OCP has them, e4m3 without infinities. [arXiv 2209.05433]
enum class Format : std::uint8_t { int8, int4, e4m3, e5m2 };

// A block is held in fp32 on the stack of a thread, in its second-level cache, while it is reduced or quantised.
constexpr std::size_t largest_block_size = 16384;

struct QuantizedLayout {
    std::size_t numel;
    std::size_t block_size;  // 1 to largest_block_size; even where two elements share a byte
    Format format;

    std::size_t num_blocks() const { return (numel + block_size - 1) / block_size; }
};

// Not owned. Without `zero_points` blocks are symmetric.
struct Quantized {
    void* codes;
    float* scales;
    std::int8_t* zero_points = nullptr;
};

// To the nearest, ties to even; or up as often as it lies near (stochastic), by noise that `seed` and the place of the
// element determine alone. offset: the place of the first one, for whoever rounds a part of something larger.
struct Rounding {
    bool is_stochastic = false;
    std::uint64_t seed = 0;
    std::uint64_t offset = 0;
};

}  // namespace zcore
