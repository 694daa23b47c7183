// After a launch: whether it was one.
#pragma once

namespace zcore::cuda {

// Throws LaunchError if the launch just made was refused. It waits for nothing, so what goes wrong inside a kernel is
// not known yet.
void check_launch(const char* op);

}  // namespace zcore::cuda
