// Lion for one element; the formula stands in zcore/lion_step.hpp.
#pragma once

#include "elements/each.hpp"
#include "zcore/lion_step.hpp"

namespace zcore::ZCORE_ISA {

struct LionElement {
    float decay, lr, factor, rest1, rest2;

    explicit LionElement(const Lion& hyper)
        : decay(rounded(1.0 - hyper.lr * hyper.weight_decay)),
          lr(rounded(hyper.lr)),
          factor(rounded(hyper.grad_factor)),
          rest1(rounded(1.0 - hyper.beta1)),
          rest2(rounded(1.0 - hyper.beta2)) {}
};

ZCORE_EACH float sign(float value) {
    const float one = value > 0.0f ? 1.0f : value < 0.0f ? -1.0f : 0.0f;
    return value == value ? one : value;
}

ZCORE_EACH void step_element(const LionElement& by, float& param, float grad, float& exp_avg) {
    const float g = grad * by.factor, m = exp_avg;
    const float kept = param * by.decay;
    param = kept - by.lr * sign(multiply_add(by.rest1, g - m, m));
    exp_avg = multiply_add(by.rest2, g - m, m);
}

}  // namespace zcore::ZCORE_ISA
