"""Tensors without memory that compiled code could read: fakes, transforms, freed storage, lazy signs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_cases import STEPS, operands_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels import optim
from zcore.kernels.commands.cases import CASES, Call, Operands, tensors_in
from zcore.kernels.ops import adamw_step, quantize_blockwise, sgd_step, squared_norm
from zcore.kernels.ops.memory import any_needs_torch

CPU = torch.device("cpu")
COMPILED = [op for op in CASES if op not in {"newton_schulz", "grouped_matmul_fp8", "linear_cross_entropy"}]


def case_of(op: str) -> tuple[Callable[..., Any], Call]:
    call = CASES[op](Operands(3000, dtype=torch.float32, device=CPU)).copied()
    return ops.get(op, device=CPU, dtype=call.tensors[0].dtype), call


def adam() -> dict[str, Any]:
    kinds = {"param": torch.float32, "grad": torch.float32, "state": torch.float32, "with_copies": False}
    return operands_of(STEPS["adamw"], [4, 4], **kinds)


@pytest.mark.parametrize("op", COMPILED)
def test_fakes_become_what_the_op_would_return(op: str) -> None:
    function, call = case_of(op)
    expected = [(each.shape, each.dtype) for each in tensors_in(function(*call.args, **call.kwargs))]
    _, call = case_of(op)
    with FakeTensorMode(allow_fallback_kernels=False) as mode:
        args, kwargs = tree_map_only(Tensor, mode.from_tensor, (call.args, call.kwargs))
        found = list(tensors_in(function(*args, **kwargs)))
    assert all(isinstance(each, FakeTensor) for each in found)
    assert [(each.shape, each.dtype) for each in found] == expected


def test_fakes_outside_of_their_mode_are_known_by_themselves() -> None:
    with FakeTensorMode():
        values = torch.randn(100)
    assert isinstance(ops.get("round_stochastic", device=CPU, dtype=torch.float32)(values, seed=1), FakeTensor)
    adamw_step.adamw_step([values], [values], [values], [values], **STEPS["adamw"].settings)
    assert any_needs_torch("an op", ([1, [values]], "a setting"))
    assert not any_needs_torch("an op", ([1, [torch.ones(1)]], "a setting"))


@pytest.mark.parametrize("op", COMPILED)
def test_a_freed_tensor_is_refused_by_name(op: str) -> None:
    function, call = case_of(op)
    call.tensors[0].untyped_storage().resize_(0)
    with pytest.raises(LayoutError, match=rf"^{op}.*has no memory \(address 0\)"):
        function(*call.args, **call.kwargs)


@pytest.mark.parametrize("op", ["round_stochastic", "quantize_blockwise", "squared_norm"])
def test_a_transform_of_torch_func_is_refused_by_name(op: str) -> None:
    function, call = case_of(op)
    with pytest.raises(LayoutError, match=rf"^{op}.*as inside torch\.vmap"):
        torch.vmap(lambda values: function(values, **call.kwargs))(torch.randn(3, 64))


def test_a_fake_that_comes_to_compiled_code_all_the_same_is_refused_by_name() -> None:
    with FakeTensorMode():
        values = torch.randn(64)
    with (
        pytest.warns(UserWarning, match="data pointer of FakeTensor"),
        pytest.raises(LayoutError, match=r"values, a FakeTensor of shape \(64,\), has no memory"),
    ):
        quantize_blockwise.quantize_blockwise(values, format="int8", block_size=64)


def negated(tensor: Tensor) -> Tensor:
    """The same values, which lie in memory with the other sign."""
    return torch._neg_view(-tensor)


def test_a_lazy_sign_is_refused_or_resolved_but_never_lost() -> None:
    mine = adam()
    for name in ("params", "grads", "exp_avgs"):
        with pytest.raises(LayoutError, match=rf"{name}\[1\], of shape \(4,\), is negated lazily"):
            adamw_step.adamw_step(**{**mine, name: [torch.ones(4), negated(torch.ones(4))]}, **STEPS["adamw"].settings)
    with pytest.raises(LayoutError, match=r"values, of shape .* is negated lazily"):
        ops.get("quantize_blockwise", device=CPU, dtype=torch.float32)(
            negated(torch.ones(64)), format="int8", block_size=64
        )
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    norm = ops.get("rms_norm", device=CPU, dtype=torch.float32)  # torch itself resolves what goes through it
    assert torch.equal(norm(negated(x), None, 1e-6), norm(x, None, 1e-6))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": [None, torch.ones(4)]}, r"params\[0\] is a NoneType; expected a tensor"),
        ({"params": torch.ones(4)}, "params is a Tensor; expected a list"),
        ({"grads": None}, "grads is a NoneType; expected a list"),
        ({"exp_avgs": [1.0, 2.0]}, r"exp_avgs\[0\] is a float"),
    ],
)
def test_what_is_no_list_of_tensors_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LayoutError, match=f"^adamw_step: {words}"):
        adamw_step.adamw_step(**{**adam(), **changes}, **STEPS["adamw"].settings)


def test_lists_that_are_too_many_are_refused_by_name() -> None:
    one = [torch.ones(1)]
    with pytest.raises(LayoutError, match="sgd_step got 6 lists of tensors; expected 5: params, grads"):
        sgd_step.sgd_step(one, one, one, one, one, one, **STEPS["sgd"].settings)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": None}, "lr is None, a NoneType; expected float"),
        ({"is_decoupled": "yes"}, "is_decoupled is 'yes', a str; expected bool"),
        ({"weight_decays": 1.0}, "got the setting weight_decays; .*Did you mean weight_decay?"),
    ],
)
def test_settings_that_an_op_has_not_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^adamw_step:? {words}"):
        adamw_step.adamw_step(**adam(), **{**STEPS["adamw"].settings, **changes})


def test_settings_that_are_missing_are_refused_by_name() -> None:
    mine = adam()
    before = mine["params"][0].clone()
    with pytest.raises(ConfigError, match="adamw_step got no lr, beta2, eps"):
        adamw_step.adamw_step(**mine, beta1=0.9)  # type: ignore[call-arg]
    lamb = STEPS["lamb_apply"]
    operands = {**mine, "ratios": torch.ones(2).double()}
    operands.pop("grads")
    with pytest.raises(ConfigError, match="lamb_apply got the setting clip_factor"):
        lamb.call(**operands, **lamb.settings, clip_factor=torch.ones(1))
    assert torch.equal(mine["params"][0], before)


def test_a_list_for_one_tensor_and_integers_for_floats_are_refused_by_name() -> None:
    with pytest.raises(LayoutError, match="squared_norm got a list; expected one flat tensor"):
        squared_norm.squared_norm([torch.ones(3)])
    orthogonal = ops.get("newton_schulz", device=CPU, dtype=torch.float32)
    for shape in ((4,), (2, 5, 7)):
        with pytest.raises(LayoutError, match=r"newton_schulz got a tensor of shape .*expected a matrix"):
            orthogonal(torch.ones(shape))
    with pytest.raises(ConfigError, match=r"the matrix is torch\.int32"):
        orthogonal(torch.ones(2, 2, dtype=torch.int32))
    for op, weights in (("rms_norm", (None,)), ("layer_norm", (None, None))):
        with pytest.raises(ConfigError, match=rf"{op}: x is torch\.int32; expected a floating-point"):
            ops.get(op, device=CPU, dtype=torch.int32)(torch.ones(2, 4, dtype=torch.int32), *weights, 1e-6)


def test_a_fake_optimizer_steps_for_those_who_plan_memory() -> None:
    with FakeTensorMode():
        params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(2, 3))]
        optimizer = optim.AdamW(params)
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        assert isinstance(optimizer.state[params[0]]["exp_avg"], FakeTensor)
