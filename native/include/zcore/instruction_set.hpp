// Which instructions this machine has, asked once. ZCORE_ISA=baseline|avx2|avx512 forces a smaller set, as tests do.
#pragma once

namespace zcore {

enum class InstructionSet { baseline, avx2, avx512 };

InstructionSet instruction_set();
const char* name_of(InstructionSet set);

// Of one function in each set the one to call. Sets that this build lacks fall back to the baseline.
template <typename Function>
Function choose(Function baseline, Function avx2, Function avx512) {
    switch (instruction_set()) {
        case InstructionSet::avx512: return avx512;
        case InstructionSet::avx2: return avx2;
        default: return baseline;
    }
}

}  // namespace zcore
