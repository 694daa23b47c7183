"""Which buckets are read last, and settled first: each once in a backward, in the order of their last reads."""

from hypothesis import given, settings
from hypothesis import strategies as st

from zcore.zero.first_uses import FirstUses, Graph

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=200)


def used(**numbers: int) -> FirstUses:
    uses = FirstUses()
    uses.begin_forward(0)
    for name, number in numbers.items():
        uses.note(int(name.removeprefix("b")), number)
    return uses


def test_what_nothing_read_before_a_node_is_taken_when_it_runs_and_only_once() -> None:
    uses = used(b0=3, b1=7, b2=12)
    uses.begin_backward(14)
    assert uses.take_after(12, but=()) == []
    assert uses.take_after(5, but=()) == [2, 1]
    assert uses.take_after(5, but=()) == []
    assert uses.take_after(2, but=()) == [0]
    uses.end_backward()
    assert uses.take_after(5, but=()) == [2, 1]


def test_the_first_of_several_reads_counts() -> None:
    uses = used(b0=3, b1=7)
    uses.note(0, 9)
    uses.note(1, -1)  # without autograd: the backward may read it to its end
    assert uses.take_after(2, but=()) == [0]
    assert uses.take_after(0, but=()) == []


def test_one_that_is_left_out_is_taken_later() -> None:
    uses = used(b0=3, b1=7)
    assert uses.take_after(2, but=(1,)) == [0]
    assert uses.take_after(2, but=()) == [1]


def test_a_read_in_the_backward_is_known_at_once() -> None:
    uses = used(b0=3, b1=7)
    assert uses.take_after(6, but=()) == [1]
    uses.note(2, 8)
    assert uses.take_after(6, but=()) == [2]


def forward(uses: FirstUses, begin: int, *buckets: int) -> Graph:
    """Reads of one forward, numbered from `begin` on; returned is what its nodes hold."""
    uses.begin_forward(begin)
    for number, bucket in enumerate(buckets, start=begin):
        uses.note(bucket, number)
    return uses.graph()


def test_a_forward_that_has_had_its_backward_is_forgotten_and_nothing_said_at_its_nodes() -> None:
    uses = FirstUses()
    first = forward(uses, 10, 0, 1, 2)
    uses.begin_backward(12)
    uses.reach(10)
    second = forward(uses, 20, 0, 1, 2)
    assert uses.take_after(21, but=()) == [2]
    assert uses.take_after(11, but=()) == []
    assert first is not second


def test_a_forward_that_no_backward_has_reached_is_remembered_as_long_as_its_graph_lives() -> None:
    uses = FirstUses()
    older = forward(uses, 10, 0, 1)
    newer = forward(uses, 20, 0, 1)
    uses.begin_backward(22)
    uses.reach(20)  # that of the newer one
    newest = forward(uses, 30, 0, 1)
    assert uses.take_after(30, but=()) == []  # the older one may still give them gradients
    assert uses.take_after(10, but=()) == [1]
    uses.end_backward()
    del older, newer, newest
    forward(uses, 40, 0, 1)
    assert uses.take_after(40, but=()) == [1]


def test_many_forwards_that_wait_settle_nothing_before_the_first_of_them() -> None:
    uses = FirstUses()
    graphs = [forward(uses, 10 * each, 0, 1, 2) for each in range(1, 13)]
    assert [uses.take_after(number, but=()) for number in (122, 60, 13)] == [[], [], []]
    assert uses.take_after(11, but=()) == [2]
    assert len(uses._forwards) <= 10
    assert len(graphs) == 12


def test_a_forward_behind_two_that_are_forgotten_settles_at_its_own_nodes() -> None:
    uses = FirstUses()
    gone = [forward(uses, begin, 0, 1) for begin in (0, 10)]
    waiting = forward(uses, 20, 2, 3)
    gone.clear()
    forward(uses, 30, 0, 1)
    uses.begin_backward(31)
    assert uses._gaps == [(0, 20)]
    assert uses.take_after(20, but=()) == [1, 0, 3]
    assert waiting is not None


def test_forwards_that_are_held_for_good_do_not_make_steps_longer() -> None:
    uses, held = FirstUses(), list[Graph]()
    for step in range(200):
        held.append(forward(uses, 20 * step, 0, 1))
        trained = forward(uses, 20 * step + 10, 0, 1)
        uses.begin_backward(20 * step + 11)
        uses.end_backward()
        del trained
        assert len(uses._gaps) <= 10
        assert len(uses._forwards) <= 10
    assert len(held) == 200


def test_a_backward_whose_first_node_is_of_a_forward_has_reached_it() -> None:
    uses = FirstUses()
    kept = forward(uses, 0, 0)
    uses.begin_backward(0)
    uses.end_backward()
    forward(uses, 10, 0)
    assert len(uses._forwards) == 1
    assert kept is not None


def test_forwards_that_are_looked_at_for_a_while_do_not_add_up() -> None:
    uses, held = FirstUses(), list[Graph]()
    for step in range(200):
        held = [*held[-2:], forward(uses, 20 * step, 0, 1)]  # of a loss that is looked at and gets no backward
        trained = forward(uses, 20 * step + 10, 0, 1)
        uses.begin_backward(20 * step + 11)
        uses.reach(20 * step + 10)
        uses.end_backward()
        del trained
    assert len(uses._gaps) <= 4
    assert len(uses._forwards) <= 6


def older_and_newest(*, is_gone: bool) -> list[int]:
    """Of eleven that wait the first and the last read bucket 7; the second gets its backward, or is gone."""
    uses = FirstUses()
    graphs: list[Graph | None] = [forward(uses, 10 * each, *((7, 0) if each == 1 else (0, 1))) for each in range(1, 12)]
    if is_gone:
        graphs[1] = None
    else:
        uses.begin_backward(21)
        uses.reach(21)
        uses.reach(20)
        uses.end_backward()
    graphs.append(forward(uses, 200, 7, 0, 1))
    return uses.take_after(111, but=())


def test_one_of_many_that_wait_settles_nothing_for_the_others() -> None:
    assert older_and_newest(is_gone=False) == []
    assert older_and_newest(is_gone=True) == []


@EXAMPLES
@given(st.dictionaries(st.integers(0, 9), st.integers(0, 20)), st.lists(st.integers(0, 20), max_size=6), st.data())
def test_any_order_of_nodes_takes_what_a_look_at_everything_would(
    first: dict[int, int], nodes: list[int], data: st.DataObject
) -> None:
    uses = FirstUses()
    uses.begin_forward(0)
    for index, number in first.items():
        uses.note(index, number)
    taken: set[int] = set()
    for node in nodes:
        but = data.draw(st.sets(st.integers(0, 9)))
        expected = {index for index, number in first.items() if number > node and index not in taken | but}
        found = uses.take_after(node, but=but)
        assert set(found) == expected
        assert [first[index] for index in found] == sorted((first[index] for index in found), reverse=True)
        taken |= expected


@EXAMPLES
@given(st.data())
def test_no_bucket_is_taken_that_a_graph_of_the_backward_has_still_to_read(data: st.DataObject) -> None:
    """Forwards, and backwards of any that wait, in any order; graphs live on after their backward, or do not."""
    uses, now = FirstUses(), 0
    waiting: dict[int, tuple[dict[int, int], Graph]] = {}
    kept: list[Graph] = []
    for turn in range(data.draw(st.integers(1, 12))):
        uses.begin_forward(now)
        first: dict[int, int] = {}
        for bucket in data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5)):
            first.setdefault(bucket, now)
            uses.note(bucket, now)
            now += 1
        waiting[turn] = first, uses.graph()
        chosen = data.draw(st.sets(st.sampled_from(sorted(waiting))))
        if not chosen:
            continue
        nodes = sorted((number for each in chosen for number in waiting[each][0].values()), reverse=True)
        uses.begin_backward(nodes[0])
        for node in nodes:
            uses.reach(node)
            for bucket in uses.take_after(node, but=()):
                assert all(waiting[each][0].get(bucket, now) > node for each in chosen)
        uses.end_backward()
        for each in chosen:
            _, graph = waiting.pop(each)
            if data.draw(st.booleans()):
                kept.append(graph)  # as of a loss that is still held
            del graph
