#include "zcore/topk_gate.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/functions.hpp"
#include "cpu/rows.hpp"

namespace zcore::ZCORE_ISA {

constexpr float smallest_total = 1e-20f;  // added to a total of scores, which may all be 0

// What makes scores of a row of logits.
struct Scores {
    Scoring scoring;
    float largest = 0.0f, sum = 1.0f;  // of softmax: the largest logit, and the sum of exp(logit - largest)

    inline float of(float logit) const {
        return scoring == Scoring::sigmoid ? sigmoid_of(logit) : exp_of(logit - largest) / sum;
    }

    inline void of_block(const float* ZCORE_RESTRICT logits, float* ZCORE_RESTRICT out, std::size_t count) const {
        if (scoring == Scoring::sigmoid) {
            for (std::size_t at = 0; at < count; ++at) {
                out[at] = sigmoid_of(logits[at]);
            }
            return;
        }
        for (std::size_t at = 0; at < count; ++at) {
            out[at] = exp_of(logits[at] - largest) / sum;
        }
    }
};

// NaN is passed over here, and makes the sum NaN.
static inline float largest_of(Flat logits, std::size_t row, std::size_t num_experts, float* buffer) {
    constexpr std::size_t lanes = 16;
    float largest[lanes];
    for (float& each : largest) {
        each = float_of_bits(0xff800000u);  // -inf
    }
    for (std::size_t at = 0; at < num_experts; at += block_numel) {
        const std::size_t count = block_at(at, num_experts), whole = count - count % lanes;
        const float* const x = load_block(logits, row + at, count, buffer);
        for (std::size_t from = 0; from < whole; from += lanes) {
            for (std::size_t lane = 0; lane < lanes; ++lane) {
                largest[lane] = x[from + lane] > largest[lane] ? x[from + lane] : largest[lane];
            }
        }
        for (std::size_t each = whole; each < count; ++each) {
            largest[0] = x[each] > largest[0] ? x[each] : largest[0];
        }
    }
    for (std::size_t lane = 1; lane < lanes; ++lane) {
        largest[0] = largest[lane] > largest[0] ? largest[lane] : largest[0];
    }
    return largest[0];
}

static inline Scores scores_of(Scoring scoring, Flat logits, std::size_t row, std::size_t num_experts) {
    Scores scores{scoring};
    if (scoring == Scoring::sigmoid) {
        return scores;
    }
    alignas(64) float buffer[block_numel], powers[block_numel];
    const float largest = largest_of(logits, row, num_experts, buffer);
    RowSum sum;
    for (std::size_t at = 0; at < num_experts; at += block_numel) {
        const std::size_t count = block_at(at, num_experts);
        const float* ZCORE_RESTRICT x = load_block(logits, row + at, count, buffer);
        for (std::size_t each = 0; each < count; ++each) {
            powers[each] = exp_of(x[each] - largest);
        }
        sum.add(count, [&powers](auto get) { return get(powers); });
    }
    scores.largest = largest;
    scores.sum = sum.total();
    return scores;
}

static inline float score_at(const Scores& scores, Flat logits, std::size_t row, std::int64_t expert) {
    float buffer[block_numel];
    return scores.of(*load_block(logits, row + static_cast<std::size_t>(expert), 1, buffer));
}

// As torch.topk orders.
static inline bool precedes(float one, float other) { return one > other || (one != one && other == other); }

// The best so far, in order; their values lie where their weights will.
class Best {
public:
    Best(float* values, std::int64_t* experts, std::size_t k) : values_(values), experts_(experts), k_(k) {}

    // Takes in the values of `count` experts from `first` on; these come after those already seen.
    inline void add(const float* values, std::size_t count, std::size_t first) {
        for (std::size_t at = 0; at < count; ++at) {
            const float value = values[at];
            if (found_ == k_ && !precedes(value, values_[k_ - 1])) {
                continue;
            }
            std::size_t place = found_ < k_ ? found_++ : k_ - 1;
            for (; place > 0 && precedes(value, values_[place - 1]); --place) {
                values_[place] = values_[place - 1];
                experts_[place] = experts_[place - 1];
            }
            values_[place] = value;
            experts_[place] = static_cast<std::int64_t>(first + at);
        }
    }

private:
    float* values_;
    std::int64_t* experts_;
    std::size_t k_, found_ = 0;
};

void topk_gate_part(const TopkGate& gate, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel], third[block_numel];
    for (std::size_t token = begin; token < end; ++token) {
        const std::size_t row = token * gate.num_experts;
        float* const weights = gate.weights + token * gate.k;
        std::int64_t* const experts = gate.experts + token * gate.k;
        const Scores scores = scores_of(gate.scoring, gate.logits, row, gate.num_experts);
        Best best(weights, experts, gate.k);
        for (std::size_t at = 0; at < gate.num_experts; at += block_numel) {
            const std::size_t count = block_at(at, gate.num_experts);
            const float* const x = load_block(gate.logits, row + at, count, first);
            if (!gate.bias) {
                best.add(x, count, at);
                continue;
            }
            const float* ZCORE_RESTRICT bias = load_block(gate.bias, at, count, second);
            scores.of_block(x, third, count);
            for (std::size_t each = 0; each < count; ++each) {
                third[each] += bias[each];
            }
            best.add(third, count, at);
        }
        float total = smallest_total;
        for (std::size_t each = 0; each < gate.k; ++each) {
            weights[each] = score_at(scores, gate.logits, row, experts[each]);
            total += weights[each];
        }
        for (std::size_t each = 0; gate.is_normalised && each < gate.k; ++each) {
            weights[each] /= total;
        }
    }
}

void topk_gate_backward_part(const TopkGateBackward& gate, std::size_t begin, std::size_t end) {
    alignas(64) float first[block_numel], second[block_numel];
    for (std::size_t token = begin; token < end; ++token) {
        const std::size_t row = token * gate.num_experts;
        const float* const dweights = gate.dweights + token * gate.k;
        const float* const weights = gate.weights + token * gate.k;
        const std::int64_t* const experts = gate.experts + token * gate.k;
        const Scores scores = scores_of(gate.scoring, gate.logits, row, gate.num_experts);
        auto score = [&](std::size_t each) { return score_at(scores, gate.logits, row, experts[each]); };
        float total = 1.0f, shared = 0.0f;  // ds = (dw - shared) / total
        if (gate.is_normalised) {
            total = smallest_total;
            for (std::size_t each = 0; each < gate.k; ++each) {
                total += score(each);
                shared += dweights[each] * weights[each];
            }
        }
        float along = 0.0f;  // of softmax: sum(ds s)
        for (std::size_t each = 0; gate.scoring == Scoring::softmax && each < gate.k; ++each) {
            along += (dweights[each] - shared) / total * score(each);
        }
        for (std::size_t at = 0; at < gate.num_experts; at += block_numel) {
            const std::size_t count = block_at(at, gate.num_experts);
            if (gate.scoring == Scoring::softmax) {
                scores.of_block(load_block(gate.logits, row + at, count, first), second, count);
            }
            for (std::size_t each = 0; each < count; ++each) {
                second[each] = gate.scoring == Scoring::softmax ? -along * second[each] : 0.0f;
            }
            store_block(gate.dlogits, row + at, count, second);
        }
        for (std::size_t each = 0; each < gate.k; ++each) {
            const float s = score(each), ds = (dweights[each] - shared) / total;
            const float dlogit = gate.scoring == Scoring::softmax ? s * (ds - along) : s * (1.0f - s) * ds;
            store_block(gate.dlogits, row + static_cast<std::size_t>(experts[each]), 1, &dlogit);
        }
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/column_sums.hpp"
#include "cpu/each_set.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void topk_gate_part(const TopkGate&, std::size_t, std::size_t);
                  void topk_gate_backward_part(const TopkGateBackward&, std::size_t, std::size_t))

void topk_gate(const TopkGate& gate, int threads) {
    const auto part = ZCORE_CHOOSE(topk_gate_part);
    parallel_for(gate.tokens, row_grain(gate.num_experts), threads,
                 [&](std::size_t begin, std::size_t end) { part(gate, begin, end); });
}

void topk_gate_backward(const TopkGateBackward& gate, int threads) {
    const auto part = ZCORE_CHOOSE(topk_gate_backward_part);
    parallel_for(gate.tokens, row_grain(gate.num_experts), threads,
                 [&](std::size_t begin, std::size_t end) { part(gate, begin, end); });
}

}  // namespace zcore

#endif
