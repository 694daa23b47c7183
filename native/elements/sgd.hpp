// SGD for one element, with momentum and without; the formula stands in zcore/sgd_step.hpp. Rounded where torch's fused
// step rounds.
#pragma once

#include "elements/each.hpp"
#include "zcore/sgd_step.hpp"

namespace zcore::ZCORE_ISA {

struct SgdElement {
    float lr, penalty, factor, momentum, fresh;
    bool is_penalised;  // by its penalty; else an infinite parameter would become NaN
    bool is_first, is_nesterov;

    explicit SgdElement(const Sgd& hyper)
        : lr(rounded(hyper.lr)),
          penalty(rounded(hyper.weight_decay)),
          factor(rounded(hyper.grad_factor)),
          momentum(rounded(hyper.momentum)),
          fresh(rounded(1.0 - hyper.dampening)),
          is_penalised(penalty != 0.0f),
          is_first(hyper.is_first),
          is_nesterov(hyper.is_nesterov) {}
};

ZCORE_EACH void step_element(const SgdElement& by, float& param, float grad) {
    const float scaled = grad * by.factor;
    const float g = by.is_penalised ? multiply_add(by.penalty, param, scaled) : scaled;
    param = multiply_add(-by.lr, g, param);
}

ZCORE_EACH void step_element(const SgdElement& by, float& param, float grad, float& momentum_buffer) {
    const float scaled = grad * by.factor;
    const float g = by.is_penalised ? multiply_add(by.penalty, param, scaled) : scaled;
    const float b = by.is_first ? g : multiply_add(by.fresh, g, by.momentum * momentum_buffer);
    momentum_buffer = b;
    param = multiply_add(-by.lr, by.is_nesterov ? multiply_add(by.momentum, b, g) : b, param);
}

}  // namespace zcore::ZCORE_ISA
