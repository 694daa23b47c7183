// Adagrad for one element; the formula stands in zcore/adagrad_step.hpp. Rounded where torch's fused step rounds.
#pragma once

#include <cmath>

#include "elements/each.hpp"
#include "zcore/adagrad_step.hpp"

namespace zcore::ZCORE_ISA {

struct AdagradElement {
    float lr, eps, penalty, factor;
    bool is_penalised;  // by its penalty; else an infinite parameter would become NaN

    explicit AdagradElement(const Adagrad& hyper)
        : lr(rounded(hyper.lr)),
          eps(rounded(hyper.eps)),
          penalty(rounded(hyper.weight_decay)),
          factor(rounded(hyper.grad_factor)),
          is_penalised(penalty != 0.0f) {}
};

ZCORE_EACH void step_element(const AdagradElement& by, float& param, float grad, float& sum) {
    const float scaled = grad * by.factor;
    const float g = by.is_penalised ? multiply_add(by.penalty, param, scaled) : scaled;
    const float s = multiply_add(g, g, sum);
    sum = s;
    param = param - by.lr * g / (std::sqrt(s) + by.eps);
}

}  // namespace zcore::ZCORE_ISA
