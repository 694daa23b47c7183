#include "zcore/instruction_set.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace zcore {

namespace {

InstructionSet largest_here() {
#if defined(__x86_64__)
    // A virtual machine may offer some of AVX-512 and not the rest; what is compiled uses these four.
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        return InstructionSet::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        return InstructionSet::avx2;
    }
#endif
    return InstructionSet::baseline;
}

InstructionSet find() {
    const InstructionSet largest = largest_here();
    const char* asked = std::getenv("ZCORE_ISA");
    if (asked == nullptr) {
        return largest;
    }
    for (const InstructionSet set : {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512}) {
        if (std::string_view(asked) == name_of(set) && set <= largest) {
            return set;
        }
    }
    throw std::invalid_argument(std::string("ZCORE_ISA is ") + asked + "; this machine has baseline to " +
                                name_of(largest) + ". Unset it, or name one of these.");
}

}  // namespace

InstructionSet instruction_set() {
    static const InstructionSet found = find();
    return found;
}

const char* name_of(InstructionSet set) {
    switch (set) {
        case InstructionSet::avx512: return "avx512";
        case InstructionSet::avx2: return "avx2";
        default: return "baseline";
    }
}

}  // namespace zcore
