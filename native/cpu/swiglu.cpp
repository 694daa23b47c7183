#include "zcore/swiglu.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/functions.hpp"
#include "cpu/glu.hpp"

namespace zcore::ZCORE_ISA {

struct Silu {
    static inline float value(float g) { return g / (1.0f + exp_of(-g)); }
    static inline float slope(float g) {
        const float p = sigmoid_of(g);
        return p * (1.0f + g * (1.0f - p));
    }
};

void swiglu_part(const Glu& glu, std::size_t begin, std::size_t end) { glu_forward<Silu>(glu, begin, end); }

void swiglu_backward_part(const GluBackward& glu, std::size_t begin, std::size_t end) {
    glu_backward<Silu>(glu, begin, end);
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void swiglu_part(const Glu&, std::size_t, std::size_t);
                  void swiglu_backward_part(const GluBackward&, std::size_t, std::size_t))

void swiglu(const Glu& glu, int threads) {
    const auto part = ZCORE_CHOOSE(swiglu_part);
    parallel_for(glu.rows * glu.hidden, piece_grain, threads,
                 [&](std::size_t begin, std::size_t end) { part(glu, begin, end); });
}

void swiglu_backward(const GluBackward& glu, int threads) {
    const auto part = ZCORE_CHOOSE(swiglu_backward_part);
    parallel_for(glu.rows * glu.hidden, piece_grain, threads,
                 [&](std::size_t begin, std::size_t end) { part(glu, begin, end); });
}

}  // namespace zcore

#endif
