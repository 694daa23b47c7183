"""Calls of a block join, start by priority, and bring to the bit what single calls bring."""

import random
import threading

import pytest
import torch
import torch.distributed as dist
from hosts import message_of

import zcore.comm
from zcore.comm.calls.blocks import Block
from zcore.comm.calls.requests import DeferrableCollectives
from zcore.comm.memory.pages import own_pages
from zcore.core.errors import ConfigError, LayoutError, StateError
from zcore.core.torch_collectives import TorchCollectives

CPU = torch.device("cpu")
OPS = ["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]
SUMMED = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int16]
MOVED = [*SUMMED, torch.bool, torch.float8_e4m3fn]


def values(numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (numel,), generator=generator).to(dtype)


def call(group, request, *, label):
    """Make one call to a `Collectives`; what it returns, and where its result will be."""
    op, output, tensor, src = request
    if op == "all_reduce":
        return group.all_reduce(tensor, label=label), tensor
    if op == "broadcast":
        return group.broadcast(tensor, src=src, label=label), tensor
    return getattr(group, op)(output, tensor, label=label), output


def random_calls(group, seed, count):
    """Calls that are the same on every rank, with this rank's data: op, output, input, source."""
    common = random.Random(seed)
    for number in range(count):
        op, numel = common.choice(OPS), common.choice([0, 1, 7, 300, 2_000])
        dtype, src = common.choice(SUMMED if op in ("reduce_scatter", "all_reduce") else MOVED), common.randrange(2)
        whole, part = numel * group.size, numel
        sizes = {"all_gather": (whole, part), "reduce_scatter": (part, whole), "all_to_all": (whole, whole)}
        output_numel, input_numel = sizes.get(op, (part, part))
        yield op, torch.zeros(output_numel).to(dtype), values(input_numel, dtype, 100 * number + group.rank), src


def compare_with_single_calls(seed):
    single = TorchCollectives(dist.group.WORLD, name="single")
    expected = []
    for request in random_calls(single, seed, 60):
        pending, result = call(single, request, label="x")
        pending.wait()
        expected.append(result)
    found = []
    for group in (zcore.comm.collectives_of(), TorchCollectives(dist.new_group(), name="gloo")):
        group.traffic.clear()
        with zcore.comm.coalescing(group, budget_bytes=10_000) as block:
            results = [
                call(block, request, label=f"call {number}")
                for number, request in enumerate(random_calls(group, seed, 60))
            ]
            none_before_the_end = not group.traffic.calls
        own = random.Random(group.rank)
        for pending, _ in own.sample(results, len(results)):  # every rank waits in an order of its own
            pending.wait()
        wrong = [
            number
            for number, ((_, result), wanted) in enumerate(zip(results, expected, strict=True))
            if not torch.equal(result.view(torch.uint8), wanted.view(torch.uint8))
        ]
        found.append((none_before_the_end, group.traffic.calls.total() < 60, wrong))
    return found


@pytest.mark.parametrize(("world_size", "seed"), [(2, 0), (2, 1), (3, 2)])
def test_joined_calls_of_every_kind_bring_what_single_ones_bring(ranks, world_size, seed):
    assert ranks(world_size, compare_with_single_calls, seed) == [[(True, True, [])] * 2] * world_size


def noted(group, starts):
    """The group, with what starts on it noted."""

    def start(request):
        starts.append(request.label.split(" (")[0])
        return request.start_on(group)

    return DeferrableCollectives(group, start=start, flush=lambda: None)


def prioritize():
    starts = []
    group = noted(TorchCollectives(dist.group.WORLD, name="noted"), starts)
    small, large = torch.ones(10), torch.ones(100)
    with zcore.comm.coalescing(group, budget_bytes=120) as block:
        pending = [
            block.all_reduce(small.clone(), label="sum 0"),
            block.all_reduce(large, label="large sum"),
            block.all_reduce(small.clone(), label="sum 1"),
            block.broadcast(small.clone(), src=0, label="weights"),
            block.all_reduce(small.clone(), label="urgent sum", priority=-1),
            block.all_reduce(small.clone(), label="sum 2"),
        ]
    for each in pending:
        each.wait()
    return starts


def test_calls_start_by_priority_and_large_ones_alone(ranks):
    # By priority: urgent sum, weights, sum 0, large sum, sum 1, sum 2. Three of 40 bytes fit into 120.
    assert ranks(2, prioritize) == [["urgent sum and 2 more", "weights", "large sum", "sum 2"]] * 2


def misuse_a_block():
    tensor, apart = torch.ones(8), torch.ones(4)
    messages = {}
    with zcore.comm.coalescing() as block:
        work = zcore.comm.all_reduce(tensor, async_op=True, label="grads")
        messages["wait inside"] = message_of(work.wait)
        messages["barrier inside"] = message_of(zcore.comm.barrier)
    work.wait()
    kept = []
    try:
        with zcore.comm.coalescing():
            kept.append(zcore.comm.all_reduce(tensor, async_op=True, label="never started"))
            raise KeyError
    except KeyError:
        messages["abandoned"] = message_of(kept[0].wait)

    def overlap():
        with zcore.comm.coalescing():
            zcore.comm.all_reduce(tensor[:5], async_op=True, label="first")
            zcore.comm.broadcast(tensor[4:], src=0, async_op=True, label="second")

    def read_what_is_written():
        with zcore.comm.coalescing():
            zcore.comm.all_gather(torch.empty(8), apart, async_op=True, label="first")
            zcore.comm.all_reduce(apart, async_op=True, label="second")

    messages["overlap"] = message_of(overlap)
    messages["read"] = message_of(read_what_is_written)
    with zcore.comm.coalescing():  # two may read the same
        zcore.comm.all_gather(torch.empty(8), apart)
        zcore.comm.all_gather(torch.empty(8), apart)
    after = block.all_reduce(tensor, label="after its block")  # starts at once
    after.wait()
    return messages, tensor[0].item()


def test_misuse_is_refused_by_name_and_leaves_the_group_in_order(ranks):
    words = {
        "wait inside": (StateError, "all_reduce grads cannot be waited for: it starts when its block"),
        "barrier inside": (StateError, "barrier of default_pg: calls of a block of `coalescing` start at its end"),
        "abandoned": (StateError, "all_reduce never started cannot be waited for: its block was left by an exception"),
        "overlap": (LayoutError, "all_reduce first and broadcast second use the same memory"),
        "read": (LayoutError, "use the same memory, and one of them writes it"),
    }
    for messages, after in ranks(2, misuse_a_block):
        for kind, (error, text) in words.items():
            assert messages[kind].startswith(error.__name__), (kind, messages[kind])
            assert text in messages[kind], (kind, messages[kind])
        assert after == 4.0


def nest_and_finish_at_the_end():
    world = zcore.comm.collectives_of()
    other = dist.new_group()
    zcore.comm.collectives_of(other)
    world.traffic.clear()
    first, second, third, elsewhere = (torch.ones(3) for _ in range(4))
    with zcore.comm.coalescing():
        zcore.comm.all_reduce(first, op=dist.ReduceOp.AVG)
        zcore.comm.all_reduce(elsewhere, group=other)  # not this block's: at once
        at_once = elsewhere.tolist()
        with zcore.comm.coalescing():
            zcore.comm.all_reduce(second)
        inner = second.tolist()
        zcore.comm.all_reduce(third)
        before = first.tolist(), third.tolist()
    return at_once, inner, before, first.tolist(), third.tolist(), world.traffic.calls["all_reduce"]


def test_calls_without_async_op_are_done_when_their_block_ends(ranks):
    ones, twos = [1.0] * 3, [2.0] * 3
    assert ranks(2, nest_and_finish_at_the_end) == [(twos, twos, (ones, ones), ones, twos, 2)] * 2


def fail_together():
    tensors = [torch.ones(3 if dist.get_rank() else 4) for _ in range(2)]
    with zcore.comm.coalescing() as block:
        pending = [block.all_reduce(tensor, label="grads") for tensor in tensors]
    return [message_of(each.wait) for each in pending]


def test_calls_that_went_out_as_one_fail_as_one(ranks):
    for first, second in ranks(2, fail_together):
        assert first == second
        assert first.startswith("MismatchError")
        assert "grads and 1 more" in first


class Alone:
    """A group of one rank, which has the results of its calls when they start."""

    rank, size = 0, 1

    def empty(self, numel, *, dtype, device):
        return torch.empty(numel, dtype=dtype, device=device)

    def all_reduce(self, tensor, *, label):
        return Done()


class Done:
    def wait(self):
        """It is there."""


def wait_in_threads(monkeypatch, *, failure=None):
    """What each of several threads that wait for joined calls found, all of which wait while the first one unpacks."""
    is_at_it, may_end, found, begun = threading.Event(), threading.Event(), [], []
    unpack = torch.split_with_sizes_copy

    def unpack_when_told(*args, **kwargs):
        begun.append(True)
        is_at_it.set()
        assert may_end.wait(10)
        if failure is not None:
            raise failure
        unpack(*args, **kwargs)

    tensors = [torch.full((3,), 1.0), torch.full((4,), 2.0)]
    with zcore.comm.coalescing(Alone()) as block:
        pending = [block.all_reduce(tensor, label="grads") for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()  # what was packed comes back
    monkeypatch.setattr(torch, "split_with_sizes_copy", unpack_when_told)

    def wait(index):
        try:
            pending[index].wait()
            found.append([tensor.unique().tolist() for tensor in tensors])
        except RuntimeError as error:
            found.append(error)

    threads = [threading.Thread(target=wait, args=(index,)) for index in (0, 1, 0)]
    threads[0].start()
    assert is_at_it.wait(10)
    for thread in threads[1:]:
        thread.start()
    for thread in threads[1:]:
        thread.join(0.05)  # none is to return
    assert (found, begun) == ([], [True])
    may_end.set()
    for thread in threads:
        thread.join()
    wait(1)
    return found


def test_threads_that_wait_for_calls_that_went_out_as_one_all_return_with_the_results_in_place(monkeypatch):
    assert wait_in_threads(monkeypatch) == [[[1.0], [2.0]]] * 4


def test_threads_that_wait_for_calls_that_went_out_as_one_all_meet_what_kept_the_results_from_their_place(monkeypatch):
    failure = RuntimeError("out of memory")
    assert wait_in_threads(monkeypatch, failure=failure) == [failure] * 4


def join_other_contents(label):
    """Two sums of 3 elements together on each rank, in opposite orders."""
    one, two = torch.full((1,), 1.0), torch.full((2,), 10.0)
    with zcore.comm.coalescing() as block:
        pending = [block.all_reduce(each, label=label) for each in ((one, two), (two, one))[dist.get_rank()]]
    return message_of(lambda: [each.wait() for each in pending])


@pytest.mark.parametrize("label", ["grads", "g" * 50, "\u0436" * 50], ids=lambda label: f"{len(label.encode())} bytes")
def test_joined_calls_of_other_contents_and_equal_totals_are_told_apart(ranks, label):
    for message in ranks(2, join_other_contents, label):
        assert message.startswith("MismatchError"), message


def gather_into_freed_buffers():
    group = zcore.comm.collectives_of()
    buffers = [group.empty(200, dtype=torch.float32, device=CPU) for _ in range(2)]
    for buffer in buffers:
        group.free_storage(buffer)
    with zcore.comm.coalescing() as block:
        own = torch.full((100,), float(group.rank))
        pending = [block.all_gather(buffer, own, label="weights") for buffer in buffers]
    for each in pending:
        each.wait()
    together = [own_pages().find(buffer) is None for buffer in buffers]
    return [buffer[[0, 199]].tolist() for buffer in buffers], together


def test_gathers_into_freed_buffers_go_alone_and_make_memory_that_ranks_hold_together(ranks):
    assert ranks(2, gather_into_freed_buffers) == [([[0.0, 1.0]] * 2, [True, True])] * 2


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="budget of joined calls is 0 bytes"):
        Block(None, budget_bytes=0)
