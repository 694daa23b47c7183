// One lane's share of one tile of a step: read, stepped, and written; in between what the lanes of a warp have to agree
// on, the scales of codes. See tiles.hpp for which elements those are.
//
// A step says what it is by constants, and steps one element:
//
//     num_states, has_grad, writes_param, writes_states        of its operands
//     num_sums                                                 of squares, in double, which it adds to
//     begin(piece)                                             before the elements of a piece
//     element(param, grad, states, sums)
#pragma once

#include "cuda/pieces.hpp"
#include "cuda/tiles.hpp"

namespace zcore::ZCORE_ISA {

template <typename Step>
constexpr int at_least_one = Step::num_states == 0 ? 1 : Step::num_states;  // as there are no arrays of none

// Of a launch, and of the one that adds sums: with one pointer more they are within the limit.
template <typename Step>
struct Arguments {
    static constexpr std::uint32_t capacity = capacity_beside<Step::num_states>(sizeof(Step) + 2 * sizeof(double*));

    Pieces<Step::num_states, capacity> pieces;
    Step step;
    double* sums;  // of each chunk
};

template <typename Step>
struct LaneTile {
    static constexpr int num_states = Step::num_states, room = at_least_one<Step>;

    Words param_words[num_vectors], grad_words[num_vectors], state_words[room][num_vectors];
    float param[num_vectors][vector_numel], states[room][num_vectors][vector_numel];
    float scales[room];

    // Nothing waits for what is read here.
    template <typename Pieces>
    ZCORE_EACH_OF void load(const Pieces& pieces, std::uint32_t piece, std::size_t tile, unsigned lane) {
        ZCORE_UNROLL
        for (unsigned vector = 0; vector < num_vectors; ++vector) {
            const Place place = place_of(tile, vector, lane, pieces.numel[piece]);
            param_words[vector] = load_words(pieces.param(piece), place);
            if constexpr (Step::has_grad) {
                grad_words[vector] = load_words(pieces.grad(piece), place);
            }
            ZCORE_UNROLL
            for (int each = 0; each < num_states; ++each) {
                state_words[each][vector] = load_words(pieces.state(each, piece), place);
            }
        }
        ZCORE_UNROLL
        for (int each = 0; each < num_states; ++each) {
            const Flat state = pieces.state(each, piece);
            scales[each] = is_of_codes(state.type) ? state.scales[tile] : 0.0f;
        }
    }

    template <typename Pieces>
    ZCORE_EACH_OF void step(const Step& by, const Pieces& pieces, std::uint32_t piece, std::size_t tile, unsigned lane,
                            const DynamicTables* tables, double* sums) {
        ZCORE_UNROLL
        for (unsigned vector = 0; vector < num_vectors; ++vector) {
            float grad[vector_numel] = {};
            decode_floats(param_words[vector], pieces.param(piece).type, param[vector]);
            if constexpr (Step::has_grad) {
                decode_floats(grad_words[vector], pieces.grad(piece).type, grad);
            }
            ZCORE_UNROLL
            for (int each = 0; each < num_states; ++each) {
                decode(state_words[each][vector], pieces.state(each, piece).type, scales[each], tables[each],
                       states[each][vector]);
            }
            const unsigned count = place_of(tile, vector, lane, pieces.numel[piece]).count;
            ZCORE_UNROLL
            for (unsigned at = 0; at < vector_numel; ++at) {
                if (at < count) {
                    float of_element[room] = {};
                    ZCORE_UNROLL
                    for (int each = 0; each < num_states; ++each) {
                        of_element[each] = states[each][vector][at];
                    }
                    by.element(param[vector][at], grad[at], of_element, sums);
                    ZCORE_UNROLL
                    for (int each = 0; each < num_states; ++each) {
                        states[each][vector][at] = of_element[each];
                    }
                } else {
                    ZCORE_UNROLL
                    for (int each = 0; each < num_states; ++each) {
                        states[each][vector][at] = 0.0f;  // what a code of 0 stands for would count for the scale
                    }
                }
            }
        }
    }

    // The largest magnitude of a state in this lane, as bits.
    ZCORE_EACH_OF std::uint32_t largest(int which) const {
        std::uint32_t found = 0;
        ZCORE_UNROLL
        for (unsigned vector = 0; vector < num_vectors; ++vector) {
            ZCORE_UNROLL
            for (unsigned at = 0; at < vector_numel; ++at) {
                const std::uint32_t bits = bits_of_float(states[which][vector][at]) & 0x7fffffffu;
                found = bits > found ? bits : found;
            }
        }
        return found;
    }

    // of_tile: of each state of codes the largest that any lane has.
    template <typename Pieces>
    ZCORE_EACH_OF void store(const Pieces& pieces, std::uint32_t piece, std::size_t tile, unsigned lane,
                             const DynamicTables* tables, const std::uint32_t* of_tile) const {
        ZCORE_UNROLL
        for (unsigned vector = 0; vector < num_vectors; ++vector) {
            const Place place = place_of(tile, vector, lane, pieces.numel[piece]);
            if constexpr (Step::writes_states) {
                ZCORE_UNROLL
                for (int each = 0; each < num_states; ++each) {
                    const Flat state = pieces.state(each, piece);
                    store_words(state, place,
                                encode(states[each][vector], state.type, scale_of(of_tile[each]), tables[each]));
                }
            }
            if constexpr (Step::writes_param) {
                const Flat to = pieces.param(piece), copy = pieces.copy(piece);
                store_words(to, place, encode_floats(param[vector], to.type));
                if (copy.data != nullptr) {
                    store_words(copy, place, encode_floats(param[vector], copy.type));
                }
            }
        }
        if constexpr (Step::writes_states) {
            ZCORE_UNROLL
            for (int each = 0; each < num_states; ++each) {
                const Flat state = pieces.state(each, piece);
                if (lane == 0 && is_of_codes(state.type)) {
                    state.scales[tile] = scale_of(of_tile[each]);
                }
            }
        }
    }
};

}  // namespace zcore::ZCORE_ISA
