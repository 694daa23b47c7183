// What kernels for NVIDIA GPUs are launched on, and what a launch that fails throws. No header of CUDA is needed here.
//
// Addresses are of memory of the current device, or of what it can reach. A launch returns at once: what the addresses
// name has to live until the stream has come to the kernel's end.
#pragma once

#include <stdexcept>
#include <string>

struct CUstream_st;

namespace zcore::cuda {

using Stream = CUstream_st*;  // cudaStream_t

class LaunchError : public std::runtime_error {
public:
    LaunchError(const std::string& op, const std::string& reason)
        : std::runtime_error(op + ": its CUDA kernel could not be launched: " + reason + ". An error of an earlier "
                             "kernel may show here, too; CUDA_LAUNCH_BLOCKING=1 finds which.") {}
};

// What the kernels of this library were compiled for: "sm_80 sm_90 sm_100 compute_100", the last as PTX for later ones.
const char* architectures();

// Why no kernel of this library can be launched on the current device, in CUDA's words; null if one can. A driver may
// be too old, or the device none of those above. It looks for a kernel, and so makes the device's context.
const char* why_unusable();

}  // namespace zcore::cuda
