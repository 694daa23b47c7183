// GELU in its two forms and its derivative, of one number; see include/zcore/gelu.hpp. For code that is compiled once for
// each instruction set, as blocks.hpp.
#pragma once

#include "cpu/functions.hpp"
#include "zcore/gelu.hpp"

namespace zcore::ZCORE_ISA {

// x times the share of the normal distribution below x. Of what is above |x|, so that nothing cancels.
struct GeluErf {
    static inline float value(float x) { return x * below(x); }
    static inline float slope(float x) {
        return below(x) + x * (0.398942280f * exp_of(-0.5f * x * x));  // x times the normal density
    }

private:
    static inline float below(float x) {
        const float above = normal_tail_of(magnitude_of(x));
        return x < 0.0f ? above : 1.0f - above;
    }
};

// The same with (1 + tanh(u)) / 2 for the share, which is sigmoid(2 u).
struct GeluTanh {
    static inline float value(float x) { return x * below(x); }
    static inline float slope(float x) {
        const float share = below(x);
        const float inner = 1.59576912f * (1.0f + 3.0f * 0.044715f * x * x);
        return share + x * share * (1.0f - share) * inner;
    }

private:
    static inline float below(float x) { return sigmoid_of(1.59576912f * (x + 0.044715f * x * x * x)); }
};

}  // namespace zcore::ZCORE_ISA
