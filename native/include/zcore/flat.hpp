// Flat memory as the caller has it: a pointer, how many elements, of which type. Nothing here owns anything.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zcore {

enum class Type : std::uint8_t { f32, bf16, f16 };

struct Flat {
    void* data = nullptr;
    Type type = Type::f32;

    explicit operator bool() const { return data != nullptr; }
};

}  // namespace zcore
