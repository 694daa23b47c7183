#pragma once

#include <nanobind/nanobind.h>

void bind_cuda_steps(nanobind::module_& module);
