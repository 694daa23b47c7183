// AdamW and Adam for one element; the formula stands in zcore/adamw_step.hpp. Rounded where torch's fused step rounds.
#pragma once

#include <cmath>

#include "elements/each.hpp"
#include "zcore/adamw_step.hpp"

namespace zcore::ZCORE_ISA {

struct AdamWElement {
    float decay, penalty, factor, beta2, rest1, rest2, step_size, bias, eps;
    bool is_penalised;  // by its penalty; else an infinite parameter would become NaN

    explicit AdamWElement(const AdamW& hyper)
        : decay(hyper.is_decoupled ? rounded(1.0 - hyper.lr * hyper.weight_decay) : 1.0f),
          penalty(rounded(hyper.weight_decay)),
          factor(rounded(hyper.grad_factor)),
          beta2(rounded(hyper.beta2)),
          rest1(rounded(1.0 - hyper.beta1)),
          rest2(rounded(1.0 - hyper.beta2)),
          step_size(rounded(hyper.lr / hyper.bias_correction1)),
          bias(rounded(hyper.bias_correction2_sqrt)),
          eps(rounded(hyper.eps)),
          is_penalised(!hyper.is_decoupled && penalty != 0.0f) {}
};

ZCORE_EACH void step_element(const AdamWElement& by, float& param, float grad, float& exp_avg, float& exp_avg_sq) {
    const float p = param * by.decay, scaled = grad * by.factor;
    const float g = by.is_penalised ? multiply_add(by.penalty, p, scaled) : scaled;
    const float m = multiply_add(by.rest1, g - exp_avg, exp_avg);
    const float v = multiply_add(by.rest2 * g, g, by.beta2 * exp_avg_sq);
    exp_avg = m;
    exp_avg_sq = v;
    param = p - by.step_size * m / (std::sqrt(v) / by.bias + by.eps);
}

}  // namespace zcore::ZCORE_ISA
