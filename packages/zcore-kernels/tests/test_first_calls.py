"""Layers as the first thing that a process does with ops: no look-up has imported what others would have brought.

One process imports torch and the layers; each call is made in a fork of it, by way of the registry and by the op's name
as in a graph of torch.compile.
"""

import json
import subprocess
import sys

from zcore.kernels import nn

CALLS = {
    "RMSNorm": "RMSNorm(2)(x)",
    "RMSNorm with a residual": "RMSNorm(2)(x, x)",
    "LayerNorm": "LayerNorm(2)(x)",
    "LayerNorm with a residual": "LayerNorm(2)(x, x)",
    "SwiGLU": "SwiGLU()(x, x)",
    "SwiGLU of halves": "SwiGLU()(x)",
    "GeGLU": "GeGLU()(x, x)",
    "GeGLU of halves": "GeGLU()(x)",
    "BiasGELU": "BiasGELU()(x)",
    "BiasDropoutResidual": "BiasDropoutResidual()(x, None, x)",
    "Rotary": "Rotary(2, num_positions=2)(x[:, None], x[:, None], torch.arange(2))",
    "TopKRouter": "TopKRouter(2, num_experts=3, k=1)(x)",
    "ExpertMLPs": "ExpertMLPs(2, 3, num_experts=2)(x, torch.tensor([[0], [1]]), torch.ones(2, 1))",
    "LinearCrossEntropy": "LinearCrossEntropy()(x, torch.ones(3, 2), torch.tensor([0, 2]))",
    "load_balancing_loss": "load_balancing_loss(x, torch.tensor([[0], [1]]))",
    "router_z_loss": "router_z_loss(x)",
}
PROGRAM = """
import json, os, sys, torch
from zcore.kernels import nn
import zcore.kernels.optim, zcore.kernels.patching

failed = {"torch._dynamo": "torch._dynamo" in sys.modules}
x = torch.eye(2)
for name, call in json.loads(sys.argv[1]).items():
    for in_graph in (False, True):
        child = os.fork()
        if not child:
            try:
                if in_graph:
                    torch.compiler.is_compiling = lambda: True
                eval(call, vars(nn), {"torch": torch, "x": x})
                os._exit(0)
            finally:
                os._exit(1)
        if os.waitpid(child, 0)[1]:
            failed[name, in_graph] = call
print([str(each) for each, found in failed.items() if found])
"""


def test_each_layer_works_first_and_the_imports_leave_the_compiler_of_torch_alone() -> None:
    assert {name.split()[0] for name in CALLS} == set(nn.__all__)
    command = [sys.executable, "-c", PROGRAM, json.dumps(CALLS)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"
