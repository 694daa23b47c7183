// zcore.kernels._cpu: the functions of native/ for Python.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "blocks.hpp"
#include "experts.hpp"
#include "layers.hpp"
#include "steps.hpp"
#include "table.hpp"
#include "zcore/instruction_set.hpp"
#include "zcore/stream.hpp"

namespace {

using Arrays = std::vector<std::pair<std::uintptr_t, std::size_t>>;  // address, and how many words of 4 bytes

std::vector<zcore::Words> words_of(const Arrays& arrays) {
    std::vector<zcore::Words> words;
    for (const auto& [address, count] : arrays) {
        words.push_back({reinterpret_cast<float*>(address), count});
    }
    return words;
}

void stream(const Arrays& read, const Arrays& written, int threads) {
    zcore::stream(words_of(read), words_of(written), threads);
}

}  // namespace

NB_MODULE(_cpu, module) {
    nanobind::set_leak_warnings(false);  // torch's registry keeps ops, and what they hold, beyond the interpreter's end
    module.def("instruction_set", [] { return zcore::name_of(zcore::instruction_set()); });
    module.def("stream", &stream, nanobind::call_guard<nanobind::gil_scoped_release>(), nanobind::arg("read"),
               nanobind::arg("written"), nanobind::arg("threads"));
    bind_table(module);
    bind_steps(module);
    bind_blocks(module);
    bind_layers(module);
    bind_experts(module);
}
