#include "zcore/sgd_step.hpp"

#if defined(ZCORE_ISA)  // compiled once for each instruction set

#include "cpu/blocks.hpp"
#include "elements/sgd.hpp"

namespace zcore::ZCORE_ISA {

static void step_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad, std::size_t count,
                       const Sgd& hyper) {
    const SgdElement by(hyper);
    for (std::size_t at = 0; at < count; ++at) {
        step_element(by, param[at], grad[at]);
    }
}

static void momentum_block(float* ZCORE_RESTRICT param, const float* ZCORE_RESTRICT grad,
                           float* ZCORE_RESTRICT momentum_buffer, std::size_t count, const Sgd& hyper) {
    const SgdElement by(hyper);
    for (std::size_t at = 0; at < count; ++at) {
        step_element(by, param[at], grad[at], momentum_buffer[at]);
    }
}

void sgd_part(const SgdPiece& piece, std::size_t begin, std::size_t end, const Sgd& hyper) {
    alignas(64) float params[block_numel], grads[block_numel], buffers[block_numel];
    for (std::size_t at = begin; at < end; at += block_numel) {
        const std::size_t count = block_at(at, end);
        float* const param = load_block(piece.param, at, count, params);
        const float* const grad = load_block(piece.grad, at, count, grads);
        if (piece.momentum_buffer) {
            float* const momentum_buffer = load_block(piece.momentum_buffer, at, count, buffers);
            momentum_block(param, grad, momentum_buffer, count, hyper);
            store_block(piece.momentum_buffer, at, count, momentum_buffer);
        } else {
            step_block(param, grad, count, hyper);
        }
        store_block(piece.param, at, count, param);
        store_block(piece.copy, at, count, param);
    }
}

}  // namespace zcore::ZCORE_ISA

#else

#include "cpu/each_set.hpp"
#include "cpu/pieces.hpp"

namespace zcore {

ZCORE_IN_EACH_SET(void sgd_part(const SgdPiece&, std::size_t, std::size_t, const Sgd&))

void sgd_step(std::span<const SgdPiece> pieces, const Sgd& hyper, int threads) {
    const auto step = ZCORE_CHOOSE(sgd_part);
    for_each_part(pieces, threads, [&](std::size_t index, std::size_t begin, std::size_t end) {
        step(pieces[index], begin, end, hyper);
    });
}

}  // namespace zcore

#endif
