// One function, compiled once for each instruction set into a namespace of its name: how it is declared and chosen.
#pragma once

#include "zcore/instruction_set.hpp"

#if defined(__x86_64__)
#define ZCORE_IN_EACH_SET(...)       \
    namespace baseline { __VA_ARGS__; } \
    namespace avx2 { __VA_ARGS__; }     \
    namespace avx512 { __VA_ARGS__; }
#define ZCORE_CHOOSE(name) ::zcore::choose(baseline::name, avx2::name, avx512::name)
#else
#define ZCORE_IN_EACH_SET(...) namespace baseline { __VA_ARGS__; }
#define ZCORE_CHOOSE(name) baseline::name
#endif
