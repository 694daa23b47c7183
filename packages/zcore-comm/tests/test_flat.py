"""The functions for plain torch: torch's results, zcore's sums, and bad arguments refused before anything is sent."""

import gc
import re
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hosts import message_of, move_to_hosts_of

import zcore.comm
from zcore.comm.calls.served import current_device
from zcore.comm.memory.pages import own_pages
from zcore.core import compat
from zcore.core.collectives import tree_sum
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.core.torch_collectives import TorchCollectives

NUMELS = [0, 1, 7, 123, 20_001]
SUMMED = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int16, torch.complex64]
MOVED = [*SUMMED, torch.bool, torch.uint8, torch.float8_e4m3fn]
KNOWN_TO_GLOO = {torch.float32, torch.float64, torch.int64}


def values(numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(numel, generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (numel,), generator=generator).to(dtype)


def total_of(parts):
    total = torch.empty_like(parts[0])
    tree_sum(parts, out=total)
    return total


def bits(tensor):
    return tensor.view(torch.uint8)


def differences_to_one_process():
    """What is not, to the bit, what one process computes from every rank's data."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wrong = []
    for numel in NUMELS:
        for dtype in MOVED:
            wholes = [values(numel * size, dtype, seed=each) for each in range(size)]
            parts = [values(numel, dtype, seed=100 + each) for each in range(size)]
            whole, part = wholes[rank].clone(), parts[rank].clone()
            slot = slice(rank * numel, (rank + 1) * numel)
            pairs = {}
            gathered = torch.empty_like(whole)
            zcore.comm.all_gather(gathered, part)
            pairs["all_gather"] = gathered, torch.cat(parts)
            exchanged = torch.empty_like(whole)
            zcore.comm.all_to_all(exchanged, whole)
            pairs["all_to_all"] = exchanged, torch.cat([each[slot] for each in wholes])
            sent = part.clone()
            zcore.comm.broadcast(sent, size - 1)
            pairs["broadcast"] = sent, parts[-1]
            if dtype in SUMMED:
                scattered, reduced = torch.empty_like(part), whole.clone()
                zcore.comm.reduce_scatter(scattered, whole)
                zcore.comm.all_reduce(reduced)
                total = total_of(wholes)
                pairs["reduce_scatter"] = scattered, total[slot]
                pairs["all_reduce"] = reduced, total
            if dtype.is_floating_point and dtype in SUMMED:
                mean, mean_part = whole.clone(), torch.empty_like(part)
                zcore.comm.all_reduce(mean, dist.ReduceOp.AVG)
                zcore.comm.reduce_scatter(mean_part, whole, op=dist.ReduceOp.AVG)
                pairs["mean"] = mean, total / size
                pairs["mean of a part"] = mean_part, total[slot] / size
            wrong += [
                (op, numel, dtype)
                for op, (found, expected) in pairs.items()
                if not torch.equal(*map(bits, (found, expected)))
            ]
    return wrong


@pytest.mark.parametrize("world_size", [2, 3])
def test_results_are_those_of_one_process_to_the_bit(ranks, world_size):
    assert ranks(world_size, differences_to_one_process) == [[]] * world_size


def differences_to_torch():
    rank, size = dist.get_rank(), dist.get_world_size()
    wrong = []
    for shape in [(), (1,), (7, 3), (2, 0)]:
        for dtype in KNOWN_TO_GLOO:
            tensor = values(torch.Size(shape).numel(), dtype, seed=rank).view(shape)
            whole = values(size * tensor.numel(), dtype, seed=10 + rank).view(size, *shape)
            calls = {
                "all_gather": (zcore.comm.all_gather, compat.all_gather_flat, whole, tensor),
                "reduce_scatter": (zcore.comm.reduce_scatter, compat.reduce_scatter_flat, tensor, whole),
                "all_to_all": (zcore.comm.all_to_all, compat.all_to_all_flat, whole, whole),
            }
            for op, (ours, torchs, like, sent) in calls.items():
                if not sent.numel():
                    continue  # gloo refuses some of nothing
                found, expected = torch.empty_like(like), torch.empty_like(like)
                assert ours(found, sent, group=None, async_op=True).wait() is True
                torchs(expected.view(-1), sent.view(-1), group=dist.group.WORLD).wait()
                if not torch.equal(found, expected):
                    wrong.append((op, shape, dtype))
            for ours, torchs, arguments in (
                (zcore.comm.all_reduce, dist.all_reduce, {}),
                (zcore.comm.broadcast, dist.broadcast, {"src": 1}),
                (zcore.comm.broadcast, dist.broadcast, {"group_src": 0}),
            ):
                found, expected = tensor.clone(), tensor.clone()
                assert ours(found, **arguments) is None
                torchs(expected, **arguments)
                if not torch.equal(found, expected):
                    wrong.append((ours.__name__, shape, dtype))
    return wrong


def test_at_two_ranks_results_are_torchs(ranks):
    assert ranks(2, differences_to_torch) == [[]] * 2


def work_in_groups():
    rank = dist.get_rank()
    pair, single = dist.new_group([2, 1]), dist.new_group([0])
    tensor = torch.full((5,), float(rank))
    if rank == 0:
        refusals = [message_of(lambda: zcore.comm.all_reduce(tensor, group=pair))]
        zcore.comm.all_reduce(tensor, group=single)
        zcore.comm.broadcast(tensor, 0, single)
        gathered = torch.empty(5)
        zcore.comm.all_gather(gathered, tensor, single)
        zcore.comm.all_to_all(gathered, tensor.clone(), group=single)
        zcore.comm.barrier(single)
        return refusals, tensor.tolist(), gathered.tolist()
    zcore.comm.broadcast(tensor, 2, pair)
    gathered = torch.empty(2)
    zcore.comm.all_gather(gathered, torch.tensor([float(rank)]), pair)
    refusals = [
        message_of(lambda: zcore.comm.broadcast(tensor, 0, pair)),
        message_of(lambda: zcore.comm.broadcast(tensor, group=pair, group_src=2)),
    ]
    by_group_rank = torch.full((5,), float(rank))
    zcore.comm.broadcast(by_group_rank, group=pair, group_src=0)
    zcore.comm.barrier(group=pair)
    return refusals, [*tensor.tolist(), *by_group_rank.tolist()], gathered.tolist()


def test_groups_know_a_source_by_its_global_rank_or_by_its_rank_in_the_group(ranks):
    first, *others = ranks(3, work_in_groups)
    assert first[1:] == ([0.0] * 5, [0.0] * 5)
    assert "Rank 0 is not part of this group" in first[0][0]
    for refusals, tensor, gathered in others:
        assert (tensor, gathered) == ([2.0] * 5 + [1.0] * 5, [1.0, 2.0])  # torch sorts the ranks of a group
        assert "src is 0; expected one of the group's global ranks" in refusals[0]
        assert "group_src is 2; expected one of the group's global ranks" in refusals[1]


ones = torch.ones
comm = zcore.comm
REFUSED = {
    "list": (
        lambda: comm.all_gather([ones(2), ones(2)], ones(2)),
        ConfigError,
        "all_gather of default_pg: output is a list; expected one tensor",
    ),
    "strided": (
        lambda: comm.all_reduce(ones(4, 4)[:, :2]),
        LayoutError,
        "tensor has shape (4, 2) and strides (4, 1); expected contiguous memory. Pass tensor.contiguous()",
    ),
    "sparse": (
        lambda: comm.all_reduce(ones(2, 2).to_sparse()),
        LayoutError,
        "tensor has shape (2, 2) and torch.sparse_coo; expected contiguous memory. Pass tensor.to_dense()",
    ),
    "device": (
        lambda: comm.all_reduce(torch.empty(2, device="meta")),
        ConfigError,
        "tensor is on meta; the group moves tensors on cpu",
    ),
    "dtypes": (
        lambda: comm.all_gather(ones(4).double(), ones(2)),
        ConfigError,
        "output has dtype torch.float64 and input torch.float32; expected the same",
    ),
    "sizes of all_gather": (
        lambda: comm.all_gather(ones(5), ones(2)),
        LayoutError,
        "output has 5 elements and input 2; expected output to have 2 times as many",
    ),
    "sizes of reduce_scatter": (
        lambda: comm.reduce_scatter(ones(2), ones(5)),
        LayoutError,
        "input has 5 elements and output 2; expected input to have 2 times as many",
    ),
    "sizes of all_to_all": (
        lambda: comm.all_to_all(ones(3), ones(3)),
        LayoutError,
        "output has 3 elements and input 3; expected as many in both, a multiple of the group's 2 ranks",
    ),
    "splits": (
        lambda: comm.all_to_all(ones(4), ones(4), [1, 3], [3, 1]),
        LayoutError,
        "split sizes [1, 3] and [3, 1] were given; expected None for both",
    ),
    "overlap": (
        lambda: comm.all_to_all(*[ones(4)] * 2),
        LayoutError,
        "output and input overlap; expected memory apart",
    ),
    "op": (
        lambda: comm.all_reduce(ones(2), dist.ReduceOp.MAX),
        ConfigError,
        "op is MAX; expected ReduceOp.SUM or ReduceOp.AVG",
    ),
    "group as op": (
        lambda: comm.reduce_scatter(ones(2), ones(4), dist.group.WORLD),
        ConfigError,
        "expected ReduceOp.SUM or ReduceOp.AVG",
    ),
    "a name as op": (
        lambda: comm.all_reduce(ones(2), op="sum"),
        ConfigError,
        "op is 'sum'; expected ReduceOp.SUM or ReduceOp.AVG",
    ),
    "a number as label": (
        lambda: comm.broadcast(ones(2), 0, label=7),
        ConfigError,
        "broadcast of default_pg: label is 7; expected a string, the same on every rank",
    ),
    "no label for a barrier": (
        lambda: comm.barrier(label=None),
        ConfigError,
        "label is None; expected a string",
    ),
    "a word as priority": (
        lambda: comm.all_gather(ones(4), ones(2), priority="high"),
        ConfigError,
        "priority is 'high'; expected an integer, lower ones first, or None",
    ),
    "a fraction as priority": (
        lambda: comm.all_to_all(ones(4), ones(4), priority=0.5),
        ConfigError,
        "priority is 0.5; expected an integer",
    ),
    "bool": (
        lambda: comm.all_reduce(ones(2).bool()),
        ConfigError,
        "sums of torch.bool are not defined",
    ),
    "8-bit floats": (
        lambda: comm.all_reduce(ones(2).to(torch.float8_e5m2)),
        ConfigError,
        "sums of torch.float8_e5m2 are not defined",
    ),
    "a name as dtype": (
        lambda: comm.empty(3, "float32"),
        ConfigError,
        "empty: dtype is 'float32'; expected a dtype of torch, torch.float32.",
    ),
    "no dtype": (
        lambda: comm.empty(3, float),
        ConfigError,
        "empty: dtype is <class 'float'>; expected a dtype of torch, such as torch.float32.",
    ),
    "mean of integers": (
        lambda: comm.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.AVG),
        ConfigError,
        "a mean of torch.int64 is no torch.int64",
    ),
    "no source": (
        lambda: comm.broadcast(ones(2)),
        ConfigError,
        "src is None and group_src None; expected one of them",
    ),
    "two sources": (
        lambda: comm.broadcast(ones(2), 0, group_src=0),
        ConfigError,
        "src is 0 and group_src 0; expected one of them",
    ),
    "source outside": (
        lambda: comm.broadcast(ones(2), 2),
        ConfigError,
        "src is 2; expected one of the group's global ranks [0, 1], or as group_src 0 to 1",
    ),
    "a string as source": (
        lambda: comm.broadcast(ones(2), src="0"),
        ConfigError,
        "src is '0'; expected one of the group's global ranks [0, 1], or as group_src 0 to 1",
    ),
    "a string as source in the group": (
        lambda: comm.broadcast(ones(2), group_src="0"),
        ConfigError,
        "group_src is '0'; expected one of the group's global ranks [0, 1], or as group_src 0 to 1",
    ),
    "negative size": (
        lambda: comm.empty(-1, torch.float32),
        ConfigError,
        "empty: a buffer of -1 elements was asked for; expected one number, 0 or more",
    ),
    "shape for a size": (
        lambda: comm.empty((2, 3), torch.float32),
        ConfigError,
        "empty: a buffer of (2, 3) elements was asked for; expected one number",
    ),
    "a fraction for a size": (
        lambda: comm.empty(torch.tensor(2.5), torch.float32),
        ConfigError,
        "empty: a buffer of tensor(2.5000) elements was asked for; expected one number",
    ),
    "a name as group": (
        lambda: comm.all_reduce(ones(2), group="dp"),
        ConfigError,
        "The group is a str; expected a process group of torch, or None",
    ),
    "device of a buffer": (
        lambda: comm.empty(1, torch.float32, device="meta"),
        ConfigError,
        "empty: device is meta; the group moves tensors on cpu",
    ),
}


class Eight(int):
    """A number of 8 bits, as NumPy's, whose products overflow."""

    def __mul__(self, other):
        return Eight((int(self) * int(other) + 128) % 256 - 128)

    __rmul__ = __mul__


def make_buffers():
    numels = [Eight(100), torch.tensor(100), True]
    return [comm.empty(numel, torch.float32).untyped_storage().nbytes() for numel in numels]


def test_a_size_may_be_of_any_type_that_counts(ranks):
    assert ranks(2, make_buffers) == [[400, 400, 4]] * 2


def test_a_device_without_a_number_is_the_current_one_of_its_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [current_device("cuda"), current_device("cpu")] == [torch.device("cuda", 3), torch.device("cpu")]


def refuse():
    """Each on rank 0 alone: nothing of it was sent, or rank 1's next call would not match."""
    comm.barrier()
    messages = {}
    for kind, (act, _, _) in REFUSED.items():
        if dist.get_rank() == 0:
            messages[kind] = message_of(act)
        comm.barrier()
    return messages, dict(comm.collectives_of().traffic.calls)


def test_bad_arguments_are_refused_by_name_before_anything_is_sent(ranks):
    (messages, calls), _ = ranks(2, refuse)
    for kind, (_, error, text) in REFUSED.items():
        assert messages[kind].startswith(error.__name__), (kind, messages[kind])
        assert text in messages[kind], (kind, messages[kind])
    assert calls == {"all_reduce": len(REFUSED) + 1}  # the barriers


def sum_on_one_rank_and_average_on_the_other(act):
    op = dist.ReduceOp.AVG if dist.get_rank() else dist.ReduceOp.SUM
    part, whole = ones(2), ones(4)
    return message_of(
        lambda: comm.all_reduce(part, op) if act == "all_reduce" else comm.reduce_scatter(part, whole, op)
    )


@pytest.mark.parametrize("act", ["all_reduce", "reduce_scatter"])
def test_a_sum_here_and_a_mean_there_are_told_apart_with_where_they_are_called(ranks, act):
    here = r"at test_flat\.py:\d+"
    for rank, message in enumerate(ranks(2, sum_on_one_rank_and_average_on_the_other, act)):
        mean, total = rf"{act} mean of unnamed \([^)]*\) on rank 1", rf"{act} unnamed \([^)]*\) on rank 0"
        assert re.match(r"MismatchError: ", message)
        assert re.search(mean, message) and re.search(total, message), message
        assert re.search(rf"on rank {rank}, {here}", message), message


def use_tensors_as_users_do():
    rank = dist.get_rank()
    weight = torch.nn.Parameter(torch.full((2, 3), float(rank)))  # a leaf: what is outside of autograd moves
    comm.broadcast(weight, 1)
    buffer = comm.empty(4, torch.float32)
    own = buffer[2 * rank : 2 * rank + 2].fill_(rank)
    comm.all_gather(buffer, own)  # in place
    gathered = buffer.tolist()
    comm.reduce_scatter(own, buffer)
    works = [comm.all_reduce(torch.ones(1), async_op=True) for _ in range(3)]
    waited = [work.wait() for work in [*works, *works]]
    is_born_there = own_pages().find(buffer) is not None
    odd = comm.empty(0, torch.bool), comm.empty(3, torch.bfloat16)
    shapes = [(tuple(each.shape), each.dtype, each.device.type) for each in odd]
    return weight.tolist(), weight.requires_grad, gathered, own.tolist(), waited, is_born_there, shapes


def test_parameters_own_slots_and_buffers_of_the_group_serve(ranks):
    for rank, found in enumerate(ranks(2, use_tensors_as_users_do)):
        assert found == (
            [[1.0] * 3] * 2,
            True,
            [0.0, 0.0, 1.0, 1.0],
            [2.0 * rank] * 2,
            [True] * 6,
            True,
            [((0,), torch.bool, "cpu"), ((3,), torch.bfloat16, "cpu")],
        )


def move_under_another_default_device(kind):
    move_to_hosts_of(kind)
    with torch.device("meta"):
        buffer = comm.empty(4, torch.float32)
        one, all_ranks, nothing = (torch.ones(numel, device="cpu") for numel in (2, 4, 0))
        comm.all_gather(buffer, one)
        comm.all_gather(nothing, nothing.clone())
        comm.all_reduce(comm.empty(0, torch.float32))
        comm.all_reduce(all_ranks)
        comm.barrier()
        at_end = comm.empty(3, torch.float32).fill_(dist.get_rank())
        comm.broadcast(at_end, 1)
    return buffer.tolist(), all_ranks.tolist(), nothing.device.type, at_end.tolist()


@pytest.mark.parametrize("kind", ["shared memory", "pairwise"])
def test_whatever_the_default_device_is_what_the_group_moves_serves(ranks, kind):
    expected = [1.0] * 4, [2.0] * 4, "cpu", [1.0] * 3
    assert ranks(2, move_under_another_default_device, kind) == [expected] * 2


def forget_groups():
    is_same = comm.collectives_of() is comm.collectives_of(dist.group.WORLD)
    group = dist.new_group()
    comm.all_reduce(torch.ones(1), group=group)
    gone = weakref.ref(group)
    dist.destroy_process_group(group)
    message = message_of(partial(comm.all_reduce, torch.ones(1), group=group))
    del group
    for _ in range(2):  # by the second the other rank has read the last of the group's data, and that may go, too
        comm.barrier()
    gc.collect()
    return is_same, message, gone() is None


def test_a_group_is_served_by_the_same_object_until_it_is_destroyed_and_then_let_go(ranks):
    for is_same, message, is_gone in ranks(2, forget_groups):
        assert (is_same, is_gone) == (True, True)
        assert message.startswith(f"{StateError.__name__}: This process group was destroyed")


def name_backends(backend):
    dist.init_process_group(backend)
    total = torch.ones(3, dtype=torch.int16)  # gloo's own sums know no such numbers
    comm.all_reduce(total)
    core = TorchCollectives(dist.group.WORLD, name="core")
    core.reduce_scatter(total[:1], torch.ones(2, dtype=torch.int16), label="x").wait()
    group = comm.collectives_of().inner
    return total.tolist(), group.algorithm_for("all_reduce", 6), comm.empty(1, torch.float32).device.type


@pytest.mark.parametrize("backend", [None, "cpu:gloo", "cpu:gloo,cuda:gloo"])
def test_a_group_with_a_backend_for_each_device_is_served_by_that_of_the_one_computed_on(ranks, backend):
    assert ranks(2, name_backends, backend, init_process_group=False) == [([2] * 3, "shared memory", "cpu")] * 2


def test_without_a_process_group_the_message_says_what_to_call():
    for act in (lambda: comm.empty(1, torch.float32), lambda: comm.all_reduce(ones(1)), comm.barrier):
        with pytest.raises(StateError, match=r"there is none yet. Call torch.distributed.init_process_group"):
            act()


def test_every_name_of_the_package_is_there_and_others_are_refused():
    assert set(dir(zcore.comm)) >= set(zcore.comm.__all__)
    for name in zcore.comm.__all__:
        assert callable(getattr(zcore.comm, name))
    with pytest.raises(AttributeError, match="has no attribute 'scatter'; it offers all_gather"):
        assert zcore.comm.scatter
