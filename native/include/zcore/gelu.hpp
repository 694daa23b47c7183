// The two forms of GELU.    [arXiv 1606.08415, sec. 2]
//
//     erf:   x/2 (1 + erf(x / sqrt 2))
//     tanh:  x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
#pragma once

#include <cstdint>

namespace zcore {

enum class Gelu : std::uint8_t { erf, tanh };

}  // namespace zcore
