#pragma once

#include <nanobind/nanobind.h>

void bind_cuda_blocks(nanobind::module_& module);
