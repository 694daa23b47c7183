"""The layers of experts against plain loops, against those of transformers, and the losses of routers."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from zcore.core import ops
from zcore.kernels.nn import ExpertMLPs, TopKRouter, load_balancing_loss, router_z_loss

DTYPES = [torch.float32, torch.float64]  # compiled, and torch's
HIDDEN, INTERMEDIATE, NUM_EXPERTS, K = 12, 10, 5, 2


class Block(nn.Module):
    """A router and its experts."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.gate = TopKRouter(HIDDEN, num_experts=NUM_EXPERTS, k=K, dtype=dtype)
        self.experts = ExpertMLPs(HIDDEN, INTERMEDIATE, num_experts=NUM_EXPERTS, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        weights, experts, _ = self.gate(x)
        return self.experts(x, experts, weights)


def loop_over_experts(block: Block, x: Tensor) -> Tensor:
    weights, experts = functional.linear(x, block.gate.weight).softmax(-1).topk(K)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.zeros_like(x)
    for expert in range(NUM_EXPERTS):
        token, choice = torch.where(experts == expert)
        gate, up = functional.linear(x[token], block.experts.gate_up_proj[expert]).chunk(2, -1)
        down = functional.linear(functional.silu(gate) * up, block.experts.down_proj[expert])
        out = out.index_add(0, token, down * weights[token, choice, None])
    return out


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_and_all_gradients_are_those_of_a_loop(dtype: torch.dtype, num_tokens: int) -> None:
    block, x = Block(dtype), tokens(num_tokens, HIDDEN, dtype=dtype)
    found, expected = block(x), loop_over_experts(block, x)
    torch.testing.assert_close(found, expected)
    of = [x, *block.parameters()]
    grads = torch.autograd.grad((found * found).sum(), of)
    for one, other in zip(grads, torch.autograd.grad((expected * expected).sum(), of), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near_fp32(dtype: torch.dtype) -> None:
    block, x = Block(), tokens(50, HIDDEN)
    weights, experts, _ = (each.detach() for each in block.gate(x))
    expected = block.experts(x, experts, weights)
    found = block.experts.to(dtype)(x.to(dtype), experts, weights)
    assert found.dtype == dtype
    assert float(((found - expected).norm() / expected.norm()).detach()) < 0.01


def test_shapes_before_hidden_are_kept_and_memory_may_be_strided() -> None:
    block, x = Block(), tokens(HIDDEN, 3, 4).permute(2, 1, 0)
    found = block(x)
    assert found.shape == (4, 3, HIDDEN)
    torch.testing.assert_close(found.flatten(0, 1), loop_over_experts(block, x.reshape(12, HIDDEN)))


def test_references_compute_the_same() -> None:
    block, x = Block(), tokens(50, HIDDEN)
    with ops.force("reference"):
        expected = block(x)
    torch.testing.assert_close(block(x), expected)


def test_a_block_compiles_without_a_graph_break() -> None:
    torch.compiler.reset()
    block, x = Block(), tokens(7, HIDDEN)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(each(x).sum(), [x, *block.parameters()]) for each in (compiled, block)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_normalised", [True, False])
def test_experts_are_those_of_qwen2_moe_and_take_its_state(is_normalised: bool) -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
    config = modeling.Qwen2MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        shared_expert_intermediate_size=8,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=K,
        norm_topk_prob=is_normalised,
    )
    torch.manual_seed(2)
    theirs = modeling.Qwen2MoeSparseMoeBlock(config)
    for each in theirs.parameters():
        nn.init.normal_(each, std=0.2)
    gate = TopKRouter(HIDDEN, num_experts=NUM_EXPERTS, k=K, normalise=is_normalised)
    experts = ExpertMLPs(HIDDEN, INTERMEDIATE, num_experts=NUM_EXPERTS)
    gate.load_state_dict(theirs.gate.state_dict())
    experts.load_state_dict(theirs.experts.state_dict())
    x = tokens(2, 9, HIDDEN)
    shared = theirs.shared_expert(x) * theirs.shared_expert_gate(x).sigmoid()
    routing = gate(x)
    found, expected = experts(x, routing.experts, routing.weights) + shared, theirs(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_experts_are_those_of_mixtral() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = modeling.MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=NUM_EXPERTS, num_experts_per_tok=K
    )
    torch.manual_seed(2)
    theirs = modeling.MixtralSparseMoeBlock(config).eval()
    for each in theirs.parameters():
        nn.init.normal_(each, std=0.2)
    block = Block()
    block.load_state_dict(theirs.state_dict())
    x = tokens(2, 9, HIDDEN)
    torch.testing.assert_close(block(x), theirs(x))


def test_balance_is_one_when_even_and_all_experts_when_one_gets_all() -> None:
    even = load_balancing_loss(torch.zeros(8, 4), torch.arange(16).view(8, 2) % 4)
    torch.testing.assert_close(even, torch.tensor(1.0))
    logits = torch.full((8, 4), -100.0)
    logits[:, 2] = 100.0
    torch.testing.assert_close(load_balancing_loss(logits, torch.full((8, 1), 2)), torch.tensor(4.0))


def test_balance_is_that_of_transformers_over_k() -> None:
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = tokens(30, NUM_EXPERTS)
    theirs = modeling.load_balancing_loss_func((logits,), NUM_EXPERTS, K)
    ours = load_balancing_loss(logits, logits.topk(K).indices) * K
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits))


def test_z_loss_is_the_mean_square_of_log_sums() -> None:
    logits = tokens(3, NUM_EXPERTS, dtype=torch.float64)
    torch.testing.assert_close(router_z_loss(logits), torch.log(logits.exp().sum(-1)).square().mean())
    assert torch.autograd.gradcheck(router_z_loss, logits)
    assert router_z_loss(logits.bfloat16()).dtype == torch.float32


def test_losses_without_tokens_are_zero() -> None:
    logits = torch.empty(0, 4)
    assert load_balancing_loss(logits, torch.empty(0, 2, dtype=torch.int64)) == 0.0
    assert router_z_loss(logits) == 0.0
