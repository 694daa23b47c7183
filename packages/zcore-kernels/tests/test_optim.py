"""The optimizers in a training loop: beside torch.optim's, with states of every dtype, saved, loaded and refused."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from devices import needs_cuda
from torch import Tensor, nn

from zcore.core import ops
from zcore.core.errors import ConfigError, LayoutError
from zcore.kernels import _cpu, optim

# An fp32 step rounds some five times, and torch's step that is not fused rounds more often, as its fused one does in
# the last elements of a tensor: 1 or 2 units in the last place (6e-8) a step, over 20 steps.
PARITY = {"rtol": 4e-6, "atol": 4e-7}
PAIRS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (optim.Adam, torch.optim.Adam, {"lr": 1e-2}),
    "adam decayed": (optim.Adam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    "adam as adamw": (
        optim.Adam,
        torch.optim.Adam,
        {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    ),
    "adamw": (optim.AdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw maximize": (optim.AdamW, torch.optim.AdamW, {"lr": 1e-2, "maximize": True}),
    "adagrad": (optim.Adagrad, torch.optim.Adagrad, {"lr": 1e-1, "lr_decay": 0.1, "weight_decay": 0.1}),
    "adagrad begun": (optim.Adagrad, torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    "sgd": (optim.SGD, torch.optim.SGD, {"lr": 1e-1}),
    "sgd decayed": (optim.SGD, torch.optim.SGD, {"lr": 1e-1, "weight_decay": 0.1, "maximize": True}),
    "momentum": (optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1}),
    "nesterov": (optim.SGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
}
OWN: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (optim.Adam, {"lr": 1e-2, "weight_decay": 1e-3}),
    "adamw": (optim.AdamW, {"lr": 1e-2}),
    "lion": (optim.Lion, {"lr": 1e-3}),
    "adagrad": (optim.Adagrad, {"lr": 5e-2}),
    "lamb": (optim.LAMB, {"lr": 1e-2}),
    "sgd": (optim.SGD, {"lr": 5e-2, "momentum": 0.9}),
}


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(9, 33), nn.Tanh(), nn.Linear(33, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    random = torch.Generator().manual_seed(step)
    x = torch.randn(64, 9, generator=random).to(next(model.parameters()).dtype)
    y = (x[:, :1] + x[:, 1:2]).sin() + x[:, 2:3]
    return (model(x) - y).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def gradients(model: nn.Module, step: int) -> None:
    """The same for both sides, whatever their parameters are by now."""
    random = torch.Generator().manual_seed(step)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=random).to(param)


@pytest.mark.skipif(
    "baseline"
    in (_cpu.instruction_set(), torch.backends.cpu.get_cpu_capability().lower().replace("default", "baseline")),
    reason="without instructions that multiply and add at once, each compiler rounds where it likes",
)
@pytest.mark.parametrize("name", PAIRS)
def test_steps_have_the_bits_of_torchs_fused_ones(name: str) -> None:
    ours, theirs, settings = PAIRS[name]
    numel = 4096  # whole vectors: torch rounds the last few elements otherwise
    params = [nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    optimizers = ours([params[0]], **settings), theirs([params[1]], fused=True, **settings)
    for step in range(5):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.randn(numel, generator=torch.Generator().manual_seed(step + 1))
            optimizer.step()
        assert torch.equal(*params), step


@pytest.mark.parametrize("name", PAIRS)
def test_twenty_steps_are_torchs(name: str) -> None:
    ours, theirs, settings = PAIRS[name]
    models = model_of(), model_of()
    optimizers = [
        kind([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 3e-2}], **settings)
        for kind, model in zip((ours, theirs), models, strict=True)
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95) for optimizer in optimizers]
    for step in range(20):
        for model, optimizer, schedule in zip(models, optimizers, schedules, strict=True):
            gradients(model, step)
            optimizer.step()
            schedule.step()
    bounds = {"rtol": 0, "atol": 0} if name == "sgd" and "avx" in instruction_set() else PARITY
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, **bounds)
        for key, value in optimizers[1].state[right].items():
            if value is not None:
                torch.testing.assert_close(optimizers[0].state[left][key], value, rtol=1e-5, atol=1e-6)


def instruction_set() -> str:
    """Plain SGD is one fused multiply-add an element here and in torch, where there is such an instruction."""
    return _cpu.instruction_set()


def test_bf16_parameters_step_as_torchs_fused_adamw_does() -> None:
    models = model_of().bfloat16(), model_of().bfloat16()
    ours = optim.AdamW(models[0].parameters(), lr=1e-2, state_dtype=torch.bfloat16)
    theirs = torch.optim.AdamW(models[1].parameters(), lr=1e-2, fused=True)  # states in the dtype of parameters
    for step in range(20):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            gradients(model, step)
            optimizer.step()
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert left.dtype is torch.bfloat16
        torch.testing.assert_close(left, right, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("name", OWN)
def test_every_state_dtype_trains_as_fp32_does(name: str) -> None:
    kind, settings = OWN[name]
    ends = {}
    for state_dtype in (torch.float32, torch.bfloat16, "8bit"):
        model = model_of()
        losses = train(model, kind(model.parameters(), state_dtype=state_dtype, **settings), range(150))
        ends[state_dtype] = sum(losses[-30:]) / 30
        assert ends[state_dtype] < 0.7 * sum(losses[:10]) / 10
    # Rounding of states is noise in a step: at most 1/128 of the largest in a block, some percent of small elements.
    # Here it moves the loss by less than 3%, to either side; an error in codes or scales by tens of percent.
    assert ends[torch.bfloat16] == pytest.approx(ends[torch.float32], rel=0.05)
    assert ends["8bit"] == pytest.approx(ends[torch.float32], rel=0.05)


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"])
@pytest.mark.parametrize("name", OWN)
def test_a_run_that_saves_and_loads_goes_on_to_the_bit(name: str, state_dtype: optim.StateDtype) -> None:
    kind, settings = OWN[name]
    model = model_of()
    optimizer = kind(model.parameters(), state_dtype=state_dtype, **settings)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = model_of(seed=1)
    continued = kind(other.parameters(), state_dtype=state_dtype, **settings)
    other.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    assert train(model, optimizer, range(3, 6)) == train(other, continued, range(3, 6))
    for left, right in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("name", ["adam decayed", "adam as adamw", "adamw", "adagrad", "momentum"])
def test_states_go_from_torch_optim_and_back(name: str) -> None:
    ours, theirs, settings = PAIRS[name]
    models = model_of(), model_of()
    first = theirs(models[0].parameters(), **settings)
    for step in range(3):
        gradients(models[0], step)
        first.step()
    models[1].load_state_dict(models[0].state_dict())
    taken = ours(models[1].parameters())
    taken.load_state_dict(first.state_dict())
    back = theirs(models[1].parameters())
    for step in range(3, 6):
        for model, optimizer in zip(models, (first, taken), strict=True):
            gradients(model, step)
            optimizer.step()
    back.load_state_dict(taken.state_dict())
    for model, optimizer in zip(models, (first, back), strict=True):
        gradients(model, 6)
        optimizer.step()
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, **PARITY)


def test_a_loaded_state_is_converted_to_the_dtype_that_was_asked_for() -> None:
    model = model_of()
    first = torch.optim.AdamW(model.parameters(), lr=3e-3)
    train(model, first, range(3))
    small = optim.AdamW(model.parameters(), state_dtype="8bit")
    small.load_state_dict(first.state_dict())
    weight = model[0].weight
    assert small.state[weight]["exp_avg"].dtype is torch.uint8
    assert small.state[weight]["exp_avg"].shape == weight.shape
    assert small.param_groups[0]["lr"] == 3e-3
    wide = optim.AdamW(model.parameters())
    wide.load_state_dict(small.state_dict())
    largest = first.state[weight]["exp_avg"].abs().max()
    torch.testing.assert_close(
        wide.state[weight]["exp_avg"], first.state[weight]["exp_avg"], rtol=0, atol=float(largest) / 128
    )


def test_closures_late_groups_and_parameters_without_gradient() -> None:
    model = model_of()
    optimizer = optim.AdamW(model[0].parameters(), lr=1e-2)
    before = model[2].weight.clone()

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(loss_of(model_of(), 0).item())
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 1e-1, "state_dtype": "8bit"})
    model[2].bias.grad = None
    model[0].bias.grad = None
    optimizer.step()
    assert not torch.equal(model[2].weight, before)
    assert model[2].bias not in optimizer.state
    assert [float(optimizer.state[each]["step"]) for each in (model[0].weight, model[0].bias)] == [2.0, 1.0]
    assert optimizer.state[model[2].weight]["exp_avg"].dtype is torch.uint8


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
def test_channels_last_parameters_and_empty_ones_are_stepped(state_dtype: optim.StateDtype) -> None:
    torch.manual_seed(3)
    values, grad = torch.randn(5, 3, 3, 3), torch.randn(5, 3, 3, 3)
    plain, moved = nn.Parameter(values.clone()), nn.Parameter(values.contiguous(memory_format=torch.channels_last))
    empty = nn.Parameter(torch.empty(0))
    optimizer = optim.AdamW([plain, moved, empty], state_dtype=state_dtype)
    for _ in range(2):
        plain.grad, moved.grad, empty.grad = grad, grad, torch.empty(0)
        optimizer.step()
        # 135 elements are one block of codes: in another order, but of the same scale.
        assert torch.equal(plain, moved)
    again = optim.AdamW([plain, moved, empty], state_dtype=state_dtype)
    again.load_state_dict(optimizer.state_dict())
    for key, value in optimizer.state[moved].items():
        assert torch.equal(again.state[moved][key], value)


def test_lamb_scales_each_parameter_by_its_norm() -> None:
    param = nn.Parameter(torch.tensor([3.0, 4.0]))
    still = nn.Parameter(torch.zeros(2))
    optimizer = optim.LAMB([param, still], lr=0.1)
    param.grad, still.grad = torch.tensor([1.0, -1.0]), torch.tensor([1.0, 1.0])
    optimizer.step()
    ratio = 5.0 / 2**0.5  # Adam's first step is the sign of the gradient
    torch.testing.assert_close(param.detach(), torch.tensor([3.0 - 0.1 * ratio, 4.0 + 0.1 * ratio]))
    torch.testing.assert_close(still.detach(), torch.tensor([-0.1, -0.1]))  # no norm, no scale


@pytest.mark.parametrize("name", OWN)
def test_the_references_step_as_the_compiled_ops_do(name: str) -> None:
    kind, settings = OWN[name]
    models = model_of(), model_of()
    train(models[0], kind(models[0].parameters(), **settings), range(5))
    with ops.force("reference"):
        train(models[1], kind(models[1].parameters(), **settings), range(5))
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


@needs_cuda
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, "8bit"])
@pytest.mark.parametrize("name", OWN)
def test_a_gpu_steps_as_the_cpu_does(name: str, state_dtype: optim.StateDtype) -> None:
    kind, settings = OWN[name]
    models = model_of(), model_of().cuda()
    optimizers = [kind(model.parameters(), state_dtype=state_dtype, **settings) for model in models]
    for step in range(10):
        for model, optimizer in zip(models, optimizers, strict=True):
            gradients(model, step)
            optimizer.step()
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(right.cpu(), left, **PARITY)
        for key, value in optimizers[0].state[left].items():
            if value.dtype is torch.uint8:  # LAMB's sums in another order may tip what lies between two codes
                assert ((optimizers[1].state[right][key].cpu().int() - value.int()).abs() <= 1).all()
            else:
                torch.testing.assert_close(optimizers[1].state[right][key].cpu(), value, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda params: optim.AdamW(params, amsgrad=True), "AdamW: amsgrad=True is not served"),
        (lambda params: optim.AdamW(params, capturable=True), "capturable=True"),
        (lambda params: optim.SGD(params, differentiable=True), "SGD: differentiable=True"),
        (lambda params: optim.Adam(params, amsgrad=True), "Adam: amsgrad=True is not served"),
        (lambda params: optim.Adagrad(params, foreach=True, fused=True), "Adagrad: foreach and fused are both True"),
        (lambda params: optim.AdamW([{"params": params, "lr": -1.0}]), "AdamW: lr is -1.0"),
        (lambda params: optim.Adam([{"params": params, "betas": (1.5, 2.0)}]), "Adam: betas are"),
        (lambda params: optim.Adam(params, betas=(0.9, -0.1)), "Adam: betas are"),
        (lambda params: optim.Adam(params, eps=-1e-8), "Adam: eps is -1e-08"),
        (lambda params: optim.AdamW(params, lr=torch.ones(2)), "AdamW: lr is tensor.*expected one number"),
        (lambda params: optim.SGD([{"params": params, "momentum": -0.1}]), "SGD: momentum is -0.1"),
        (lambda params: optim.SGD([{"params": params, "nesterov": True}]), "SGD: nesterov"),
        (lambda params: optim.Adagrad([{"params": params, "lr_decay": -1.0}]), "Adagrad: lr_decay is -1.0"),
        (lambda params: optim.Adagrad([{"params": params, "differentiable": True}]), "Adagrad: differentiable=True"),
        (lambda params: optim.LAMB([{"params": params, "max_coeff": 0.001}]), "LAMB: min_coeff is 0.01"),
        (lambda params: optim.Lion([{"params": params, "weight_decay": -0.1}]), "Lion: weight_decay is -0.1"),
        (lambda params: optim.SGD([{"params": params}], lr=-1.0), "SGD: lr is -1.0"),
        (lambda params: optim.SGD([{"params": params, "lr": 0.1}], lr=-1.0), "SGD: lr is -1.0"),
        (lambda params: optim.AdamW(params, lr=-1.0), "AdamW: lr is -1.0"),
        (lambda params: optim.Lion(params, betas=(0.9, 1.0)), "Lion: betas are"),
        (lambda params: optim.LAMB(params, min_coeff=2.0, max_coeff=1.0), "LAMB: min_coeff is 2"),
        (lambda params: optim.SGD(params, nesterov=True), "SGD: nesterov"),
        (lambda params: optim.AdamW(params, state_dtype=torch.float16), "state_dtype is torch.float16"),
        (lambda params: optim.AdamW([params[0].double()]), "parameter 0 of the group is torch.float64"),
    ],
)
def test_what_is_not_served_is_refused_by_name(build: Callable[[list[Tensor]], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build([torch.ones(3)])


def test_what_cannot_be_stepped_or_loaded_is_refused_by_name() -> None:
    gaps = torch.ones(4, 4)[:, ::2].detach().requires_grad_()
    gaps.grad = torch.ones(4, 2)
    with pytest.raises(LayoutError, match="gaps or overlaps"):
        optim.AdamW([gaps]).step()
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(LayoutError, match=r"gradient of parameter 0 is torch\.sparse_coo"):
        optim.Adagrad(embedding.parameters()).step()
    twice = nn.Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ConfigError, match="stands in the group twice"):
        optim.SGD([twice, twice])


def kept(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Groups, states and parameters as they are now."""
    saved = optimizer.state_dict()
    return {
        "groups": copy.deepcopy(saved["param_groups"]),
        "states": {
            index: {key: value.tolist() for key, value in each.items()} for index, each in saved["state"].items()
        },
        "params": [param.tolist() for group in optimizer.param_groups for param in group["params"]],
    }


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OWN)
def test_a_step_that_is_refused_changes_nothing(name: str, steps: int) -> None:
    kind, settings = OWN[name]
    torch.manual_seed(0)
    first, dense, last = nn.Linear(9, 3), nn.Linear(3, 3), nn.Embedding(4, 3, sparse=True)
    groups = [
        {"params": [*first.parameters(), *last.parameters()]},
        {"params": dense.parameters()},
    ]
    optimizer = kind(groups[::-1], **settings)  # the group of the embedding comes after one that could be stepped
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.randn(param.shape)
    for _ in range(steps):
        optimizer.step()
    before = kept(optimizer)
    last.weight.grad = torch.randn(4, 3).to_sparse()
    with pytest.raises(LayoutError, match=r"torch\.sparse_coo"):
        optimizer.step()
    assert kept(optimizer) == before
    last.weight.grad = last.weight.grad.to_dense()
    optimizer.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {steps + 1.0}


def trained_by(kind: Callable[..., torch.optim.Optimizer], **settings: Any) -> torch.optim.Optimizer:
    model = model_of()
    optimizer = kind(model.parameters(), **settings)
    train(model, optimizer, range(1))
    return optimizer


def spoilt_shape() -> dict[str, Any]:
    saved = trained_by(torch.optim.AdamW, lr=0.5).state_dict()
    saved["state"][3]["exp_avg"] = torch.ones(5)  # of the last parameter
    return saved


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: trained_by(torch.optim.AdamW, lr=0.5, amsgrad=True).state_dict(), "amsgrad=True"),
        (lambda: trained_by(torch.optim.Adam, lr=0.5, weight_decay=0.1).state_dict(), "decoupled_weight_decay=False"),
        (spoilt_shape, r"saved exp_avg has shape \(5,\)"),
    ],
)
def test_a_load_that_is_refused_changes_nothing(make: Callable[[], dict[str, Any]], words: str) -> None:
    optimizer = trained_by(optim.AdamW, lr=1e-2)
    groups, before = optimizer.param_groups, kept(optimizer)
    with pytest.raises((ConfigError, LayoutError), match=words):
        optimizer.load_state_dict(make())
    assert optimizer.param_groups is groups
    assert kept(optimizer) == before


@pytest.mark.parametrize("settings", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"fused": False}])
@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad", "sgd"])
def test_how_torch_would_step_is_kept_in_the_group_and_changes_nothing(name: str, settings: dict[str, bool]) -> None:
    ours, theirs, others = PAIRS[name]
    models = model_of(), model_of()
    asked, plain = ours(models[0].parameters(), **settings, **others), ours(models[1].parameters(), **others)
    assert train(models[0], asked, range(3)) == train(models[1], plain, range(3))
    assert asked.param_groups[0].items() >= settings.items()
    again = theirs(models[0].parameters())
    again.load_state_dict(asked.state_dict())
    assert again.param_groups[0].items() >= settings.items()


def test_a_loaded_group_counts_its_steps_here_wherever_torch_did() -> None:
    saved = trained_by(torch.optim.AdamW).state_dict()
    saved["param_groups"][0]["capturable"] = True
    optimizer = optim.AdamW(model_of().parameters())
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["capturable"] is False


def test_adamw_decouples_decay_whatever_a_loaded_group_says() -> None:
    models = model_of(), model_of()
    taken, plain = (optim.AdamW(model.parameters(), weight_decay=0.0) for model in models)
    taken.load_state_dict(torch.optim.Adam(models[0].parameters()).state_dict())
    for optimizer in (taken, plain):
        optimizer.param_groups[0]["weight_decay"] = 0.5
    assert train(models[0], taken, range(3)) == train(models[1], plain, range(3))


@pytest.mark.parametrize("state_dtype", [torch.float32, "8bit"])
def test_adagrads_states_are_there_from_the_start_and_can_be_shared(state_dtype: optim.StateDtype) -> None:
    model = model_of()
    optimizer = optim.Adagrad(model.parameters(), initial_accumulator_value=0.5, state_dtype=state_dtype)
    theirs = torch.optim.Adagrad(model.parameters(), initial_accumulator_value=0.5)
    restored = optim.Adagrad(model.parameters())
    restored.load_state_dict(optimizer.state_dict())
    if state_dtype == "8bit":  # codes are made where they are stepped
        assert not optimizer.state
        optimizer.share_memory()
        restored.load_state_dict(optimizer.state_dict())
    for param in model.parameters():
        assert float(optimizer.state[param]["step"]) == 0.0
        torch.testing.assert_close(restored.state[param]["sum"], theirs.state[param]["sum"])
    optimizer.share_memory()
    assert all(value.is_shared() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize("name", ["adam", "adamw", "adagrad"])
def test_torch_does_not_take_codes_for_values(name: str) -> None:
    ours, theirs, _ = PAIRS[name]
    model = model_of()
    optimizer = ours(model.parameters(), state_dtype="8bit")
    gradients(model, 0)
    optimizer.step()
    other = theirs(model.parameters())
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(KeyError, match=next(iter(ours.signs))):
        other.step()


@pytest.mark.parametrize("name", ["adamw", "momentum", "lamb"])
def test_a_compiled_loop_steps_as_a_plain_one_does(name: str) -> None:
    kind, settings = OWN["lamb"] if name == "lamb" else PAIRS[name][::2]
    models = model_of(), model_of()
    optimizers = [kind(model.parameters(), **settings) for model in models]
    graphs: list[Any] = []

    def note(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(optimizers[0].step, backend=note)
    for step in range(10):  # beyond the number of graphs after which torch.compile gives up
        for model, run in zip(models, (compiled, optimizers[1].step), strict=True):
            gradients(model, step)
            run()
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
    assert not graphs  # nothing of a step is made again for each number
