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
#include "zcore/flat.hpp"

namespace zcore::ZCORE_ISA {

constexpr std::size_t block_numel = code_block_numel;  // so that a block has one scale

// How many elements the block at `at` has, of a range that ends at `end`.
static inline std::size_t block_at(std::size_t at, std::size_t end) {
    return end - at < block_numel ? end - at : block_numel;
}

// A hyper-parameter, kept in double until 1 - beta and its like are computed: 1.0f - 0.999f is off by 5e-5.
static inline float rounded(double value) { return static_cast<float>(value); }

// a b + c, rounded once where the instruction set can. Said where torch's fused steps do it, and nowhere left to the
// compiler, so that a step has torch's bits on such machines.
static inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline std::uint16_t bf16_of(float value) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry it into the sign
    return static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

static inline float float_of_bf16(std::uint16_t value) { return float_of_bits(static_cast<std::uint32_t>(value) << 16); }

// fp16 without F16C, branch by branch as IEEE 754 has it.
static inline float float_of_f16_bits(std::uint16_t half) {
    const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16;
    const std::uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) {
        return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    }
    if (magnitude < 0x400u) {
        const float value = static_cast<float>(magnitude) * 0x1p-24f;  // exact
        return sign ? -value : value;
    }
    return float_of_bits(sign | ((magnitude << 13) + (112u << 23)));
}

static inline std::uint16_t f16_bits_of(float value) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) {
        return static_cast<std::uint16_t>(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
    }
    if (magnitude >= 0x47800000u) {  // 65536 and more; what rounds up to that carries into it below
        return static_cast<std::uint16_t>(sign | 0x7c00u);
    }
    if (magnitude < 0x38800000u) {  // below the smallest normal number: let the addition round
        const float shifted = float_of_bits(magnitude) + 0.5f;
        return static_cast<std::uint16_t>(sign | (bits_of_float(shifted) - 0x3f000000u));
    }
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23);
    return static_cast<std::uint16_t>(sign | (rounded >> 13));
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
        case Type::bf16: {
            std::uint16_t* ZCORE_RESTRICT out = static_cast<std::uint16_t*>(to.data) + begin;
            for (std::size_t at = 0; at < count; ++at) {
                out[at] = bf16_of(values[at]);
            }
            return;
        }
        case Type::f16: f16_of_floats(values, static_cast<std::uint16_t*>(to.data) + begin, count); return;
        default:
            to.scales[begin / block_numel] = codes_of_floats(
                values, code_of(to.type), static_cast<std::uint8_t*>(to.data) + begin, count);
    }
}

}  // namespace zcore::ZCORE_ISA
