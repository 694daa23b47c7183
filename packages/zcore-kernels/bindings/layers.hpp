// Functions of layers, which take and return whole tensors; bound into zcore.kernels._cpu beside those of cpu.cpp.
#pragma once

#include <nanobind/nanobind.h>

void bind_layers(nanobind::module_& module);
