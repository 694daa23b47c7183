// What these products want of their operands and of the device, said where it is not so, before anything is launched.
// Knows no CUDA: it is tested on the CPU.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "zcore/flat.hpp"

namespace zcore::grouped {

struct Lengths {
    std::int64_t total, num_groups, num_in, num_out;
};

// The widest load and store moves 16 bytes: `in_multiple` elements of rows, 8 of bf16 or fp16 that are written.
inline void require_sides(const char* op, const Lengths& lengths, std::int64_t in_multiple) {
    const std::string name = op;
    if (lengths.num_in % in_multiple != 0 || lengths.num_out % 8 != 0) {
        throw std::invalid_argument(name + ": the sides of the weights are " + std::to_string(lengths.num_in) +
                                    " (in) and " + std::to_string(lengths.num_out) + " (out); expected multiples of " +
                                    std::to_string(in_multiple) + " and 8. Pad them with zeros.");
    }
    for (const std::int64_t each : {lengths.total, lengths.num_groups, lengths.num_in, lengths.num_out}) {
        if (each < 0 || each > std::numeric_limits<std::int32_t>::max()) {
            throw std::invalid_argument(name + ": a side is " + std::to_string(each) + "; expected 0 to 2^31 - 1.");
        }
    }
}

inline void require_type(const char* op, Type type) {
    if (type != Type::bf16 && type != Type::f16) {
        throw std::invalid_argument(std::string(op) + ": operands are of a type that tensor cores do not take here; "
                                                      "expected bf16 or fp16. Convert them.");
    }
}

// 80 is sm_80.
inline void require_device(const char* op, int capability) {
    if (capability < 80) {
        throw std::invalid_argument(std::string(op) + ": this device is sm_" + std::to_string(capability) +
                                    "; expected sm_80 or later, whose tensor cores take bf16.");
    }
}

inline void require_fp8_device(const char* op, int capability) {
    if (capability != 90) {
        throw std::invalid_argument(std::string(op) + ": this device is sm_" + std::to_string(capability) +
                                    "; expected sm_90, for which its kernel is written. Multiply in bf16 here.");
    }
}

}  // namespace zcore::grouped
