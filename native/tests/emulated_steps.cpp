// Compiled with FMA, as a GPU has it; so it uses no template of the standard library, which another file may hold
// without (cpu/CMakeLists.txt says more).
#include "tests/emulated_steps.hpp"

#include "cuda/lane.hpp"
#include "cuda/steps.hpp"

namespace zcore::emulated {

template <typename Step>
static void run_chunk(const Arguments<Step>& arguments, std::uint32_t chunk, double* sums) {
    const auto& pieces = arguments.pieces;
    const Part part = pieces.part_of(chunk);
    DynamicTables tables[at_least_one<Step>];
    for (int each = 0; each < Step::num_states; ++each) {
        for (int code = 0; code < num_codes; ++code) {
            fill_entry(tables[each], code, pieces.state(each, part.piece).type == Type::signed_code);
        }
    }
    Step step = arguments.step;
    step.begin(part.piece);
    for (std::size_t tile = part.begin; tile < part.end; ++tile) {
        LaneTile<Step> shares[lanes];
        for (unsigned lane = 0; lane < lanes; ++lane) {
            shares[lane].load(pieces, part.piece, tile, lane);
        }
        std::uint32_t largest[at_least_one<Step>] = {};
        for (unsigned lane = 0; lane < lanes; ++lane) {
            shares[lane].step(step, pieces, part.piece, tile, lane, tables, sums);
            for (int each = 0; each < Step::num_states; ++each) {
                const std::uint32_t own = shares[lane].largest(each);
                largest[each] = own > largest[each] ? own : largest[each];
            }
        }
        for (unsigned lane = 0; lane < lanes; ++lane) {
            shares[lane].store(pieces, part.piece, tile, lane, tables, largest);
        }
    }
}

// add(piece, sums) takes the sums of each chunk of a piece.
template <typename Step, typename Piece, typename Before, typename Add>
static void run(const Piece* pieces, std::size_t count, const Step& step, Before before, Add add) {
    for (std::size_t first = 0; first < count; first += Arguments<Step>::capacity) {
        Arguments<Step> arguments{{}, step, nullptr};
        for (std::size_t index = first; index < count && index < first + Arguments<Step>::capacity; ++index) {
            arguments.pieces.add(operands_of(pieces[index]));
        }
        before(arguments, first);
        for (std::uint32_t chunk = 0; chunk < arguments.pieces.first_chunk[arguments.pieces.count]; ++chunk) {
            double sums[2] = {};
            run_chunk(arguments, chunk, sums);
            add(first + arguments.pieces.part_of(chunk).piece, sums);
        }
    }
}

template <typename Step, typename Piece>
static void run(const Piece* pieces, std::size_t count, const Step& step) {
    run(pieces, count, step, [](Arguments<Step>&, std::size_t) {}, [](std::size_t, const double*) {});
}

void adamw_step(const AdamWPiece* pieces, std::size_t count, const AdamW& hyper, const float* grad_factor) {
    run(pieces, count, PlainStep<AdamWElement, 2>{AdamWElement(hyper), {hyper.grad_factor, grad_factor}});
}

void adagrad_step(const AdagradPiece* pieces, std::size_t count, const Adagrad& hyper, const float* grad_factor) {
    run(pieces, count,
        PlainStep<AdagradElement, 1>{AdagradElement(hyper), {hyper.grad_factor, grad_factor}});
}

void lion_step(const LionPiece* pieces, std::size_t count, const Lion& hyper, const float* grad_factor) {
    run(pieces, count, PlainStep<LionElement, 1>{LionElement(hyper), {hyper.grad_factor, grad_factor}});
}

void sgd_step(const SgdPiece* pieces, std::size_t count, const Sgd& hyper, const float* grad_factor) {
    run(pieces, count, PlainStep<SgdElement, 1>{SgdElement(hyper), {hyper.grad_factor, grad_factor}});
}

void sgd_step_without_momentum(const SgdPiece* pieces, std::size_t count, const Sgd& hyper, const float* grad_factor) {
    run(pieces, count, PlainStep<SgdElement, 0>{SgdElement(hyper), {hyper.grad_factor, grad_factor}});
}

void lamb_average(const LambPiece* pieces, std::size_t count, const Lamb& hyper, const float* grad_factor,
                  LambSquares* squares) {
    const LambAverageStep step{LambElement(hyper), {hyper.grad_factor, grad_factor}};
    run(pieces, count, step, [](Arguments<LambAverageStep>&, std::size_t) {},
        [&](std::size_t piece, const double* sums) {
            squares[piece].param += sums[0];
            squares[piece].update += sums[1];
        });
}

void lamb_apply(const LambPiece* pieces, std::size_t count, const double* ratios, const Lamb& hyper) {
    const LambApplyStep step{LambElement(hyper), hyper.lr, nullptr, 0.0f};
    run(pieces, count, step,
        [&](Arguments<LambApplyStep>& arguments, std::size_t first) { arguments.step.ratios = ratios + first; },
        [](std::size_t, const double*) {});
}

double squared_norm(const NormPiece& piece) {
    double total = 0.0;
    run(&piece, 1, SquaredNormStep{}, [](Arguments<SquaredNormStep>&, std::size_t) {},
        [&](std::size_t, const double* sums) { total += sums[0]; });
    return total;
}

std::size_t adamw_capacity() { return Arguments<PlainStep<AdamWElement, 2>>::capacity; }

static float all_bounds[2][num_codes];

int code_of(float relative, bool is_signed) {
    float* const bounds = all_bounds[is_signed];
    if (bounds[num_codes - 1] == 0.0f) {
        for (int code = 0; code < num_codes; ++code) {
            bounds[code] = dynamic_bound(code, is_signed);
        }
    }
    return static_cast<int>(dynamic_code_between(relative, is_signed, bounds));
}

int guess_off_by(float relative, bool is_signed) {
    const int off = guess_dynamic_code(relative, is_signed) - code_of(relative, is_signed);
    return off < 0 ? -off : off;
}

float value_of(int code, bool is_signed) { return dynamic_value(code, is_signed); }
float bound_of(int code, bool is_signed) { return dynamic_bound(code, is_signed); }

}  // namespace zcore::emulated
