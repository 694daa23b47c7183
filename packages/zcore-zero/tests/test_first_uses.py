"""Which buckets are read last, and settled first: each once in a backward, in the order of their last reads."""

from hypothesis import given, settings
from hypothesis import strategies as st

from zcore.zero.first_uses import FirstUses

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=200)


def used(**numbers: int) -> FirstUses:
    uses = FirstUses()
    uses.begin_forward()
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


@EXAMPLES
@given(st.dictionaries(st.integers(0, 9), st.integers(0, 20)), st.lists(st.integers(0, 20), max_size=6), st.data())
def test_any_order_of_nodes_takes_what_a_look_at_everything_would(
    first: dict[int, int], nodes: list[int], data: st.DataObject
) -> None:
    uses = FirstUses()
    uses.begin_forward()
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
