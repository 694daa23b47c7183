// zcore.kernels._cpu: the functions of native/ for Python.
#include "blocks.hpp"
#include "layers.hpp"
#include "steps.hpp"
#include "table.hpp"
#include "zcore/instruction_set.hpp"

NB_MODULE(_cpu, module) {
    nanobind::set_leak_warnings(false);  // torch's registry keeps ops, and what they hold, beyond the interpreter's end
    module.def("instruction_set", [] { return zcore::name_of(zcore::instruction_set()); });
    bind_table(module);
    bind_steps(module);
    bind_blocks(module);
    bind_layers(module);
}
