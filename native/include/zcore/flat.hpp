// Flat memory as the caller has it: a pointer, how many elements, of which type. Nothing here owns anything.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zcore {

// The last two are of one byte, with an fp32 scale for each `code_block_numel` elements: see cpu/dynamic_code.hpp.
enum class Type : std::uint8_t { f32, bf16, f16, signed_code, unsigned_code };

constexpr std::size_t code_block_numel = 256;

struct Flat {
    void* data = nullptr;
    Type type = Type::f32;
    float* scales = nullptr;  // of codes alone

    explicit operator bool() const { return data != nullptr; }
};

}  // namespace zcore
