// Which elements a thread block takes, and how its threads read and write them.
//
//     tile      whole blocks of codes: as many as make tile_numel elements, or one that is larger
//     vector    4 elements; thread t has vectors t, t + threads, t + 2 threads, t + 3 threads of its tile
//
// Neighbours in a warp then have neighbouring vectors: what they load of fp32 is 16 bytes each and 512 together, of
// 16-bit floats half, of codes a quarter. Where memory is not aligned for it they take element by element.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/kernel.hpp"
#include "elements/floats.hpp"
#include "zcore/flat.hpp"
#include "zcore/quantized.hpp"

namespace zcore::cuda {

constexpr std::uint32_t vector_numel = 4, vectors = 4;  // of a thread: 64 bytes of fp32 on their way
constexpr std::uint32_t tile_numel = 4096;              // 256 threads
constexpr std::uint32_t most_blocks = 256;              // of a tile
constexpr unsigned most_threads = 1024;                 // that hold the largest block
static_assert(most_threads * vector_numel * vectors == largest_block_size);

// How tiles are cut, the same for a whole launch.
struct Tiling {
    std::size_t numel;
    std::uint32_t block_size, together;  // blocks of a tile
    std::uint64_t reciprocal;            // of block_size, times 2^32, rounded up
    std::uint32_t lanes;                 // so many threads, a power of two, have their vectors in one block; or 0
    unsigned threads;
    std::size_t num_tiles;
};

inline Tiling plan_tiles(std::size_t numel, std::size_t block_size) {
    Tiling plan{};
    plan.numel = numel;
    plan.block_size = static_cast<std::uint32_t>(block_size);
    const std::uint32_t fitting = tile_numel / plan.block_size;
    plan.together = fitting < 1 ? 1 : fitting > most_blocks ? most_blocks : fitting;
    plan.reciprocal = ((std::uint64_t{1} << 32) + block_size - 1) / block_size;
    if (block_size % vector_numel == 0) {
        plan.lanes = 1;
        while (plan.lanes < 32 && plan.block_size / vector_numel % (2 * plan.lanes) == 0) {
            plan.lanes *= 2;
        }
    }
    const std::uint32_t numel_of_tile = plan.together * plan.block_size, of_warp = 32 * vector_numel * vectors;
    plan.threads = (numel_of_tile + of_warp - 1) / of_warp * 32;
    plan.num_tiles = (numel + numel_of_tile - 1) / numel_of_tile;
    return plan;
}

// Elements [begin, begin + count), and blocks [block, block + num_blocks); the last of each launch may be short.
struct Tile {
    std::size_t begin, block;
    std::uint32_t count, num_blocks;
};

__device__ __forceinline__ static Tile this_tile(const Tiling& plan) {
    Tile tile;
    tile.block = static_cast<std::size_t>(blockIdx.x) * plan.together;
    tile.begin = tile.block * plan.block_size;
    const std::size_t rest = plan.numel - tile.begin, whole = plan.together * plan.block_size;
    tile.count = static_cast<std::uint32_t>(rest < whole ? rest : whole);
    tile.num_blocks = (tile.count + plan.block_size - 1) / plan.block_size;
    return tile;
}

// Which block of its tile an element is in: element / block_size, exactly, since their product is below 2^32.
__device__ __forceinline__ static std::uint32_t block_of(std::uint32_t element, const Tiling& plan) {
    return static_cast<std::uint32_t>((element * plan.reciprocal) >> 32);
}

// The first element of a thread's vector, counted in its tile.
__device__ __forceinline__ static std::uint32_t first_of(std::uint32_t vector) {
    return (threadIdx.x + vector * blockDim.x) * vector_numel;
}

// What a thread holds of a tile, in registers: loops over it are unrolled.
struct Held {
    float values[vectors][vector_numel];
};

__device__ __forceinline__ static bool is_aligned(const void* address, std::size_t bytes) {
    return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

// How floats of a type are read and written.
struct Float32 {
    using Bits = float;
    using Vector = float4;
    __device__ __forceinline__ static float read(Bits bits) { return bits; }
    __device__ __forceinline__ static Bits written(float value) { return value; }
};
struct BFloat16 {
    using Bits = std::uint16_t;
    using Vector = ushort4;
    __device__ __forceinline__ static float read(Bits bits) { return float_of_bf16(bits); }
    __device__ __forceinline__ static Bits written(float value) { return bf16_of(value); }
};
// bf16 of numbers that it holds already.
struct UpperHalf {
    using Bits = std::uint16_t;
    using Vector = ushort4;
    __device__ __forceinline__ static Bits written(float value) {
        return static_cast<Bits>(bits_of_float(value) >> 16);
    }
};
struct Float16 {
    using Bits = std::uint16_t;
    using Vector = ushort4;
    __device__ __forceinline__ static float read(Bits bits) { return float_of_f16_bits(bits); }
    __device__ __forceinline__ static Bits written(float value) { return f16_bits_of(value); }
};

// Four of those at `from`; only those below `count`, and zeros for the others.
template <typename Float>
__device__ __forceinline__ static void load_vector(const typename Float::Bits* from, bool is_vector,
                                                   std::uint32_t first, std::uint32_t count,
                                                   float (&values)[vector_numel]) {
    if (is_vector && first + vector_numel <= count) {
        const auto bits = *reinterpret_cast<const typename Float::Vector*>(from + first);
        values[0] = Float::read(bits.x);
        values[1] = Float::read(bits.y);
        values[2] = Float::read(bits.z);
        values[3] = Float::read(bits.w);
        return;
    }
#pragma unroll
    for (std::uint32_t each = 0; each < vector_numel; ++each) {
        values[each] = first + each < count ? Float::read(from[first + each]) : 0.0f;
    }
}

template <typename Float>
__device__ __forceinline__ static void store_vector(typename Float::Bits* to, bool is_vector, std::uint32_t first,
                                                    std::uint32_t count, const float (&values)[vector_numel]) {
    if (is_vector && first + vector_numel <= count) {
        typename Float::Vector bits;
        bits.x = Float::written(values[0]);
        bits.y = Float::written(values[1]);
        bits.z = Float::written(values[2]);
        bits.w = Float::written(values[3]);
        *reinterpret_cast<typename Float::Vector*>(to + first) = bits;
        return;
    }
#pragma unroll
    for (std::uint32_t each = 0; each < vector_numel; ++each) {
        if (first + each < count) {
            to[first + each] = Float::written(values[each]);
        }
    }
}

template <typename Float>
__device__ __forceinline__ static void load_floats(const void* data, const Tile& tile, Held& held) {
    const auto* const from = static_cast<const typename Float::Bits*>(data) + tile.begin;
    const bool is_vector = is_aligned(from, sizeof(typename Float::Vector));
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        load_vector<Float>(from, is_vector, first_of(each), tile.count, held.values[each]);
    }
}

template <typename Float>
__device__ __forceinline__ static void store_floats(void* data, const Tile& tile, const Held& held) {
    auto* const to = static_cast<typename Float::Bits*>(data) + tile.begin;
    const bool is_vector = is_aligned(to, sizeof(typename Float::Vector));
#pragma unroll
    for (std::uint32_t each = 0; each < vectors; ++each) {
        store_vector<Float>(to, is_vector, first_of(each), tile.count, held.values[each]);
    }
}

// A tile of flat memory of floats; zeros past its end.
__device__ __forceinline__ static void load_tile(const Flat& from, const Tile& tile, Held& held) {
    switch (from.type) {
        case Type::f32: load_floats<Float32>(from.data, tile, held); return;
        case Type::bf16: load_floats<BFloat16>(from.data, tile, held); return;
        default: load_floats<Float16>(from.data, tile, held);
    }
}

__device__ __forceinline__ static void store_tile(const Flat& to, const Tile& tile, const Held& held) {
    switch (to.type) {
        case Type::f32: store_floats<Float32>(to.data, tile, held); return;
        case Type::bf16: store_floats<BFloat16>(to.data, tile, held); return;
        default: store_floats<Float16>(to.data, tile, held);
    }
}

}  // namespace zcore::cuda
