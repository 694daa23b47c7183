"""DistributedDataParallel trains with the hook as without it: bit-equal at two ranks, near at three."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import zcore.comm
from zcore.comm.memory.pages import own_pages
from zcore.core.testing import RankFailed

WIDTH = 123


class Branches(torch.nn.Module):
    """Three layers in two dtypes, of which the steps use changing ones."""

    def __init__(self, *, dtype=torch.float32, odd_width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.second = torch.nn.Linear(WIDTH, odd_width, dtype=dtype)
        self.third = torch.nn.Linear(WIDTH, odd_width, dtype=dtype)

    def forward(self, x, uses_third):
        hidden = self.first(x).to(self.second.weight.dtype)
        return (self.third if uses_third else self.second)(hidden) + (0 if uses_third else self.third(hidden))


def train(model, *, group, accumulate=1, changes_branch=False):
    rank, losses = dist.get_rank(group), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        for micro_step in range(accumulate):
            x = torch.randn(5, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
            model.require_backward_grad_sync = micro_step == accumulate - 1  # what `no_sync` sets
            loss = model(x, changes_branch and step % 2 == 1).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def both_ways(options, dtype, training):
    group = dist.group.WORLD
    results = []
    for is_hooked in (False, True):
        model = DistributedDataParallel(Branches(dtype=dtype), bucket_cap_mb=0.1, **options)
        if is_hooked:
            model.register_comm_hook(None, zcore.comm.ddp_hook)
        results.append(train(model, group=group, **training))
    (losses, expected), (hooked_losses, found) = results
    num_calls = zcore.comm.collectives_of().traffic.calls["all_reduce"]
    return losses == hooked_losses, all(map(torch.equal, expected, found)), num_calls


@pytest.mark.parametrize(
    ("options", "dtype", "training"),
    [
        ({}, torch.float32, {}),
        ({"gradient_as_bucket_view": True}, torch.bfloat16, {"accumulate": 2}),
        ({"find_unused_parameters": True}, torch.float32, {"changes_branch": True}),
        ({"static_graph": True}, torch.float32, {}),
        ({"static_graph": True, "gradient_as_bucket_view": True}, torch.bfloat16, {}),
    ],
    ids=["plain", "views and accumulation", "unused parameters", "static graph", "static graph and views"],
)
def test_training_with_the_hook_is_bit_equal_at_two_ranks(ranks, options, dtype, training):
    for same_losses, same_parameters, num_calls in ranks(2, both_ways, options, dtype, training):
        assert (same_losses, same_parameters) == (True, True)
        assert num_calls >= 4 * 2  # of two buckets at least: there are two dtypes


def mean_of_three():
    rank = dist.get_rank()
    model = DistributedDataParallel(torch.nn.Linear(5, 3), bucket_cap_mb=1)  # 18 gradients, and 7
    odd = DistributedDataParallel(torch.nn.Linear(6, 1), bucket_cap_mb=1)
    for each in (model, odd):
        each.register_comm_hook(dist.group.WORLD, zcore.comm.ddp_hook)
    x = torch.full((1, 5), float(rank)), torch.full((1, 6), float(rank))
    (model(x[0]).sum() + odd(x[1]).sum()).backward()  # two models in one backward
    return [p.grad.flatten()[0].item() for each in (model, odd) for p in each.parameters()], dict(
        zcore.comm.collectives_of().traffic.calls
    )


def test_three_ranks_and_two_models_in_one_backward_get_the_mean(ranks):
    assert ranks(3, mean_of_three) == [([1.0] * 4, {"all_reduce": 2})] * 3


def where_gradients_lie():
    model = DistributedDataParallel(torch.nn.Linear(50, 50), gradient_as_bucket_view=True)
    model.register_comm_hook(None, zcore.comm.ddp_hook)
    places = []
    for _ in range(3):
        model.zero_grad(set_to_none=False)
        model(torch.ones(1, 50)).sum().backward()
        places.append([own_pages().find(p.grad) is not None for p in model.parameters()])
    return places


def test_gradients_come_to_lie_in_memory_of_the_group(ranks):
    assert ranks(2, where_gradients_lie) == [[[True, True]] * 3] * 2


def train_where_torch_sums():
    single = [dist.new_group([each]) for each in range(dist.get_world_size())][dist.get_rank()]
    model = DistributedDataParallel(torch.nn.Linear(4, 4), process_group=single)
    model.register_comm_hook(single, zcore.comm.ddp_hook)
    model(torch.ones(1, 4)).sum().backward()
    return model.module.weight.grad.tolist(), dict(zcore.comm.collectives_of(single).traffic.calls)


def test_where_ranks_share_no_memory_torch_sums(ranks):
    assert ranks(2, train_where_torch_sums) == [([[1.0] * 4] * 4, {})] * 2


def leave_in_the_backward():
    model = DistributedDataParallel(torch.nn.Linear(4, 4))
    model.register_comm_hook(None, zcore.comm.ddp_hook)
    zcore.comm.barrier()
    if dist.get_rank() == 1:
        raise KeyError("bad batch")
    model(torch.ones(1, 4)).sum().backward()


def test_a_rank_that_leaves_ends_the_backward_of_the_others_with_its_name(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, leave_in_the_backward)
    (failure,) = [each for each in caught.value.failures if each.rank == 0]
    assert failure.type_name == "CollectiveError"
    assert "all_reduce gradients.0" in failure.message
