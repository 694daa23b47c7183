// Vectors as wide as the instruction set has them. For code that is compiled once for each instruction set: everything
// is `static`, and in the namespace of that set (see CMakeLists.txt).
#pragma once

#include <cstddef>
#include <cstring>

#include "elements/floats.hpp"

#if defined(__F16C__)  // and so AVX2: see CMakeLists.txt
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what GCC 12 leaves undefined on purpose (GCC bug 105593)
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define ZCORE_RESTRICT __restrict__

namespace zcore::ZCORE_ISA {

#if defined(__AVX512F__)
constexpr std::size_t vector_bytes = 64;
#elif defined(__AVX2__)
constexpr std::size_t vector_bytes = 32;
#else
constexpr std::size_t vector_bytes = 16;
#endif
typedef float Vector __attribute__((vector_size(vector_bytes)));

constexpr std::size_t vector_numel = vector_bytes / sizeof(float);

static inline Vector vector_at(const float* from) {  // at any alignment
    Vector loaded;
    std::memcpy(&loaded, from, sizeof loaded);
    return loaded;
}

}  // namespace zcore::ZCORE_ISA
