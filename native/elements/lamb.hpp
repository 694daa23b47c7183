// Both passes of LAMB for one element; the formulas stand in zcore/lamb_step.hpp.
#pragma once

#include <cmath>

#include "elements/each.hpp"
#include "zcore/lamb_step.hpp"

namespace zcore::ZCORE_ISA {

struct LambElement {
    float factor, beta2, rest1, rest2, decay, eps, unbias1, unbias2;

    explicit LambElement(const Lamb& hyper)
        : factor(rounded(hyper.grad_factor)),
          beta2(rounded(hyper.beta2)),
          rest1(rounded(1.0 - hyper.beta1)),
          rest2(rounded(1.0 - hyper.beta2)),
          decay(rounded(hyper.weight_decay)),
          eps(rounded(hyper.eps)),
          unbias1(rounded(1.0 / hyper.bias_correction1)),
          unbias2(rounded(1.0 / hyper.bias_correction2_sqrt)) {}
};

ZCORE_EACH void average_element(const LambElement& by, float grad, float& exp_avg, float& exp_avg_sq) {
    const float g = grad * by.factor;
    exp_avg = multiply_add(by.rest1, g - exp_avg, exp_avg);
    exp_avg_sq = multiply_add(by.rest2 * g, g, by.beta2 * exp_avg_sq);
}

ZCORE_EACH float update_of_element(const LambElement& by, float param, float exp_avg, float exp_avg_sq) {
    const float root = multiply_add(std::sqrt(exp_avg_sq), by.unbias2, by.eps);
    return multiply_add(by.decay, param, exp_avg * by.unbias1 / root);
}

ZCORE_EACH void apply_element(float step_size, float& param, float update) {
    param = multiply_add(-step_size, update, param);
}

}  // namespace zcore::ZCORE_ISA
