// GELU in its two forms and its derivative, of one number; see include/zcore/gelu.hpp. For code that is compiled once for
// each instruction set, as blocks.hpp.
#pragma once

#include "cpu/functions.hpp"
#include "zcore/gelu.hpp"

namespace zcore::ZCORE_ISA {

struct GeluErf {
    static inline float value(float x) { return 0.5f * x * (1.0f + erf_of(x * 0.707106781f)); }
    static inline float slope(float x) {
        const float share = 0.5f * (1.0f + erf_of(x * 0.707106781f));
        return share + x * (0.398942280f * exp_of(-0.5f * x * x));  // x times the normal density
    }
};

struct GeluTanh {
    static inline float value(float x) {
        return 0.5f * x * (1.0f + tanh_of(0.797884561f * (x + 0.044715f * x * x * x)));
    }
    static inline float slope(float x) {
        const float t = tanh_of(0.797884561f * (x + 0.044715f * x * x * x));
        const float inner = 0.797884561f * (1.0f + 3.0f * 0.044715f * x * x);
        return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
    }
};

}  // namespace zcore::ZCORE_ISA
