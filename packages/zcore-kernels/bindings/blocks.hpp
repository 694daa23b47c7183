#pragma once

#include <nanobind/nanobind.h>

void bind_blocks(nanobind::module_& module);
