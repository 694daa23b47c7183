// topk_gate: of each token's logits the k best experts, and by how much each of these counts.    [arXiv 1701.06538]
//
//     scores    s = softmax(logits) or sigmoid(logits), in fp32
//     experts   the k largest logits, or with a bias the k largest s + bias [arXiv 2412.19437, eq. 16]; descending, of
//               equal ones the lower expert first, NaN above all numbers
//     weights   w = s of these experts, normalised w = s / (sum of the k + 1e-20)
//
// The softmax grows with its logit, so without a bias the choice needs no scores: rounding cannot change it. The bias
// enters the choice alone. Backward, with ds = dw, or (dw - sum(dw w)) / (sum of the k + 1e-20) where normalised:
//
//     softmax   dlogits = s (ds - sum(ds s)), ds = 0 for experts not chosen
//     sigmoid   dlogits = s (1 - s) ds
//
// Logits are read twice, from the cache; the results are 12 bytes a choice.
#pragma once

#include <cstddef>
#include <cstdint>

#include "zcore/flat.hpp"

namespace zcore {

enum class Scoring : std::uint8_t { softmax, sigmoid };

struct TopkGate {
    Flat logits;            // [tokens, num_experts]
    Flat bias;              // [num_experts], or none
    float* weights;         // [tokens, k], written
    std::int64_t* experts;  // [tokens, k], written
    std::size_t tokens;
    std::size_t num_experts;
    std::size_t k;  // from 1 to num_experts
    Scoring scoring;
    bool is_normalised;
};

struct TopkGateBackward {
    const float* dweights;        // [tokens, k]
    Flat logits;                  // [tokens, num_experts]
    const float* weights;         // [tokens, k], of the forward pass
    const std::int64_t* experts;  // [tokens, k], each from 0 to num_experts - 1: the caller sees to that
    Flat dlogits;                 // [tokens, num_experts], written
    std::size_t tokens;
    std::size_t num_experts;
    std::size_t k;
    Scoring scoring;
    bool is_normalised;
};

void topk_gate(const TopkGate& gate, int threads);
void topk_gate_backward(const TopkGateBackward& gate, int threads);

}  // namespace zcore
