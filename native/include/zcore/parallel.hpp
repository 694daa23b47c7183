// Run one function over pieces of a range on several threads; the caller is one of them.
//
// Where a range is cut depends on its length and `grain` alone, never on the number of threads: sums that are made piece
// by piece and added in order are the same on one thread and on many.
#pragma once

#include <cstddef>
#include <type_traits>

namespace zcore {

namespace detail {
using Piece = void (*)(void* context, std::size_t begin, std::size_t end);
void run_in_parallel(std::size_t count, std::size_t grain, int threads, Piece piece, void* context);
}  // namespace detail

// Calls function(begin, end) for [0, grain), [grain, 2 grain) ... up to `count`. It must not throw.
template <typename Function>
void parallel_for(std::size_t count, std::size_t grain, int threads, Function&& function) {
    auto piece = [](void* context, std::size_t begin, std::size_t end) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(begin, end);
    };
    detail::run_in_parallel(count, grain, threads, piece, &function);
}

}  // namespace zcore
