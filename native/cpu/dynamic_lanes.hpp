// A block in fp32 to the codes of dynamic_code.hpp and back, a vector at a time where the instruction set can pick from
// eight numbers by an index in each lane (AVX2, AVX-512). For code that is compiled once for each instruction set, as
// vectors.hpp.
//
// Within a decade values are equally spaced, so no table of 256 is needed, but eight straight lines:
//
//     to a value     (18 f - 16 2^e) / D_e    f = count + each + 1/2 of the code, and 2^e the power of two below it
//     to a code      round(A_d x + B_d)       d: the decade of x
//
// The quotient of whole numbers is rounded once, as the table's is: times 1/D in two floats, whose second corrects what
// the first lacks. A code whose line comes close to a half could be rounded otherwise than the table has it: these lanes,
// one in 800, are left to the table. So all sets give the table's codes and values, bit by bit: both codes of all
// numbers from -1 to 1 were compared, and tests/dynamic_lanes_test.cpp compares those that matter most.
#pragma once

#include "cpu/dynamic_code.hpp"
#include "cpu/vectors.hpp"

namespace zcore::ZCORE_ISA {

// The nearest code, of two as near the lower.
static inline std::uint8_t dynamic_code_of(float relative, const DynamicCode& code) {
    const std::uint8_t lowest = code.lowest[bits_of_float(relative) >> 16];
    return static_cast<std::uint8_t>(lowest + (relative > code.bounds[lowest]));
}

#if defined(__AVX512F__)

static inline __m512 pick(const float* numbers, __m512i index) {  // by the lowest three bits, as they are there twice
    return _mm512_permutexvar_ps(index, _mm512_broadcast_f32x8(_mm256_load_ps(numbers)));
}

template <bool is_signed>
static inline Vector values_of_codes(const std::uint8_t* in, const DynamicLines& lines) {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
    const __m512 place = _mm512_add_ps(_mm512_cvtepi32_ps(codes), _mm512_set1_ps(lines.place_of_first));
    const __m512 sign = _mm512_set1_ps(-0.0f);
    const __m512 f = is_signed ? _mm512_add_ps(_mm512_andnot_ps(sign, place), _mm512_set1_ps(1.0f)) : place;
    const __m512i exponent = _mm512_srli_epi32(_mm512_castps_si512(f), 23);
    const __m512 numerator = _mm512_fmadd_ps(f, _mm512_set1_ps(18.0f), pick(lines.less, exponent));
    const __m512 rest = _mm512_mul_ps(numerator, pick(lines.inverse_rest, exponent));
    const __m512 value = _mm512_fmadd_ps(numerator, pick(lines.inverse, exponent), rest);
    if constexpr (!is_signed) {
        return value;
    }
    const __mmask16 is_value = _mm512_cmpneq_epi32_mask(codes, _mm512_set1_epi32(code_count / 2 - 1));
    return _mm512_maskz_or_ps(is_value, value, _mm512_and_ps(place, sign));
}

// Returns the lanes whose codes are in doubt, a bit each.
template <bool is_signed>
static inline std::uint32_t codes_of_vector(Vector relative, const DynamicLines& lines, std::uint8_t* out) {
    const __mmask16 is_negative = _mm512_movepi32_mask(_mm512_castps_si512(relative));
    __m512 x = _mm512_max_ps(is_signed ? _mm512_abs_ps(relative) : relative, _mm512_set1_ps(lines.smallest));
    if constexpr (is_signed) {  // by one unit, as on a bound the larger magnitude is the lower code
        const __m512i bits = _mm512_castps_si512(x);
        x = _mm512_castsi512_ps(_mm512_mask_add_epi32(bits, is_negative, bits, _mm512_set1_epi32(1)));
    }
    const __m512i cell = _mm512_srli_epi32(_mm512_castps_si512(x), 24);
    const __m512i cells = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(lines.first_decade)));
    const __m512i first = _mm512_shuffle_epi8(cells, cell);
    const __mmask16 is_above = _mm512_cmp_ps_mask(x, pick(lines.end, first), _CMP_GT_OQ);
    const __m512i decade = _mm512_mask_add_epi32(first, is_above, first, _mm512_set1_epi32(1));
    const __m512 on_line = _mm512_fmadd_ps(x, pick(lines.slope, decade), pick(lines.start, decade));
    const __m512i fixed = _mm512_cvtps_epi32(_mm512_min_ps(on_line, pick(lines.last, decade)));
    const __mmask16 in_doubt = _mm512_testn_epi32_mask(fixed, _mm512_set1_epi32(DynamicLines::doubt));
    __m512i codes = _mm512_srli_epi32(fixed, DynamicLines::fraction_bits);
    const __m512i one = _mm512_set1_epi32(1);
    if constexpr (is_signed) {
        codes = _mm512_mask_max_epi32(codes, is_negative, codes, one);
        const __m512i below = _mm512_sub_epi32(_mm512_set1_epi32(code_count / 2), codes);
        const __m512i above = _mm512_add_epi32(codes, _mm512_set1_epi32(code_count / 2 - 1));
        codes = _mm512_mask_mov_epi32(above, is_negative, below);
    } else {
        const __mmask16 is_value = _mm512_cmp_ps_mask(relative, _mm512_setzero_ps(), _CMP_GT_OQ);
        codes = _mm512_maskz_max_epi32(is_value, codes, one);
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(codes));
    return in_doubt;
}

#elif defined(__AVX2__)

static inline __m256 pick(const float* numbers, __m256i index) {  // by the lowest three bits
    return _mm256_permutevar8x32_ps(_mm256_load_ps(numbers), index);
}

template <bool is_signed>
static inline Vector values_of_codes(const std::uint8_t* in, const DynamicLines& lines) {
    const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in)));
    const __m256 place = _mm256_add_ps(_mm256_cvtepi32_ps(codes), _mm256_set1_ps(lines.place_of_first));
    const __m256 sign = _mm256_set1_ps(-0.0f);
    const __m256 f = is_signed ? _mm256_add_ps(_mm256_andnot_ps(sign, place), _mm256_set1_ps(1.0f)) : place;
    const __m256i exponent = _mm256_srli_epi32(_mm256_castps_si256(f), 23);
    const __m256 numerator = _mm256_fmadd_ps(f, _mm256_set1_ps(18.0f), pick(lines.less, exponent));
    const __m256 rest = _mm256_mul_ps(numerator, pick(lines.inverse_rest, exponent));
    const __m256 value = _mm256_fmadd_ps(numerator, pick(lines.inverse, exponent), rest);
    if constexpr (!is_signed) {
        return value;
    }
    const __m256i is_zero = _mm256_cmpeq_epi32(codes, _mm256_set1_epi32(code_count / 2 - 1));
    return _mm256_andnot_ps(_mm256_castsi256_ps(is_zero), _mm256_or_ps(value, _mm256_and_ps(place, sign)));
}

// Returns the lanes whose codes are in doubt, a bit each.
template <bool is_signed>
static inline std::uint32_t codes_of_vector(Vector relative, const DynamicLines& lines, std::uint8_t* out) {
    const __m256i is_negative = _mm256_srai_epi32(_mm256_castps_si256(relative), 31);
    const __m256 magnitude = is_signed ? _mm256_andnot_ps(_mm256_set1_ps(-0.0f), relative) : Vector(relative);
    __m256 x = _mm256_max_ps(magnitude, _mm256_set1_ps(lines.smallest));
    if constexpr (is_signed) {  // by one unit, as on a bound the larger magnitude is the lower code
        x = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_castps_si256(x), is_negative));
    }
    const __m256i cell = _mm256_srli_epi32(_mm256_castps_si256(x), 24);
    const __m128i cells = _mm_load_si128(reinterpret_cast<const __m128i*>(lines.first_decade));
    const __m256i first = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(cells), cell);
    const __m256 is_above = _mm256_cmp_ps(x, pick(lines.end, first), _CMP_GT_OQ);
    const __m256i decade = _mm256_sub_epi32(first, _mm256_castps_si256(is_above));
    const __m256 on_line = _mm256_fmadd_ps(x, pick(lines.slope, decade), pick(lines.start, decade));
    const __m256i fixed = _mm256_cvtps_epi32(_mm256_min_ps(on_line, pick(lines.last, decade)));
    const __m256i in_doubt = _mm256_cmpeq_epi32(_mm256_and_si256(fixed, _mm256_set1_epi32(DynamicLines::doubt)),
                                                _mm256_setzero_si256());
    __m256i codes = _mm256_srli_epi32(fixed, DynamicLines::fraction_bits);
    if constexpr (is_signed) {  // 127 + code, or 128 - code, which is 127 + ~code + 2
        codes = _mm256_max_epi32(codes, _mm256_srli_epi32(is_negative, 31));
        const __m256i twice = _mm256_add_epi32(is_negative, is_negative);
        const __m256i start = _mm256_sub_epi32(_mm256_set1_epi32(code_count / 2 - 1), twice);
        codes = _mm256_add_epi32(_mm256_xor_si256(codes, is_negative), start);
    } else {
        const __m256i is_value = _mm256_castps_si256(_mm256_cmp_ps(relative, _mm256_setzero_ps(), _CMP_GT_OQ));
        codes = _mm256_and_si256(_mm256_max_epi32(codes, _mm256_set1_epi32(1)), is_value);
    }
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm_packus_epi16(words, words));
    return static_cast<std::uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(in_doubt)));
}

#endif

#if defined(__AVX2__)

// Calls visit(at, numel) for each vector of `count` elements, the last of which may be `numel` of one.
template <typename Visit>
static inline void for_each_vector(std::size_t count, Visit visit) {
    const std::size_t rest = count % vector_numel;
    for (std::size_t at = 0; at < count - rest; at += vector_numel) {
        visit(at, vector_numel);
    }
    if (rest != 0) {
        visit(count - rest, rest);
    }
}

template <bool is_signed>
static inline void decode_lines(const std::uint8_t* ZCORE_RESTRICT in, float scale, const DynamicLines& lines,
                          float* ZCORE_RESTRICT out, std::size_t count) {
    for_each_vector(count, [&](std::size_t at, std::size_t numel) {
        std::uint8_t codes[vector_numel] = {};
        std::memcpy(codes, in + at, numel);
        const Vector values = values_of_codes<is_signed>(codes, lines) * scale;
        std::memcpy(out + at, &values, numel * sizeof(float));
    });
}

template <bool is_signed>
static inline void encode_lines(const float* ZCORE_RESTRICT in, float scale, const DynamicCode& code,
                          std::uint8_t* ZCORE_RESTRICT out, std::size_t count) {
    for_each_vector(count, [&](std::size_t at, std::size_t numel) {
        Vector values = {};
        std::memcpy(&values, in + at, numel * sizeof(float));
        std::uint8_t codes[vector_numel];
        std::uint32_t in_doubt = codes_of_vector<is_signed>(values / scale, code.lines, codes);
        for (; __builtin_expect(in_doubt != 0, 0); in_doubt &= in_doubt - 1) {
            const int lane = __builtin_ctz(in_doubt);
            codes[lane] = dynamic_code_of(values[lane] / scale, code);
        }
        std::memcpy(out + at, codes, numel);
    });
}

static inline void floats_of_codes(const std::uint8_t* ZCORE_RESTRICT in, float scale, const DynamicCode& code,
                                   float* ZCORE_RESTRICT out, std::size_t count) {
    code.lines.is_signed ? decode_lines<true>(in, scale, code.lines, out, count)
                         : decode_lines<false>(in, scale, code.lines, out, count);
}

static inline void codes_of_finite(const float* ZCORE_RESTRICT in, float scale, const DynamicCode& code,
                                   std::uint8_t* ZCORE_RESTRICT out, std::size_t count) {
    code.lines.is_signed ? encode_lines<true>(in, scale, code, out, count)
                         : encode_lines<false>(in, scale, code, out, count);
}

#else

static inline void floats_of_codes(const std::uint8_t* ZCORE_RESTRICT in, float scale, const DynamicCode& code,
                                   float* ZCORE_RESTRICT out, std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        out[at] = code.values[in[at]] * scale;
    }
}

static inline void codes_of_finite(const float* ZCORE_RESTRICT in, float scale, const DynamicCode& code,
                                   std::uint8_t* ZCORE_RESTRICT out, std::size_t count) {
    for (std::size_t at = 0; at < count; ++at) {
        out[at] = dynamic_code_of(in[at] / scale, code);
    }
}

#endif

// Returns the scale.
static inline float codes_of_floats(const float* ZCORE_RESTRICT in, const DynamicCode& code,
                                    std::uint8_t* ZCORE_RESTRICT out, std::size_t count) {
    constexpr std::int32_t infinity_bits = 0x7f800000;
    std::int32_t largest = 0;  // of bits, which are ordered as magnitudes are, NaN last: integers have vector maxima
    for (std::size_t at = 0; at < count; ++at) {
        const auto bits = static_cast<std::int32_t>(bits_of_float(in[at]) & 0x7fffffffu);
        largest = bits > largest ? bits : largest;
    }
    const float scale = float_of_bits(static_cast<std::uint32_t>(largest));
    if (largest == 0 || largest >= infinity_bits) {
        std::memset(out, dynamic_code_of(0.0f, code), count);
        return largest == 0 ? 0.0f : float_of_bits(0x7fc00000u);
    }
    codes_of_finite(in, scale, code, out, count);
    return scale;
}

}  // namespace zcore::ZCORE_ISA
