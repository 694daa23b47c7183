// AdamW over one flat shard with states of each type, beside moving the same bytes (stream.hpp), in turns.
//
//   build/native/bench/zcore_steps_bench          arguments: elements, threads
//
// Counters are of rounds, a step and a stream each: `of_stream` is the median of stream's time over the step's, between
// its quartiles `low` and `high`. More is better; an op that memory bounds comes to 1.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <random>
#include <vector>

#include "zcore/adamw_step.hpp"
#include "zcore/stream.hpp"

namespace {

constexpr zcore::AdamW hyper{1e-6, 0.9, 0.999, 1e-8, 0.1, 0.5, 0.5, 1.0, true};

// Memory for `numel` elements of a type, as words.
struct State {
    zcore::Type type;
    std::vector<float> words, scales;

    State(std::size_t numel, zcore::Type of)
        : type(of), words(numel * bytes_of(of) / sizeof(float) + 1), scales(numel / zcore::code_block_numel + 1) {}

    static std::size_t bytes_of(zcore::Type type) {
        return type == zcore::Type::f32 ? 4 : type == zcore::Type::bf16 ? 2 : 1;
    }
    zcore::Flat flat() { return {words.data(), type, scales.data()}; }
    zcore::Words all() { return {words.data(), words.size()}; }
};

double seconds(auto&& work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void adamw(benchmark::State& state, zcore::Type first, zcore::Type second) {
    const auto numel = static_cast<std::size_t>(state.range(0));
    const int threads = static_cast<int>(state.range(1));
    State param(numel, zcore::Type::f32), grad = param, exp_avg(numel, first), exp_avg_sq(numel, second);
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (std::size_t at = 0; at < numel; ++at) {
        param.words[at] = normal(random), grad.words[at] = normal(random);
    }
    State moved[] = {param, exp_avg, exp_avg_sq};  // what streams write
    const zcore::AdamWPiece piece{param.flat(), grad.flat(), exp_avg.flat(), exp_avg_sq.flat(), {}, numel};
    const zcore::Words written[] = {moved[0].all(), moved[1].all(), moved[2].all()};
    const zcore::Words read[] = {written[0], grad.all(), written[1], written[2]};
    std::vector<double> ratios;
    for (auto _ : state) {
        const double step = seconds([&] { zcore::adamw_step({&piece, 1}, hyper, threads); });
        ratios.push_back(seconds([&] { zcore::stream(read, written, threads); }) / step);
        state.SetIterationTime(step);
    }
    std::sort(ratios.begin(), ratios.end());
    state.counters["of_stream"] = ratios[ratios.size() / 2];
    state.counters["low"] = ratios[ratios.size() / 4];
    state.counters["high"] = ratios[ratios.size() * 3 / 4];
}

void shapes(benchmark::internal::Benchmark* each) {
    each->Args({10'000'000, 1})->Args({10'000'000, 2})->Args({100'000'000, 1})->UseManualTime();
    each->Iterations(21)->Unit(benchmark::kMillisecond);
}

BENCHMARK_CAPTURE(adamw, fp32, zcore::Type::f32, zcore::Type::f32)->Apply(shapes);
BENCHMARK_CAPTURE(adamw, bf16, zcore::Type::bf16, zcore::Type::bf16)->Apply(shapes);
BENCHMARK_CAPTURE(adamw, 8bit, zcore::Type::signed_code, zcore::Type::unsigned_code)->Apply(shapes);

}  // namespace
