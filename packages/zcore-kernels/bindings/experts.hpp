// Functions of mixtures of experts; bound into zcore.kernels._cpu beside those of cpu.cpp.
#pragma once

#include <nanobind/nanobind.h>

void bind_experts(nanobind::module_& module);
