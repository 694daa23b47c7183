"""Collectives over real ranks: values to the bit, dtypes, sizes, order of sums, counts, and peers that are gone."""

import os
import threading

import pytest
import torch
import torch.distributed as dist

from zcore.core import torch_collectives
from zcore.core.collectives import (
    Call,
    contents_of,
    derived_label,
    failed_collective,
    last_collective,
    tell_contents,
    tree_sum,
)
from zcore.core.errors import LayoutError
from zcore.core.extensions import installed
from zcore.core.testing import RankFailed
from zcore.core.torch_collectives import TorchCollectives, choose_collectives

NUMELS = [0, 1, 7, 32, 20_001]  # the last is above SMALL_BYTES in fp32, and odd
MOVED = [torch.float32, torch.bfloat16, torch.int16, torch.bool, torch.float8_e4m3fn, torch.float64, torch.int64]
SUMMED = [torch.float32, torch.bfloat16, torch.float16, torch.int16, torch.int32, torch.float64]


def values(numel, dtype, seed):
    """Numbers whose sum depends on its order, in every dtype; equal wherever they are computed."""
    generator = torch.Generator().manual_seed(seed)
    if dtype in (torch.int16, torch.int32, torch.int64):
        return torch.randint(-50, 50, (numel,), generator=generator).to(dtype)
    if dtype is torch.bool:
        return torch.randint(2, (numel,), generator=generator).bool()
    return (torch.randn(numel, generator=generator) * 10 ** torch.randint(0, 3, (numel,), generator=generator)).to(
        dtype
    )


def same(first, second):
    """Equal bits: float8 has no comparison, and -0.0 is not 0.0 here."""
    return first.dtype == second.dtype and torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def in_tree_order(parts):
    """The sum that the header of collectives.py draws, written down again."""
    parts = list(parts)
    while len(parts) > 1:
        pairs = [parts[index : index + 2] for index in range(0, len(parts), 2)]
        parts = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return parts[0]


def world():
    return TorchCollectives(dist.group.WORLD, name="dp")


@pytest.mark.parametrize("count", range(1, 10))
def test_the_tree_sums_in_the_order_that_is_drawn(count):
    parts = [values(33, torch.float32, seed) for seed in range(count)]
    expected = in_tree_order(parts)
    out = torch.empty(33)
    tree_sum([part.clone() for part in parts], out=out)
    assert same(out, expected)
    into_first = [part.clone() for part in parts]
    tree_sum(into_first, out=into_first[0])
    assert same(into_first[0], expected)


def test_two_halves_summed_apart_give_the_same_tree():
    parts = [values(9, torch.float32, seed) for seed in range(8)]
    halves = [in_tree_order(parts[:4]), in_tree_order(parts[4:])]
    whole = torch.empty(9)
    tree_sum(parts, out=whole)
    assert same(whole, halves[0] + halves[1])


def move_everything():
    group = world()
    rank, size = group.rank, group.size
    for dtype in MOVED:
        for numel in NUMELS[:-1]:
            mine = values(numel, dtype, seed=rank)
            expected = torch.cat([values(numel, dtype, seed=each) for each in range(size)])
            gathered = group.empty(size * numel, dtype=dtype, device=torch.device("cpu"))
            group.all_gather(gathered, mine, label="apart").wait()
            assert same(gathered, expected), (dtype, numel)
            in_place = torch.zeros_like(expected)
            own = in_place[rank * numel : (rank + 1) * numel]
            own.copy_(mine)
            group.all_gather(in_place, own, label="own slot").wait()
            assert same(in_place, expected), (dtype, numel)
            for src in range(size):
                sent = mine.clone()
                group.broadcast(sent, src=src, label="from").wait()
                assert same(sent, values(numel, dtype, seed=src)), (dtype, numel)
            every = torch.cat([values(numel, dtype, seed=10 * rank + to) for to in range(size)])
            received = torch.empty_like(every)
            group.all_to_all(received, every, label="exchange").wait()
            assert same(received, torch.cat([values(numel, dtype, seed=10 * by + rank) for by in range(size)]))
            if size > 1:
                after, before = (rank + 1) % size, (rank - 1) % size
                arrived = torch.empty_like(mine)
                works = [group.send(mine, dst=after, label="ring"), group.recv(arrived, src=before, label="ring")]
                for work in works:
                    work.wait()
                assert same(arrived, values(numel, dtype, seed=before)), (dtype, numel)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_is_moved_arrives_to_the_bit(ranks, world_size):
    ranks(world_size, move_everything)


def sum_everything():
    group = world()
    rank, size = group.rank, group.size
    for dtype in SUMMED:
        for numel in NUMELS:
            total = in_tree_order([values(numel, dtype, seed) for seed in range(size)])
            reduced = values(numel, dtype, rank)
            group.all_reduce(reduced, label="all").wait()
            assert same(reduced, total), (dtype, numel)
            everywhere = [values(numel * size, dtype, 100 + seed) for seed in range(size)]
            slot = slice(rank * numel, (rank + 1) * numel)
            expected = in_tree_order([each[slot] for each in everywhere])
            out = torch.empty(numel, dtype=dtype)
            group.reduce_scatter(out, everywhere[rank].clone(), label="apart").wait()
            assert same(out, expected), (dtype, numel)
            kept = everywhere[rank].clone()
            group.reduce_scatter(kept[slot], kept, label="own slot").wait()
            assert same(kept[slot], expected), (dtype, numel)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sums_are_the_trees_to_the_bit_whatever_their_size(ranks, world_size):
    ranks(world_size, sum_everything)


def keep_inputs():
    group = world()
    for numel in NUMELS:
        mine = values(numel * group.size, torch.float32, group.rank)
        before = mine.clone()
        group.reduce_scatter(torch.empty(numel), mine, label="input").wait()
        assert same(mine, before)
        group.all_gather(torch.empty(mine.numel() * group.size), mine, label="input").wait()
        assert same(mine, before)


def test_an_input_that_is_not_the_output_is_left_as_it_was(ranks):
    ranks(2, keep_inputs)


def fly_together():
    """Several at once on two groups, waited for in an order of each rank's own."""
    first, second = world(), TorchCollectives(dist.new_group(), name="twin")
    rank, size = first.rank, first.size
    pending = []
    for index in range(6):
        group = (first, second)[index % 2]
        mine = values(501, torch.float32, 10 * index + rank)
        parts = [values(501, torch.float32, 10 * index + each) for each in range(size)]
        gathered = torch.empty(501 * size)
        pending.append((group.all_gather(gathered, mine, label=f"{index}"), gathered, torch.cat(parts)))
        whole = mine.repeat(size)
        out = torch.empty(501)
        pending.append((group.reduce_scatter(out, whole, label=f"{index}"), out, in_tree_order(parts)))
        summed = mine.clone()
        pending.append((group.all_reduce(summed, label=f"{index}"), summed, in_tree_order(parts)))
    order = list(range(len(pending)))
    if rank == 1:
        order.reverse()
    for position in order:
        pending[position][0].wait()
    for work, result, expected in pending:
        work.wait()  # twice is allowed
        assert same(result, expected)


@pytest.mark.parametrize("world_size", [2, 3])
def test_collectives_in_flight_on_two_groups_do_not_disturb_each_other(ranks, world_size):
    ranks(world_size, fly_together)


def large_sums_out_of_order(started_in):
    """An all_reduce above SMALL_BYTES has a second half; ranks may wait for two of them in either order."""
    group = world()
    numels = torch_collectives.SMALL_BYTES, 11 * 2**18 + 1  # one is of more pieces than are on their way at a time
    tensors = [values(numel, torch.float32, 10 * index + group.rank) for index, numel in enumerate(numels)]
    works = []

    def start():
        works.extend(group.all_reduce(tensor, label=f"large {index}") for index, tensor in enumerate(tensors))

    if started_in == "a thread":
        thread = threading.Thread(target=start)
        thread.start()
        thread.join()
    else:
        start()
    for index in (0, 1) if group.rank == 0 else (1, 0):
        works[index].wait()
    for index, tensor in enumerate(tensors):
        parts = [values(tensor.numel(), torch.float32, 10 * index + each) for each in range(group.size)]
        assert same(tensor, in_tree_order(parts))


@pytest.mark.parametrize("started_in", ["the one that waits", "a thread"])
def test_large_sums_may_be_waited_for_in_any_order(ranks, started_in):
    ranks(2, large_sums_out_of_order, started_in, group_timeout_s=5.0)


def large_sums_in_threads():
    """Each thread has a group; rank 0 starts in the first one first, rank 1 in the second."""
    groups = [torch_collectives.TorchCollectives(dist.new_group(), name=name) for name in ("a", "b")]
    is_started, totals = threading.Event(), {}
    first = dist.get_rank()

    def work(index):
        if index != first:
            is_started.wait()
        tensor = torch.full((11 * 2**18,), 10.0**index)
        pending = groups[index].all_reduce(tensor, label="w")
        is_started.set()
        pending.wait()
        totals[index] = tensor.unique().tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return totals


def test_threads_with_a_group_each_do_not_wait_for_each_others_sums(ranks):
    assert ranks(2, large_sums_in_threads, group_timeout_s=5.0) == [{0: [2.0], 1: [20.0]}] * 2


def sum_in_two_groups_of_one_name():
    first, second = (torch_collectives.TorchCollectives(dist.group.WORLD, name="dp reduce") for _ in range(2))
    tensors = torch.full((11 * 2**18,), 1.0), torch.full((11 * 2**18,), 100.0)
    pending = first.all_reduce(tensors[0], label="w"), second.all_reduce(tensors[1], label="w")
    for each in pending:
        each.wait()
    return [tensor.unique().tolist() for tensor in tensors]


def test_groups_of_one_name_over_one_process_group_do_not_share_messages(ranks):
    assert ranks(2, sum_in_two_groups_of_one_name, group_timeout_s=5.0) == [[[2.0], [200.0]]] * 2


def sum_on_two_groups_out_of_order():
    groups = [torch_collectives.TorchCollectives(dist.new_group(), name=f"g{index}") for index in range(2)]
    tensors = [torch.ones(2**18) for _ in groups]
    pending = [group.all_reduce(tensor, label="w") for group, tensor in zip(groups, tensors, strict=True)]
    for index in (0, 1) if groups[0].rank == 0 else (1, 0):
        pending[index].wait()
    return [tensor.unique().tolist() for tensor in tensors]


def test_large_sums_of_two_groups_may_be_waited_for_in_any_order(ranks):
    assert ranks(2, sum_on_two_groups_out_of_order, group_timeout_s=5.0) == [[[2.0], [2.0]]] * 2


def wait_for_the_last_of_many():
    pending = [world().all_reduce(torch.ones(20_000), label=f"{index}") for index in range(1200)]
    pending[-1].wait()


def test_waiting_for_the_last_of_many_sums_ends_all_before_it(ranks):
    ranks(2, wait_for_the_last_of_many)


def scatter_what_does_not_divide():
    with pytest.raises(LayoutError, match="a whole of 7 elements and a part of 3 over 2 ranks"):
        world().reduce_scatter(torch.empty(3), torch.ones(7), label="w")


def test_a_reduce_scatter_that_does_not_divide_is_refused(ranks):
    ranks(2, scatter_what_does_not_divide)


def count_calls():
    group = world()
    cpu = torch.device("cpu")
    half = group.empty(10, dtype=torch.bfloat16, device=cpu)
    group.all_gather(group.empty(20, dtype=torch.bfloat16, device=cpu), half.zero_(), label="gather").wait()
    group.reduce_scatter(torch.empty(3), torch.ones(6), label="scatter").wait()
    group.all_reduce(torch.ones(5), label="sum").wait()
    group.all_reduce(torch.ones(torch_collectives.SMALL_BYTES), label="large sum").wait()
    group.broadcast(torch.ones(2), src=1, label="from 1").wait()
    group.all_to_all(torch.empty(4), torch.ones(4), label="exchange").wait()
    counted = dict(group.traffic.calls), dict(group.traffic.payload_bytes), last_collective()
    group.traffic.clear()
    assert not group.traffic.calls and not group.traffic.payload_bytes
    return counted


def test_calls_and_bytes_are_counted_by_kind(ranks):
    for calls, payload_bytes, last in ranks(2, count_calls):
        assert calls == {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2, "broadcast": 1, "all_to_all": 1}
        assert payload_bytes == {
            "all_gather": 40,  # of the larger side
            "reduce_scatter": 24,
            "all_reduce": 20 + 4 * torch_collectives.SMALL_BYTES,
            "broadcast": 8,
            "all_to_all": 16,
        }
        assert last.startswith("all_to_all exchange (#5 of dp: ")


def lose_a_peer(op):
    group = world()
    group.all_reduce(torch.ones(1), label="all are here").wait()
    if group.rank == 1:
        os._exit(1)
    numel, size = 6, group.size
    calls = {
        "all_gather": lambda: group.all_gather(torch.empty(numel * size), torch.ones(numel), label="blocks.3"),
        "reduce_scatter": lambda: group.reduce_scatter(torch.empty(numel), torch.ones(numel * size), label="blocks.3"),
        "all_reduce": lambda: group.all_reduce(torch.ones(numel), label="blocks.3"),
        "large all_reduce": lambda: group.all_reduce(torch.ones(torch_collectives.SMALL_BYTES), label="blocks.3"),
        "broadcast": lambda: group.broadcast(torch.ones(numel), src=1, label="blocks.3"),
        "all_to_all": lambda: group.all_to_all(torch.empty(size), torch.ones(size), label="blocks.3"),
        "recv": lambda: group.recv(torch.ones(1), src=1, label="blocks.3"),
    }
    calls[op]().wait()


@pytest.mark.parametrize(
    "op", ["all_gather", "reduce_scatter", "all_reduce", "large all_reduce", "broadcast", "all_to_all", "recv"]
)
def test_a_collective_whose_peer_is_gone_says_which_one_and_what_to_do(ranks, op):
    with pytest.raises(RankFailed) as caught:
        ranks(2, lose_a_peer, op)
    failure = caught.value.failures[0]
    assert failure.type_name == "CollectiveError"
    number = 0 if op == "recv" else 1  # messages are counted apart
    assert failure.message.startswith(f"{op.removeprefix('large ')} blocks.3 (#{number} of dp: ")
    for words in ("did not complete", "killed", "first error in the other ranks' output", "last checkpoint"):
        assert words in failure.message
    assert "\n" not in failure.message
    assert failure.message.isascii()


@pytest.mark.parametrize(
    "words",
    [
        "Read error [127.0.0.1]:1: Connection reset by peer. Check its logs. GLHF! \U0001f3d6\ufe0f",
        "Read error [127.0.0.1]:1: Connection reset by peer. Check its logs.",
        "Read error [127.0.0.1]:1: Connection reset by peer. Check its logs. Good luck!\nframe #0: 0x1",
    ],
)
def test_the_backends_words_end_before_its_good_wishes(words):
    call = Call("all_gather", "blocks.3", 4, torch.float32, 16, "dp", 0)
    message = str(failed_collective(call, RuntimeError(words)))
    assert message.endswith("words: Read error [127.0.0.1]:1: Connection reset by peer. Check its logs.)")


def never_come():
    group = world()
    if group.rank == 0:
        group.all_gather(torch.empty(2), torch.ones(1), label="blocks.3").wait()
    return "elsewhere"


def test_a_peer_that_does_not_come_is_an_error_after_the_timeout_of_the_group(ranks):
    with pytest.raises(RankFailed) as caught:
        ranks(2, never_come, group_timeout_s=0.3)
    (failure,) = caught.value.failures
    assert failure.type_name == "CollectiveError"
    assert "all_gather blocks.3 (#0 of dp: " in failure.message
    assert "timeout" in failure.message
    assert caught.value.results == {1: "elsewhere"}


def test_an_error_names_the_parameters_of_every_bucket_that_a_call_brings():
    for number in range(6):
        tell_contents(f"of test.{number}", [f"layers.{number}.{name}" for name in "abcdef"][: number + 1])
    assert contents_of("of test") == contents_of(derived_label("mean of test", parts=["of test"])) == ""
    mean = derived_label("mean of test.1", parts=["of test.1"])
    assert contents_of(mean) == " Bucket of test.1 holds layers.1.a, layers.1.b."
    joined = derived_label("joined", parts=["of test.0", mean, "of test"])
    assert contents_of(joined) == f" Bucket of test.0 holds layers.0.a.{contents_of(mean)}"
    all_of_them = contents_of(derived_label("all", parts=[f"of test.{number}" for number in range(6)]))
    assert all_of_them.endswith("layers.3.d. 2 more buckets go with them.")
    assert contents_of("of test.5").endswith("layers.5.d and 2 more parameters.")


def free_and_alloc():
    group = world()
    cpu = torch.device("cpu")
    for dtype in MOVED:
        for numel in (0, 1, 7, 4096):
            buffer = group.empty(numel, dtype=dtype, device=cpu)
            low, high = buffer[: numel // 2], buffer[numel // 2 :]
            shaped = buffer.view(1, numel)
            nbytes = buffer.untyped_storage().nbytes()
            group.alloc_storage(buffer)  # no effect on one that has memory
            assert buffer.untyped_storage().nbytes() == nbytes == numel * buffer.element_size()
            group.free_storage(buffer)
            group.free_storage(buffer)
            assert buffer.untyped_storage().nbytes() == 0
            assert (buffer.shape, shaped.shape) == ((numel,), (1, numel))
            group.alloc_storage(buffer)
            assert buffer.untyped_storage().nbytes() == nbytes
            mine = values(numel, dtype, 3)
            buffer.copy_(mine)
            assert same(torch.cat([low, high]), mine)  # old views look at the new memory
            assert same(shaped.reshape(-1), mine)
    gathered = group.empty(2 * group.size, dtype=torch.float32, device=cpu)
    group.free_storage(gathered)
    group.alloc_storage(gathered)
    group.all_gather(gathered, torch.full((2,), float(group.rank)), label="into memory that came back").wait()
    return gathered.tolist()


def test_views_of_a_buffer_outlive_its_memory(ranks):
    assert ranks(1, free_and_alloc) == [[0.0, 0.0]]
    assert ranks(2, free_and_alloc) == [[0.0, 0.0, 1.0, 1.0]] * 2


def train_mode(grad):
    group = world()
    weight = torch.nn.Parameter(torch.ones(4))
    gathered = torch.empty(8)
    with torch.set_grad_enabled(grad):
        group.all_gather(gathered, weight.detach(), label="weights").wait()
        total = torch.ones(3)
        group.all_reduce(total, label="sum").wait()
    assert not gathered.requires_grad and not total.requires_grad
    return total.tolist()


def test_autograd_does_not_look_into_collectives(ranks):
    for grad in (False, True):
        assert ranks(2, train_mode, grad) == [[2.0] * 3] * 2


def subgroup_of_last_two():
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    collectives = TorchCollectives(group, name="tail")
    sent = torch.tensor([float(dist.get_rank())])
    collectives.broadcast(sent, src=0, label="by rank in the group").wait()
    assert (collectives.size, collectives.rank) == (2, dist.get_rank() - 1)
    return sent.item()


def test_ranks_are_counted_inside_the_group(ranks):
    assert ranks(3, subgroup_of_last_two) == [None, 1.0, 1.0]


def choose_default():
    chosen = choose_collectives(dist.group.WORLD, name="dp")
    return type(chosen).__name__, chosen.rank, chosen.size


DEFAULT = "DeferrableCollectives" if installed("zcore-comm") else "TorchCollectives"


def test_torch_serves_unless_zcore_comm_is_installed(ranks):
    assert ranks(2, choose_default) == [(DEFAULT, 0, 2), (DEFAULT, 1, 2)]


OFFER = """
from zcore.core.torch_collectives import TorchCollectives, choose_collectives

class Counting(TorchCollectives):
    pass

def serve(group, *, name):
    return Counting(group, name=name) if name == "dp" else None
"""


def choose_offered(site):
    import sys

    sys.path.insert(0, site)
    return [type(choose_collectives(dist.group.WORLD, name=name)).__name__ for name in ("dp", "other")]


def test_an_installed_wheel_may_serve_and_may_decline(ranks, add_wheel, tmp_path):
    add_wheel("zcore-counting", "1.0", {"zcore.collectives": {"a_counting": "counting:serve"}}, counting=OFFER)
    assert ranks(2, choose_offered, str(tmp_path / "site")) == [["Counting", DEFAULT]] * 2
