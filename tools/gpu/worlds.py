"""The worlds in which trainers are measured on one device, and the models they train.

one_rank        a real process group; zcore has nobody to share with, so stage 3 is stage 0: their difference is noise
simulated       rank 0 of 8 whose collectives copy locally and send nothing: the cost of sharding without that of a
                network, and the memory that one of 8 ranks really needs. Losses mean nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
from gpt import GPTConfig
from gpu.trainers import open_mesh
from torch.distributed.device_mesh import DeviceMesh

from zcore.core.device import backend_for
from zcore.core.testing import run_ranks, simulated_world

__all__ = ["MODELS", "QUICK", "SEQUENCES", "WORLDS", "Figures", "entered", "run_in"]

Figures = dict[str, object]

SIMULATED_RANKS = 8
WORLDS = {"one_rank": ("plain", "fsdp2", "zcore-0", "zcore-3"), "simulated": ("plain", "fsdp2", "zcore-2", "zcore-3")}
QUICK = {"tiny": GPTConfig(vocab_size=61, context=16, layers=2, width=32, heads=2)}
MODELS = {
    "gpt-135m": GPTConfig(vocab_size=32768, context=1024, layers=12, width=768, heads=12),
    "gpt-369m": GPTConfig(vocab_size=32768, context=1024, layers=24, width=1024, heads=16),
}
SEQUENCES = 16


def run_in(world: str, body: Callable[[str, str, bool], Figures], device_type: str, *, is_quick: bool) -> Figures:
    """Run `body(world, device_type, is_quick)`, which is to enter the world, in a process of its own."""
    is_simulated = world == "simulated"
    backend = backend_for(torch.device(device_type))
    (figures,) = run_ranks(
        1, body, world, device_type, is_quick, backend=backend, init_process_group=not is_simulated, deadline_s=420
    )
    return figures


@contextmanager
def entered(world: str, device_type: str) -> Iterator[DeviceMesh]:
    """Be in the world; its data-parallel mesh."""
    with simulated_world(SIMULATED_RANKS) if world == "simulated" else nullcontext():
        if world == "simulated":
            _define_fake_sums()
        yield open_mesh(device_type)


def _define_fake_sums() -> None:
    """Where torch's fake reduce-scatter leaves its output undefined, as older ones do, let it copy this rank's part.

    Undefined memory may hold NaN, and a step that meets one is refused.
    """
    size = dist.get_world_size()
    output = torch.zeros(1)
    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    getattr(dist, name)(output, torch.ones(size))
    if output.item() == 1:
        return

    def copy_own_part(output: torch.Tensor, input: torch.Tensor, **_: object) -> None:
        output.copy_(input.chunk(size)[dist.get_rank()])

    setattr(dist, name, copy_own_part)
