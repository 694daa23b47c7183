#include "zcore/geglu.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/gelu.hpp"
#include "cpu/glu.hpp"

namespace zcore::ZCORE_ISA {

void geglu_part(const Glu& glu, Gelu form, std::size_t begin, std::size_t end) {
    form == Gelu::erf ? glu_forward<GeluErf>(glu, begin, end) : glu_forward<GeluTanh>(glu, begin, end);
}

void geglu_backward_part(const GluBackward& glu, Gelu form, std::size_t begin, std::size_t end) {
    form == Gelu::erf ? glu_backward<GeluErf>(glu, begin, end) : glu_backward<GeluTanh>(glu, begin, end);
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void geglu_part(const Glu&, Gelu, std::size_t, std::size_t);
                  void geglu_backward_part(const GluBackward&, Gelu, std::size_t, std::size_t))

void geglu(const Glu& glu, Gelu form, int threads) {
    const auto part = ZCORE_CHOOSE(geglu_part);
    parallel_for(glu.rows * glu.hidden, piece_grain, threads,
                 [&](std::size_t begin, std::size_t end) { part(glu, form, begin, end); });
}

void geglu_backward(const GluBackward& glu, Gelu form, int threads) {
    const auto part = ZCORE_CHOOSE(geglu_backward_part);
    parallel_for(glu.rows * glu.hidden, piece_grain, threads,
                 [&](std::size_t begin, std::size_t end) { part(glu, form, begin, end); });
}

}  // namespace zcore

#endif
