// How the elements of flat memory fall to the threads of a GPU, and how a thread's share goes between memory and fp32.
//
//     memory    |tile 0         |tile 1         |...      256 elements each, as a block of codes has; a warp takes one
//     tile      |0 |1 |...|31 |0 |1 |...|31 |             two vectors of 4 elements for each lane
//
// So neighbours read neighbours, and a thread has two vectors of each operand on their way at a time. A vector is moved
// at once where it is whole and lies at a multiple of its size, else element by element. It stays as it lies in memory
// (Words) until all operands are on their way.
//
// Nothing here is a kernel: tests run the same functions lane by lane on the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elements/dynamic_code.hpp"
#include "elements/floats.hpp"
#include "zcore/flat.hpp"

namespace zcore::ZCORE_ISA {

constexpr unsigned lanes = 32, vector_numel = 4, num_vectors = 2;
constexpr unsigned tile_numel = lanes * vector_numel * num_vectors;
static_assert(tile_numel == code_block_numel);  // so that a tile has one scale

// Four elements of 4, 2 or 1 bytes, from the lowest bits of the first word up.
struct alignas(16) Words {
    std::uint32_t at[vector_numel];
};
struct alignas(8) TwoWords {
    std::uint32_t at[2];
};

ZCORE_EACH bool is_of_codes(Type type) { return type == Type::signed_code || type == Type::unsigned_code; }
ZCORE_EACH unsigned bytes_of(Type type) { return type == Type::f32 ? 4 : is_of_codes(type) ? 1 : 2; }

// What the two codes stand for, for quick access.
struct DynamicTables {
    float values[num_codes];
    float bounds[num_codes];
};

ZCORE_EACH void fill_entry(DynamicTables& tables, int code, bool is_signed) {
    tables.values[code] = dynamic_value(code, is_signed);
    tables.bounds[code] = dynamic_bound(code, is_signed);
}

// The place of vector `vector` of a lane, and how many of its elements there are in memory of `numel`.
struct Place {
    std::size_t at;
    unsigned count;
};

ZCORE_EACH Place place_of(std::size_t tile, unsigned vector, unsigned lane, std::size_t numel) {
    const std::size_t at = tile * tile_numel + (vector * lanes + lane) * vector_numel;
    const std::size_t left = at < numel ? numel - at : 0;
    return {at, left < vector_numel ? static_cast<unsigned>(left) : vector_numel};
}

ZCORE_EACH bool is_whole(const void* first, unsigned bytes, unsigned count) {
    return count == vector_numel && reinterpret_cast<std::uintptr_t>(first) % (bytes * vector_numel) == 0;
}

// The elements at `place`, and zeros for what there is not.
ZCORE_EACH Words load_words(const Flat& from, Place place) {
    const unsigned bytes = bytes_of(from.type);
    const auto* const first = static_cast<const std::uint8_t*>(from.data) + place.at * bytes;
    Words words{};
    if (is_whole(first, bytes, place.count)) {
        switch (bytes) {
            case 4: words = *reinterpret_cast<const Words*>(first); return words;
            case 2: {
                const TwoWords two = *reinterpret_cast<const TwoWords*>(first);
                words.at[0] = two.at[0];
                words.at[1] = two.at[1];
                return words;
            }
            default: words.at[0] = *reinterpret_cast<const std::uint32_t*>(first); return words;
        }
    }
    ZCORE_UNROLL
    for (unsigned each = 0; each < vector_numel; ++each) {
        if (each < place.count) {
            switch (bytes) {
                case 4: words.at[each] = reinterpret_cast<const std::uint32_t*>(first)[each]; break;
                case 2: {
                    const std::uint32_t half = reinterpret_cast<const std::uint16_t*>(first)[each];
                    words.at[each / 2] |= half << (each % 2 * 16);
                    break;
                }
                default: words.at[0] |= static_cast<std::uint32_t>(first[each]) << (each * 8);
            }
        }
    }
    return words;
}

ZCORE_EACH void store_words(const Flat& to, Place place, const Words& words) {
    const unsigned bytes = bytes_of(to.type);
    auto* const first = static_cast<std::uint8_t*>(to.data) + place.at * bytes;
    if (is_whole(first, bytes, place.count)) {
        switch (bytes) {
            case 4: *reinterpret_cast<Words*>(first) = words; return;
            case 2: *reinterpret_cast<TwoWords*>(first) = {{words.at[0], words.at[1]}}; return;
            default: *reinterpret_cast<std::uint32_t*>(first) = words.at[0]; return;
        }
    }
    ZCORE_UNROLL
    for (unsigned each = 0; each < vector_numel; ++each) {
        if (each < place.count) {
            switch (bytes) {
                case 4: reinterpret_cast<std::uint32_t*>(first)[each] = words.at[each]; break;
                case 2:
                    reinterpret_cast<std::uint16_t*>(first)[each] =
                        static_cast<std::uint16_t>(words.at[each / 2] >> (each % 2 * 16));
                    break;
                default: first[each] = static_cast<std::uint8_t>(words.at[0] >> (each * 8));
            }
        }
    }
}

ZCORE_EACH std::uint16_t half_at(const Words& words, unsigned each) {
    return static_cast<std::uint16_t>(words.at[each / 2] >> (each % 2 * 16));
}

ZCORE_EACH void decode_floats(const Words& words, Type type, float* values) {
    ZCORE_UNROLL
    for (unsigned each = 0; each < vector_numel; ++each) {
        switch (type) {
            case Type::f32: values[each] = float_of_bits(words.at[each]); break;
            case Type::bf16: values[each] = float_of_bf16(half_at(words, each)); break;
            default: values[each] = float_of_f16_bits(half_at(words, each));
        }
    }
}

// scale, tables: of codes alone.
ZCORE_EACH void decode(const Words& words, Type type, float scale, const DynamicTables& tables, float* values) {
    if (!is_of_codes(type)) {
        decode_floats(words, type, values);
        return;
    }
    ZCORE_UNROLL
    for (unsigned each = 0; each < vector_numel; ++each) {
        values[each] = tables.values[(words.at[0] >> (each * 8)) & 0xffu] * scale;
    }
}

// Rounded to the nearest.
ZCORE_EACH Words encode_floats(const float* values, Type type) {
    Words words{};
    ZCORE_UNROLL
    for (unsigned each = 0; each < vector_numel; ++each) {
        switch (type) {
            case Type::f32: words.at[each] = bits_of_float(values[each]); break;
            case Type::bf16:
                words.at[each / 2] |= static_cast<std::uint32_t>(bf16_of(values[each])) << (each % 2 * 16);
                break;
            default: words.at[each / 2] |= static_cast<std::uint32_t>(f16_bits_of(values[each])) << (each % 2 * 16);
        }
    }
    return words;
}

// scale: of codes alone, the largest magnitude of the tile, or 0 or NaN.
ZCORE_EACH Words encode(const float* values, Type type, float scale, const DynamicTables& tables) {
    if (!is_of_codes(type)) {
        return encode_floats(values, type);
    }
    Words words{};
    const bool is_signed = type == Type::signed_code, has_values = scale > 0.0f;  // neither 0 nor NaN
    ZCORE_UNROLL
    for (unsigned each = 0; each < vector_numel; ++each) {
        const float relative = has_values ? values[each] / scale : 0.0f;
        words.at[0] |= dynamic_code_between(relative, is_signed, tables.bounds) << (each * 8);
    }
    return words;
}

// Of bits of magnitudes, which are ordered as they are, NaN last: the scale of a tile whose largest they are.
ZCORE_EACH float scale_of(std::uint32_t largest) {
    return float_of_bits(largest >= 0x7f800000u ? 0x7fc00000u : largest);
}

}  // namespace zcore::ZCORE_ISA
