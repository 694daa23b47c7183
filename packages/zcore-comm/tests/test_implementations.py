"""Every implementation gives, bit for bit, what one process makes of all ranks' data, summed in the documented order.

So do the core's collectives over gloo, with which it shares code.

Ranks with different ZCORE_COMM_HOST count as ranks of different hosts, so one machine has all of them.
"""

import contextlib
import gc
import itertools
import os
import random
import re
import resource
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.distributed as dist
from hosts import message_of, move_to_hosts_of
from hypothesis import strategies as st

from zcore.comm.choice import serve
from zcore.comm.hierarchical import HierarchicalCollectives
from zcore.comm.memory.pages import available_bytes, own_pages
from zcore.comm.memory.shared_memory import SMALL_BYTES, SharedMemoryCollectives
from zcore.comm.pairs.algorithms import ALGORITHMS, Rule, Table
from zcore.comm.pairs.pairwise import PairwiseCollectives
from zcore.core import compat
from zcore.core.errors import LayoutError, MismatchError, StateError
from zcore.core.exchange import PIECE_BYTES, WINDOW_PIECES
from zcore.core.torch_collectives import TorchCollectives

CPU = torch.device("cpu")
NUMELS = [0, 1, 7, SMALL_BYTES // 4, 20_001]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SUMMED = [*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
MOVED = [*SUMMED, torch.bool, torch.float8_e4m3fn]


KINDS = {
    "shared memory": SharedMemoryCollectives,
    "pairwise": PairwiseCollectives,
    "two levels": HierarchicalCollectives,
}


def both(kind="shared memory"):
    move_to_hosts_of(kind)
    served = serve(dist.group.WORLD, name="served")
    assert isinstance(served, KINDS[kind])
    return TorchCollectives(dist.group.WORLD, name="gloo"), served


def values(numel, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype is torch.bool else 100, (numel,), generator=generator).to(dtype)


def born(group, tensor):
    """A copy of `tensor` in a buffer of the group."""
    return group.empty(tensor.numel(), dtype=tensor.dtype, device=CPU).copy_(tensor)


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.numel() else tensor


def plain_sum(parts):
    """Neighbours first, then neighbours among their sums, and so on; who has none waits for the next round."""
    while len(parts) > 1:
        parts = [sum(parts[low + 1 : low + 2], parts[low]) for low in range(0, len(parts), 2)]
    return parts[0].clone()


def expected_of(rank, wholes, parts, *, is_summed):
    """What each collective makes of `wholes` and `parts`, by rank."""
    size, numel = len(parts), parts[0].numel()
    slot = slice(rank * numel, (rank + 1) * numel)
    moved = {
        "all_gather": torch.cat(parts),
        "all_to_all": torch.cat([whole[slot] for whole in wholes]),
        "broadcast": wholes[size - 1],
    }
    total = plain_sum(wholes) if is_summed else None
    return moved if total is None else {**moved, "reduce_scatter": total[slot], "all_reduce": total}


def differences(kind):
    """What is not equal to the bit: op, numel, dtype, whether tensors lie in memory of the group."""
    gloo, served = both(kind) if kind in KINDS else [TorchCollectives(dist.group.WORLD, name="gloo")] * 2
    rank, size = gloo.rank, gloo.size
    wrong = []
    for numel, dtype in itertools.product(NUMELS, MOVED):
        wholes = [values(numel * size, dtype, seed=each) for each in range(size)]
        parts = [values(numel, dtype, seed=100 + each) for each in range(size)]
        expected = expected_of(rank, wholes, parts, is_summed=dtype in SUMMED)
        for is_born in (False, True):
            take = (lambda tensor: born(served, tensor)) if is_born else torch.clone
            found = {"all_gather": take(torch.zeros_like(wholes[rank])), "all_to_all": take(wholes[rank])}
            served.all_gather(found["all_gather"], take(parts[rank]), label="x").wait()
            served.all_to_all(found["all_to_all"], take(wholes[rank]), label="x").wait()
            found["broadcast"] = take(wholes[rank])
            served.broadcast(found["broadcast"], src=size - 1, label="x").wait()
            if dtype in SUMMED:
                found["reduce_scatter"] = take(parts[rank])
                served.reduce_scatter(found["reduce_scatter"], take(wholes[rank]), label="x").wait()
                found["all_reduce"] = take(wholes[rank])
                served.all_reduce(found["all_reduce"], label="x").wait()
            wrong += [
                (op, numel, dtype, is_born) for op in expected if not torch.equal(bits(found[op]), bits(expected[op]))
            ]
    return wrong


each_kind = pytest.mark.parametrize("kind", list(KINDS))
SIZES = [
    *((kind, world_size) for kind in ("shared memory", "pairwise") for world_size in range(2, 9)),
    *(("two levels", world_size) for world_size in (4, 6, 8)),
    *(("gloo", world_size) for world_size in (2, 3, 4)),
]


@pytest.mark.parametrize(("kind", "world_size"), SIZES)
def test_every_collective_is_equal_to_that_of_one_process_to_the_bit(ranks, kind, world_size):
    assert ranks(world_size, differences, kind) == [[]] * world_size


def sum_many_pieces(kind):
    _, served = both(kind)
    numel = (WINDOW_PIECES + 2) * PIECE_BYTES // 4 + 7
    wholes = [values(numel * served.size, torch.float32, seed=each) for each in range(served.size)]
    total, part = wholes[served.rank].clone(), torch.empty(numel)
    served.reduce_scatter(part, wholes[served.rank], label="x").wait()
    served.all_reduce(total, label="x").wait()
    expected = plain_sum(wholes)
    return torch.equal(total, expected), torch.equal(part, expected.view(served.size, numel)[served.rank])


@pytest.mark.parametrize(("kind", "world_size"), [("pairwise", 3), ("two levels", 4)])
def test_sums_of_more_pieces_than_there_is_memory_for_are_right(ranks, kind, world_size):
    assert ranks(world_size, sum_many_pieces, kind) == [(True, True)] * world_size


def differences_in_plain_memory(kind):
    compat.CAN_SWAP_MEMORY = False  # as in torch before 2.13
    _, served = both(kind)
    buffer = served.empty(6 * served.size, dtype=torch.float32, device=CPU)
    served.free_storage(buffer)
    served.all_gather(buffer, torch.full((6,), float(served.rank)), label="freed").wait()
    served.own_storage(buffer)
    return buffer[::6].tolist(), differences(kind)


@pytest.mark.parametrize(("kind", "world_size"), [("shared memory", 2), ("two levels", 4)])
def test_torch_before_2_13_is_served_from_plain_memory(ranks, kind, world_size):
    expected = [float(rank) for rank in range(world_size)], []
    assert ranks(world_size, differences_in_plain_memory, kind) == [expected] * world_size


def in_place_and_cast(kind):
    gloo, shared = both(kind)
    rank, numel = shared.rank, 10_000
    own = values(numel, torch.float32, seed=rank)
    expected = torch.empty(numel * shared.size)
    gloo.all_gather(expected, own, label="x").wait()
    into_own_slot = born(shared, torch.zeros(numel * shared.size))
    slot = into_own_slot[rank * numel : (rank + 1) * numel].copy_(own)
    shared.all_gather(into_own_slot, slot, label="x").wait()
    half = shared.empty(numel * shared.size, dtype=torch.bfloat16, device=CPU)
    shared.all_gather(half, own, label="x").wait()
    summed = born(shared, expected)
    slot = summed[rank * numel : (rank + 1) * numel]
    shared.reduce_scatter(slot, summed, label="x").wait()
    return (
        torch.equal(into_own_slot, expected),
        torch.equal(half, expected.bfloat16()),
        torch.equal(slot, shared.size * expected[rank * numel : (rank + 1) * numel]),
    )


@each_kind
def test_slots_of_the_whole_may_be_the_part_and_a_gather_casts(ranks, kind):
    assert ranks(4, in_place_and_cast, kind) == [(True, True, True)] * 4


def hold_together():
    _, shared = both()
    rank, numel = shared.rank, 50_000
    buffer = shared.empty(numel * shared.size, dtype=torch.float32, device=CPU)
    view = buffer[5:11].view(2, 3)
    shared.free_storage(buffer)
    freed_bytes = view.untyped_storage().nbytes()
    shared.all_gather(buffer, torch.full((numel,), float(rank)), label="x").wait()
    gathered = buffer.view(shared.size, -1)[:, 0].tolist()
    barrier(shared)
    if rank == 1:
        view.fill_(7)  # nobody should; it shows that there is one memory
    barrier(shared)
    seen = view.mean().item()
    barrier(shared)
    shared.own_storage(buffer)
    if rank == 1:
        view.fill_(9)
    barrier(shared)
    seen_after = view.mean().item()
    held_bytes = shared._pages.held_bytes
    for _ in range(20):
        shared.free_storage(buffer)
        shared.all_gather(buffer, torch.full((numel,), float(rank)), label="x").wait()
    return freed_bytes, gathered, seen, seen_after, shared._pages.held_bytes - held_bytes


def barrier(group):
    group.all_reduce(torch.zeros(1), label="barrier").wait()


def test_ranks_hold_a_gathered_buffer_together_until_one_wants_its_own(ranks):
    first, second = ranks(2, hold_together)
    assert first[:4] == (0, [0.0, 1.0], 7.0, 7.0)
    assert second[:4] == (0, [0.0, 1.0], 7.0, 9.0)
    assert max(first[4], second[4]) <= 2 * 2 * 50_000 * 4  # a fresh one at most, not twenty


def many_calls(kind, count, seed):
    """Random calls, several under way, waited for in an order of each rank's own: wrong ones, and what is left."""
    _, shared = both(kind)
    rank, size = shared.rank, shared.size
    common, own = random.Random(seed), random.Random(1000 * seed + rank)
    wrong, under_way, before = [], [], None
    for number in range(count):
        op = common.choice(["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "together"])
        numel = common.choice([1, 5, 300, 9_000, 12_345])
        parts = [torch.full((numel * size,), float((number + 3 * each) % 17)) for each in range(size)]
        mine = born(shared, parts[rank]) if own.random() < 0.5 else parts[rank].clone()
        total = sum(parts[1:], parts[0])
        if op in ("all_gather", "together"):
            result = shared.empty(numel * size, dtype=torch.float32, device=CPU)
            if op == "together":
                shared.free_storage(result)
            expected = torch.cat([part[:numel] for part in parts])
            pending = shared.all_gather(result, mine[:numel], label=op)
        elif op == "reduce_scatter":
            result, expected = torch.empty(numel), total[:numel]
            pending = shared.reduce_scatter(result, mine, label=op)
        elif op == "all_reduce":
            result, expected = mine, total
            pending = shared.all_reduce(result, label=op)
        elif op == "all_to_all":
            result, expected = torch.empty(numel * size), torch.cat([part[:numel] for part in parts])
            pending = shared.all_to_all(result, mine, label=op)
        else:
            src = common.randrange(size)
            result, expected = mine, parts[src]
            pending = shared.broadcast(result, src=src, label=op)
        under_way.append((op, number, pending, result, expected))
        while len(under_way) > own.randrange(6):
            op, started, pending, result, expected = under_way.pop(own.randrange(len(under_way)))
            pending.wait()
            if not torch.equal(result, expected):
                wrong.append((op, started))
            del pending, result
        if number == count // 2:
            before = left_over(shared)
    for *_, pending, result, expected in under_way:
        pending.wait()
        assert torch.equal(result, expected)
    under_way.clear()
    after = left_over(shared)
    return wrong, [now - then for now, then in zip(after, before, strict=True)]


def left_over(shared):
    gc.collect()
    return (
        own_pages().held_bytes,
        len(list(Path("/proc/self/fd").iterdir())),
        threading.active_count(),
        len(gc.get_objects()),
    )


@pytest.mark.parametrize(
    ("kind", "world_size", "count"),
    [
        ("shared memory", 2, 10_000),
        ("shared memory", 3, 300),
        ("shared memory", 4, 300),
        ("pairwise", 2, 10_000),
        ("pairwise", 3, 300),
        ("two levels", 4, 10_000),
    ],
)
def test_thousands_of_mixed_calls_are_right_and_leave_nothing_behind(ranks, kind, world_size, count):
    found = ranks(world_size, many_calls, kind, count, world_size)
    for wrong, (more_bytes, more_files, more_threads, more_objects) in found:
        assert wrong == []
        assert (more_files, more_threads) == (0, 0)
        assert more_bytes <= 4 << 20
        assert more_objects < 300


def forget_to_wait(kind):
    _, shared = both(kind)
    for number in range(500):
        shared.all_reduce(torch.full((9_000,), float(number)), label="forgotten")
    total = torch.full((9_000,), 1.0)
    shared.all_reduce(total, label="x").wait()
    return total[0].item()


@each_kind
def test_calls_that_nobody_waits_for_do_not_block_later_ones(ranks, kind):
    assert ranks(4, forget_to_wait, kind) == [4.0] * 4


def make_different_calls(kind, how):
    _, shared = both(kind)
    first = shared.rank == 0
    tensor = torch.zeros(100)

    def call_other_op():
        if first:
            shared.all_reduce(tensor, label="grads").wait()
        else:
            shared.broadcast(tensor, src=0, label="start").wait()

    acts = {
        "size": lambda: shared.all_reduce(tensor[: 50 if first else 100], label="grads").wait(),
        "dtype": lambda: shared.all_reduce(tensor if first else tensor.double(), label="grads").wait(),
        "op": call_other_op,
        "source": lambda: shared.broadcast(tensor, src=0 if first else 1, label="start").wait(),
    }

    def act():
        acts[how]()
        shared.all_reduce(tensor, label="next").wait()  # a rank that only sends is through with its call

    return message_of(act)


@each_kind
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("size", ["all_reduce grads", "50 x float32", "100 x float32", "on rank 0", "on rank "]),
        ("dtype", ["all_reduce grads", "100 x float32", "100 x float64", "on rank 0", "on rank "]),
        ("op", ["all_reduce grads", "broadcast start from rank 0", "on rank 0", "on rank "]),
        ("source", ["from rank 0", "from rank 1"]),
    ],
)
def test_calls_that_do_not_match_are_told_with_both_sides_on_every_rank(ranks, kind, how, words):
    for message in ranks(4, make_different_calls, kind, how):
        assert message.startswith(MismatchError.__name__)
        assert [word for word in words if word not in message] == [], message


def go_on_after_a_mismatch():
    _, shared = both()
    tensor = torch.ones(100 + shared.rank)
    message = message_of(lambda: shared.all_reduce(tensor, label="grads").wait())
    total = torch.ones(5)
    shared.all_reduce(total, label="next").wait()
    return message.split(":")[0], total.tolist()


def test_ranks_that_share_memory_may_go_on_after_calls_that_did_not_match(ranks):
    assert ranks(3, go_on_after_a_mismatch) == [("MismatchError", [3.0] * 5)] * 3


def give_wrong_sizes(kind):
    _, shared = both(kind)
    return [
        message_of(lambda: shared.all_gather(torch.zeros(7), torch.zeros(3), label="x")),
        message_of(lambda: shared.reduce_scatter(torch.zeros(3), torch.zeros(7), label="x")),
        message_of(lambda: shared.all_to_all(torch.zeros(7), torch.zeros(7), label="x")),
    ]


@each_kind
def test_sizes_that_do_not_divide_are_refused_before_anything_is_sent(ranks, kind):
    for messages in ranks(4, give_wrong_sizes, kind):
        for message in messages:
            assert message.startswith(LayoutError.__name__)
            assert "x: " in message
            assert "4 ranks" in message or "7 elements" in message


def call_in_a_child():
    _, shared = both()
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, message_of(lambda: shared.all_reduce(torch.zeros(1), label="x")).encode())
        os._exit(0)
    os.waitpid(child, 0)
    barrier(shared)  # the ranks themselves go on
    return os.read(reading, 1000).decode()


def test_a_forked_child_is_refused_and_disturbs_nobody(ranks):
    for message in ranks(2, call_in_a_child):
        assert message.startswith(StateError.__name__)
        assert "forked child" in message


def sum_many(seed):
    served = serve(dist.group.WORLD, name="dp")
    total = born(served, torch.full((30_000,), float(seed + served.rank)))
    for _ in range(20):
        served.all_reduce(total, label="x").wait()
        total /= served.size
    whole = served.empty(served.size * 5, dtype=torch.float32, device=CPU)
    served.all_gather(whole, torch.full((5,), float(served.rank)), label="x").wait()
    return type(served).__name__, total[0].item(), whole[::5].tolist()


def test_sixteen_ranks_share_memory(ranks):
    assert ranks(16, sum_many, 0) == [("SharedMemoryCollectives", 7.5, [float(rank) for rank in range(16)])] * 16


def test_jobs_on_one_host_do_not_meet(ranks):
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(ranks, 2, sum_many, seed) for seed in (0, 100)]
        found = [job.result() for job in jobs]
    assert found == [[("SharedMemoryCollectives", mean, [0.0, 1.0])] * 2 for mean in (0.5, 100.5)]


def served_where_one_rank_has_no_memory_to_share():
    if dist.get_rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    served = serve(dist.group.WORLD, name="dp")
    tensor = torch.full((10_000,), float(served.rank))
    served.all_reduce(tensor, label="x").wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return type(served).__name__, tensor[0].item()


def test_a_group_with_a_rank_that_has_no_memory_to_share_is_served_pairwise(ranks):
    assert ranks(2, served_where_one_rank_has_no_memory_to_share) == [("PairwiseCollectives", 1.0)] * 2


def served_without_proc():
    """As on a system that has neither /proc nor anonymous files."""
    read_text = Path.read_text

    def read_no_proc(path, *args, **kwargs):
        if path.is_relative_to("/proc"):
            raise FileNotFoundError(path)
        return read_text(path, *args, **kwargs)

    Path.read_text = read_no_proc
    del os.memfd_create
    served = serve(dist.group.WORLD, name="dp")
    tensor = torch.full((10_000,), float(served.rank))
    served.all_reduce(tensor, label="x").wait()
    return type(served).__name__, tensor.unique().tolist()


def test_a_system_without_proc_is_served_pairwise(ranks):
    assert ranks(2, served_without_proc) == [("PairwiseCollectives", [1.0])] * 2


def use_memory_up(kind):
    _, served = both(kind)
    served.all_reduce(torch.ones(4), label="before").wait()
    told = "nothing was refused"
    if served.rank == 1:
        told = message_of(
            lambda: served.empty(available_bytes() // 3, dtype=torch.float32, device=CPU)
        )  # a third more than there is
    tensor = torch.ones(1 << 20)
    served.all_reduce(tensor, label="after").wait()  # the group goes on
    return told, tensor[-1].item()


@pytest.mark.parametrize(("kind", "world_size"), [("shared memory", 2), ("two levels", 4)])
def test_memory_that_is_used_up_is_told_and_the_group_goes_on(ranks, kind, world_size):
    told = ranks(world_size, use_memory_up, kind)
    assert [total for _, total in told] == [float(world_size)] * world_size
    assert {words for rank, (words, _) in enumerate(told) if rank != 1} == {"nothing was refused"}
    assert re.match(r"OutOfPagesError: A shared buffer (needs|of) .*(has not got them|are used up)", told[1][0])


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast", "together"]),
        st.sampled_from([0, 1, 3, 1000, SMALL_BYTES // 4 + 1]),
        st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
        st.booleans(),  # born in the group
        st.integers(0, 7),  # how many calls are under way when the oldest is waited for
    ),
    max_size=8,
)


def run_sequences(kind, table_path):
    """Sequences of calls against the core's, the same ones on every rank; the first on which a result differs."""
    os.environ["ZCORE_COMM_TABLE"] = table_path
    gloo, served = both(kind)
    wrong = []

    @hypothesis.settings(max_examples=30, derandomize=True, database=None, deadline=None)
    @hypothesis.given(CALLS)
    def run(calls):
        under_way, differs = [], torch.zeros(1)
        for number, (op, numel, dtype, is_born, depth) in enumerate(calls):
            found, pending = start(op, served, numel, dtype, number, is_born=is_born)
            expected, reference = start(op, gloo, numel, dtype, number, is_born=False)
            reference.wait()
            under_way.append((found, expected, pending))
            while len(under_way) > depth:
                differs += is_different(*under_way.pop(0))
        for each in reversed(under_way):
            differs += is_different(*each)
        gloo.all_reduce(differs, label="differs").wait()  # all ranks have to go on, or to stop
        if differs.item():
            wrong.append(calls)
            raise AssertionError

    with contextlib.suppress(AssertionError):
        run()
    return wrong[-1:]


def start(op, group, numel, dtype, seed, *, is_born):
    """The result of a call, and the call under way."""
    whole = values(numel * group.size, dtype, seed=100 * seed + group.rank)
    part = whole[:numel].clone()
    take = (lambda tensor: born(group, tensor)) if is_born else torch.clone
    if op == "reduce_scatter":
        result = take(part)
        return result, group.reduce_scatter(result, take(whole), label=op)
    if op == "all_reduce":
        result = take(whole)
        return result, group.all_reduce(result, label=op)
    if op == "broadcast":
        result = take(whole)
        return result, group.broadcast(result, src=seed % group.size, label=op)
    result = group.empty(whole.numel(), dtype=dtype, device=CPU)
    if op == "all_to_all":
        return result, group.all_to_all(result, take(whole), label=op)
    if op == "together":
        group.free_storage(result)
    return result, group.all_gather(result, take(part), label=op)


def is_different(found, expected, pending):
    pending.wait()
    return not torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize(
    ("kind", "world_size", "choice"),
    [
        ("shared memory", 2, None),
        ("pairwise", 2, None),
        ("pairwise", 3, 0),
        ("pairwise", 3, -1),
        ("two levels", 4, None),
    ],
)
def test_no_sequence_of_calls_under_way_gives_another_result(ranks, tmp_path, kind, world_size, choice):
    path = tmp_path / "table.json"
    if choice is not None:  # of all algorithms for an op the first or the last, whatever the size
        rules = [Rule(op, world_size, 1 << 62, names[choice]) for op, names in ALGORITHMS.items()]
        path.write_text(Table(tuple(rules)).to_json())
    assert ranks(world_size, run_sequences, kind, str(path)) == [[]] * world_size
