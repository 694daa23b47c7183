// What is done to one element, said once for every instruction set of the CPU and for CUDA: each compiles it into a
// namespace of its name (ZCORE_ISA; `cuda` there), and all that multiply and add at once have the same bits.
//
// Loops, vectors and memory are the business of who includes it. Where it rounds is said, and not left to a compiler:
// steps are compiled without fusing products and sums (-ffp-contract=off, -fmad=false).
#pragma once

#if defined(__CUDACC__)
#define ZCORE_EACH_OF __host__ __device__ __forceinline__  // of a class
#define ZCORE_EACH static ZCORE_EACH_OF
#else
#define ZCORE_EACH_OF inline
#define ZCORE_EACH static inline
#endif

#if defined(__CUDA_ARCH__)
#define ZCORE_UNROLL _Pragma("unroll")
#else
#define ZCORE_UNROLL  // only so that arrays lie in registers
#endif

namespace zcore::ZCORE_ISA {

// A hyper-parameter, kept in double until 1 - beta and its like are computed: 1.0f - 0.999f is off by 5e-5.
ZCORE_EACH float rounded(double value) { return static_cast<float>(value); }

// a b + c, rounded once where the instruction set can. Said where torch's fused steps do it, and nowhere left to the
// compiler, so that a step has torch's bits on such machines.
ZCORE_EACH float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
    return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

}  // namespace zcore::ZCORE_ISA
