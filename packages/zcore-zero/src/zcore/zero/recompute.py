"""Activations that are computed again in the backward: blocks keep their inputs only, and what a policy names.

Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; torch's `checkpoint` does the work, and
its selective contexts keep the results of chosen operations. A block is computed again when its gradients are due, and
its weights gathered for them anyway: under stage 3 nothing is gathered more often for it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from zcore.core.collectives import Collectives
from zcore.core.errors import ConfigError, StateError
from zcore.zero.partitioned import partition_inputs
from zcore.zero.units import find_blocks

__all__ = ["SAVEABLE", "check_recompute", "checkpoint"]

aten = torch.ops.aten
SAVEABLE = {
    "matmul": (aten.mm, aten.addmm, aten.bmm, aten.baddbmm),
    "attention": (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_fused_attention_overrideable,
    ),
}
MARK, RUN, FORWARD = "_zcore_recomputes", "_zcore_run", "_zcore_forward"  # attributes of a block


def checkpoint(
    model: nn.Module, *, every: int = 1, save: Sequence[str] = (), partition_over: Collectives | None = None
) -> nn.Module:
    """Have each `every`-th block of `model` keep its inputs only, and compute the rest again in the backward.

    Blocks are those that stage 3 gathers. save: results that are kept, too, of "matmul" or "attention". Call it before
    or after sharding; the bits trained stay the same. partition_over: ranks that all run the same inputs through the
    model, as tensor-parallel ones do; each keeps a part of them. Returns `model`. Raises ConfigError where no block is
    recognisable, or the settings cannot be; StateError for a model that computes again already.
    """
    blocks = check_recompute(model, every=every, save=save)
    run: Callable[..., Any] = partial(torch_checkpoint, use_reentrant=False)
    if save:
        run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _policy(frozenset(save))))
    if partition_over is not None and partition_over.size > 1:
        run = partition_inputs(run, partition_over)
    for index, block in enumerate(blocks):
        if index % every == 0:
            _recompute(block, run)
    return model


def check_recompute(model: nn.Module, *, every: int, save: Sequence[str]) -> list[nn.Module]:
    """The blocks of `model`. Raises what `checkpoint` does."""
    if every < 1:
        raise ConfigError(f"activation_checkpointing.every is {every}; 1 is each block, 2 every second one.")
    if isinstance(save, str):
        raise ConfigError(f'save is {save!r}; expected a list, such as ["{save}"].')
    if unknown := sorted(set(save) - SAVEABLE.keys()):
        raise ConfigError(f"activation_checkpointing.save has {unknown[0]!r}; expected some of {', '.join(SAVEABLE)}.")
    blocks = list(find_blocks(model).values())
    if not blocks:
        raise ConfigError(
            "activation_checkpointing: no blocks are recognisable in this model. Blocks are two modules or more of one "
            "class in one ModuleList or Sequential, each with parameters in more than one module. Name others by "
            "`zero.set_leaf_modules`, or call torch.utils.checkpoint in the forward."
        )
    if any(getattr(module, "gradient_checkpointing", False) or hasattr(module, MARK) for module in model.modules()):
        raise StateError(
            "This model computes activations again already. Leave out activation_checkpointing.every, or the call of "
            "gradient_checkpointing_enable() or zero.checkpoint() before."
        )
    return blocks


def _policy(save: frozenset[str]) -> Callable[..., CheckpointPolicy]:
    kept = {packet for name in save for packet in SAVEABLE[name]}

    def policy(context: object, operation: Any, *args: object, **kwargs: object) -> CheckpointPolicy:
        is_kept = operation.overloadpacket in kept
        return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _recompute(block: nn.Module, run: Callable[..., Any]) -> None:
    """Through what Hugging Face's layers offer, which knows of their caches; else around the forward itself."""
    setattr(block, MARK, True)
    if hasattr(block, "gradient_checkpointing"):
        block.__dict__.update(gradient_checkpointing=True, _gradient_checkpointing_func=run)
        return
    block.__dict__.update({RUN: run, FORWARD: block.forward})
    block.forward = MethodType(_run_again, block)  # inside of __call__, where hooks are; a copy's is bound to the copy


def _run_again(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = block.__dict__[FORWARD]
    return block.__dict__[RUN](forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
