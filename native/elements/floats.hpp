// The bits of a float, and floats of 16 bits in and out of them, element by element; see each.hpp.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements/each.hpp"

namespace zcore::ZCORE_ISA {

ZCORE_EACH float float_of_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

ZCORE_EACH std::uint32_t bits_of_float(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

ZCORE_EACH std::uint16_t bf16_of(float value) {
    const std::uint32_t bits = bits_of_float(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;  // rounding could carry it into the sign
    return static_cast<std::uint16_t>(is_nan ? (bits >> 16) | 0x40u : rounded);
}

ZCORE_EACH float float_of_bf16(std::uint16_t value) { return float_of_bits(static_cast<std::uint32_t>(value) << 16); }

// fp16; without an instruction for it, branch by branch as IEEE 754 has it.
ZCORE_EACH float float_of_f16_bits(std::uint16_t half) {
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
#else
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
#endif
}

ZCORE_EACH std::uint16_t f16_bits_of(float value) {
#if defined(__CUDA_ARCH__)
    std::uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
#else
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
#endif
}

}  // namespace zcore::ZCORE_ISA
