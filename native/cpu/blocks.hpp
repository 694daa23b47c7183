// Flat memory of any type, read and written in blocks of fp32 that stay in the nearest cache. For code that is compiled
// once for each instruction set: everything is `static`, and in the namespace of that set (see CMakeLists.txt).
//
// fp32 is read and written where it lies. Other types pass through a buffer of one block, 1 KiB, which costs less than
// the memory they save.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/dynamic_lanes.hpp"
#include "cpu/vectors.hpp"
#include "elements/floats.hpp"
#include "zcore/flat.hpp"

namespace zcore::ZCORE_ISA {

constexpr std::size_t block_numel = code_block_numel;  // so that a block has one scale

// How many elements the block at `at` has, of a range that ends at `end`.
static inline std::size_t block_at(std::size_t at, std::size_t end) {
    return end - at < block_numel ? end - at : block_numel;
}

static inline void floats_of_f16(const std::uint16_t* ZCORE_RESTRICT in, float* ZCORE_RESTRICT out, std::size_t count) {
    std::size_t at = 0;
#if defined(__F16C__)
    for (; at + 8 <= count; at += 8) {
        _mm256_storeu_ps(out + at, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + at))));
    }
#endif
    for (; at < count; ++at) {
        out[at] = float_of_f16_bits(in[at]);
    }
}

static inline void f16_of_floats(const float* ZCORE_RESTRICT in, std::uint16_t* ZCORE_RESTRICT out, std::size_t count) {
    std::size_t at = 0;
#if defined(__F16C__)
    for (; at + 8 <= count; at += 8) {
        const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(in + at), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), halves);
    }
#endif
    for (; at < count; ++at) {
        out[at] = f16_bits_of(in[at]);
    }
}

#if defined(__AVX512BW__)
// bf16 of 16 elements in the upper halves of words; see bf16_of.
static inline __m512i bf16_in_upper_halves(const float* in) {
    const __m512 values = _mm512_loadu_ps(in);
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 are_nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(rounded, are_nan, bits, _mm512_set1_epi32(0x400000));
}
#endif

// By hand with AVX-512, as GCC puts a NaN in after it has narrowed both to 16 bits: 23 instructions where 14 do, and
// half as much time again.
static inline void bf16_of_floats(const float* ZCORE_RESTRICT in, std::uint16_t* ZCORE_RESTRICT out,
                                  std::size_t count) {
    std::size_t at = 0;
#if defined(__AVX512BW__)
    alignas(64) static constexpr std::uint16_t upper_halves[32] = {
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
        33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    const __m512i places = _mm512_load_si512(upper_halves);
    for (; at + 32 <= count; at += 32) {
        const __m512i low = bf16_in_upper_halves(in + at), high = bf16_in_upper_halves(in + at + 16);
        _mm512_storeu_si512(out + at, _mm512_permutex2var_epi16(low, places, high));
    }
#endif
    for (; at < count; ++at) {
        out[at] = bf16_of(in[at]);
    }
}

static inline const DynamicCode& code_of(Type type) {
    return type == Type::signed_code ? signed_dynamic_code : unsigned_dynamic_code;
}

// Elements [begin, begin + count) of `from` in fp32: where they lie, or in `buffer`, of `block_numel`.
// `begin` is a whole number of blocks where `from` is of codes.
static inline float* load_block(Flat from, std::size_t begin, std::size_t count, float* ZCORE_RESTRICT buffer) {
    switch (from.type) {
        case Type::f32: return static_cast<float*>(from.data) + begin;
        case Type::bf16: {
            const std::uint16_t* ZCORE_RESTRICT in = static_cast<const std::uint16_t*>(from.data) + begin;
            for (std::size_t at = 0; at < count; ++at) {
                buffer[at] = float_of_bf16(in[at]);
            }
            return buffer;
        }
        case Type::f16: floats_of_f16(static_cast<const std::uint16_t*>(from.data) + begin, buffer, count); return buffer;
        default:
            floats_of_codes(static_cast<const std::uint8_t*>(from.data) + begin, from.scales[begin / block_numel],
                            code_of(from.type), buffer, count);
            return buffer;
    }
}

// The other way round; nothing where `values` lie in `to` itself, or there is no `to`.
static inline void store_block(Flat to, std::size_t begin, std::size_t count, const float* values) {
    if (!to) {
        return;
    }
    switch (to.type) {
        case Type::f32: {
            float* const out = static_cast<float*>(to.data) + begin;
            if (out != values) {
                std::memcpy(out, values, count * sizeof(float));
            }
            return;
        }
        case Type::bf16: bf16_of_floats(values, static_cast<std::uint16_t*>(to.data) + begin, count); return;
        case Type::f16: f16_of_floats(values, static_cast<std::uint16_t*>(to.data) + begin, count); return;
        default:
            to.scales[begin / block_numel] = codes_of_floats(
                values, code_of(to.type), static_cast<std::uint8_t*>(to.data) + begin, count);
    }
}

}  // namespace zcore::ZCORE_ISA
