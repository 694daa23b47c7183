// The steps of optimizers as lane.hpp wants them: operands, and the arithmetic of elements/. What the host cannot know
// without waiting for the device is read there: a factor of the gradient, a ratio of norms.
#pragma once

#include <cstdint>

#include "cuda/pieces.hpp"
#include "elements/adagrad.hpp"
#include "elements/adamw.hpp"
#include "elements/lamb.hpp"
#include "elements/lion.hpp"
#include "elements/sgd.hpp"
#include "zcore/squared_norm.hpp"

namespace zcore::ZCORE_ISA {

static inline StepPiece operands_of(const AdamWPiece& piece) {
    return {piece.param, piece.grad, {piece.exp_avg, piece.exp_avg_sq}, piece.copy, piece.numel};
}
static inline StepPiece operands_of(const AdagradPiece& piece) {
    return {piece.param, piece.grad, {piece.sum}, piece.copy, piece.numel};
}
static inline StepPiece operands_of(const LionPiece& piece) {
    return {piece.param, piece.grad, {piece.exp_avg}, piece.copy, piece.numel};
}
static inline StepPiece operands_of(const SgdPiece& piece) {
    return {piece.param, piece.grad, {piece.momentum_buffer}, piece.copy, piece.numel};
}
static inline StepPiece operands_of(const LambPiece& piece) {
    return {piece.param, piece.grad, {piece.exp_avg, piece.exp_avg_sq}, piece.copy, piece.numel};
}
static inline StepPiece operands_of(const NormPiece& piece) { return {piece.values, {}, {}, {}, piece.numel}; }

// What gradients are multiplied by: a number, times one on the device where there is one.
struct GradFactor {
    double number;
    const float* on_device;

    ZCORE_EACH_OF float value() const {
        return rounded(on_device == nullptr ? number : number * static_cast<double>(*on_device));
    }
};

// Of a step that is all in `step_element`.
template <typename Element, int states>
struct PlainStep {
    static constexpr int num_states = states, num_sums = 0;
    static constexpr bool has_grad = true, writes_param = true, writes_states = true;

    Element by;
    GradFactor factor;

    ZCORE_EACH_OF void begin(std::uint32_t) { by.factor = factor.value(); }
    ZCORE_EACH_OF void element(float& param, float grad, float* of, double*) const {
        if constexpr (states == 2) {
            step_element(by, param, grad, of[0], of[1]);
        } else if constexpr (states == 1) {
            step_element(by, param, grad, of[0]);
        } else {
            step_element(by, param, grad);
        }
    }
};

struct LambAverageStep {
    static constexpr int num_states = 2, num_sums = 2;
    static constexpr bool has_grad = true, writes_param = false, writes_states = true;

    LambElement by;
    GradFactor factor;

    ZCORE_EACH_OF void begin(std::uint32_t) { by.factor = factor.value(); }
    ZCORE_EACH_OF void element(float& param, float grad, float* of, double* sums) const {
        average_element(by, grad, of[0], of[1]);
        const double p = param, u = update_of_element(by, param, of[0], of[1]);
        sums[0] += p * p;
        sums[1] += u * u;
    }
};

struct LambApplyStep {
    static constexpr int num_states = 2, num_sums = 0;
    static constexpr bool has_grad = false, writes_param = true, writes_states = false;

    LambElement by;
    double lr;
    const double* ratios;  // of the pieces of this launch, on the device
    float step_size;

    ZCORE_EACH_OF void begin(std::uint32_t piece) { step_size = rounded(lr * ratios[piece]); }
    ZCORE_EACH_OF void element(float& param, float, float* of, double*) const {
        apply_element(step_size, param, update_of_element(by, param, of[0], of[1]));
    }
};

struct SquaredNormStep {
    static constexpr int num_states = 0, num_sums = 1;
    static constexpr bool has_grad = false, writes_param = false, writes_states = false;

    ZCORE_EACH_OF void begin(std::uint32_t) {}
    ZCORE_EACH_OF void element(float& value, float, float*, double* sums) const {
        const double wide = value;
        sums[0] += wide * wide;
    }
};

}  // namespace zcore::ZCORE_ISA
