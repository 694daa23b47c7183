#pragma once

#include <nanobind/nanobind.h>

void bind_grouped_matmul(nanobind::module_& module);
