"""Slices cover every parameter once and never overlap, whatever the shapes; buckets hold every parameter once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zcore.core.errors import LayoutError
from zcore.zero.layout import ALIGN_NUMEL, RUN_FLOOR_NUMEL, BucketPlan, ParamSpec, Unit, plan_buckets, plan_layout

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=80)

NUMELS = st.lists(st.one_of(st.integers(0, 5), st.integers(0, 3000)), min_size=1, max_size=12)
SLICES = st.one_of(st.integers(1, 8), st.sampled_from([64, 1024]))
ALIGNS = st.sampled_from([1, 2, 7, 32])


def spec(fqn: str, *shape: int, dtype: torch.dtype = torch.float32, trainable: bool = True) -> ParamSpec:
    return ParamSpec(fqn, shape, dtype, trainable)


@EXAMPLES
@given(NUMELS, SLICES, ALIGNS)
def test_slices_cover_every_element_of_every_parameter_exactly_once(
    numels: list[int], num_slices: int, align_numel: int
) -> None:
    layout = plan_layout(numels, num_slices=num_slices, align_numel=align_numel)
    for index, numel in enumerate(numels):
        end = 0
        for each in range(num_slices):
            part = layout.fragment(index, range(each, each + 1))
            assert part.start == min(end, numel) or not part.numel
            end += part.numel
            assert not part.numel or part.stop == end
        assert end == numel


@EXAMPLES
@given(NUMELS, SLICES, ALIGNS)
def test_fragments_of_a_slice_lie_inside_it_and_do_not_overlap(
    numels: list[int], num_slices: int, align_numel: int
) -> None:
    layout = plan_layout(numels, num_slices=num_slices, align_numel=align_numel)
    for each in {0, num_slices // 2, num_slices - 1}:
        parts = [layout.fragment(index, range(each, each + 1)) for index in range(len(numels))]
        held = [(part.offset, part.offset + part.numel) for part in parts if part.numel]
        assert all(low >= 0 and high <= layout.slice_numel for low, high in held)
        assert all(high <= low for (_, high), (low, _) in pairwise(held))


@EXAMPLES
@given(NUMELS, SLICES, ALIGNS)
def test_a_fragment_is_where_its_parameter_lies_in_the_bucket(
    numels: list[int], num_slices: int, align_numel: int
) -> None:
    """The gathered bucket is the slices end to end, so a fragment's place in it must be its parameter's."""
    layout = plan_layout(numels, num_slices=num_slices, align_numel=align_numel)
    for index in range(len(numels)):
        for each in {0, num_slices // 2, num_slices - 1}:
            part = layout.fragment(index, range(each, each + 1))
            if part.numel:
                assert each * layout.slice_numel + part.offset == layout.offsets[index] + part.start


@EXAMPLES
@given(NUMELS, st.integers(1, 8), st.data())
def test_fragments_of_adjacent_ranges_concatenate(numels: list[int], num_slices: int, data: st.DataObject) -> None:
    layout = plan_layout(numels, num_slices=num_slices)
    low, middle, high = sorted(data.draw(st.lists(st.integers(0, num_slices), min_size=3, max_size=3)))
    for index in range(len(numels)):
        first = layout.fragment(index, range(low, middle))
        second = layout.fragment(index, range(middle, high))
        both = layout.fragment(index, range(low, high))
        assert both.numel == first.numel + second.numel
        if first.numel and second.numel:
            assert (first.start, first.stop, second.stop) == (both.start, second.start, both.stop)
            assert first.offset == both.offset
            assert second.offset == 0


@EXAMPLES
@given(NUMELS, SLICES, ALIGNS)
def test_starts_are_aligned_in_order_and_padding_is_bounded(
    numels: list[int], num_slices: int, align_numel: int
) -> None:
    layout = plan_layout(numels, num_slices=num_slices, align_numel=align_numel)
    assert all(offset % align_numel == 0 for offset in layout.offsets)
    assert layout.slice_numel % align_numel == 0
    ends = [offset + numel for offset, numel in zip(layout.offsets, numels, strict=True)]
    assert all(end <= start for end, start in zip(ends, layout.offsets[1:], strict=False))
    assert ends[-1] <= layout.numel
    assert layout.numel - sum(numels) < align_numel * (len(numels) + num_slices)


@EXAMPLES
@given(NUMELS, st.sampled_from([1, 2, 3, 4, 6]))
def test_where_parameters_lie_does_not_depend_on_the_number_of_slices(numels: list[int], num_slices: int) -> None:
    assert plan_layout(numels, num_slices=num_slices).offsets == plan_layout(numels, num_slices=1).offsets


def test_golden_numbers_of_one_layout() -> None:
    layout = plan_layout([100, 33, 0, 1], num_slices=3)
    assert ALIGN_NUMEL == 32
    assert layout.offsets == (0, 128, 192, 192)  # 100 -> 128, 33 -> 64, 0 -> 0
    assert layout.slice_numel == 96  # 193 elements end in a place of 224: 3 slices of 74.7, aligned
    assert layout.numel == 288
    parts = [layout.fragment(1, range(each, each + 1)) for each in range(3)]
    assert [(part.start, part.stop, part.offset) for part in parts] == [(0, 0, 96), (0, 33, 32), (33, 33, 0)]
    assert [layout.fragment(0, range(each, each + 1)).numel for each in range(3)] == [96, 4, 0]
    assert layout.fragment(3, range(1, 3)).offset == 96


@pytest.mark.parametrize(("num_slices", "align_numel"), [(0, 1), (-1, 1), (1, 0)])
def test_nothing_is_cut_into_no_slices(num_slices: int, align_numel: int) -> None:
    with pytest.raises(LayoutError, match="must be 1 or more"):
        plan_layout([1], num_slices=num_slices, align_numel=align_numel)


# Buckets.

SPECS = st.builds(
    lambda shape, dtype, trainable: ParamSpec("", tuple(shape), dtype, trainable),
    st.lists(st.integers(0, 40), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.booleans(),
)
UNITS = st.lists(st.tuples(st.booleans(), st.lists(SPECS, min_size=1, max_size=6)), min_size=1, max_size=6)
LIMITS = st.sampled_from([1, 100, 5000, 10**9])
SMALL = st.sampled_from([0, 1, 50, 10**9])


def named(units: list[tuple[bool, list[ParamSpec]]]) -> list[Unit]:
    return [
        Unit(
            f"unit{number}",
            tuple(
                ParamSpec(f"unit{number}.{index}", each.shape, each.dtype, each.trainable)
                for index, each in enumerate(specs)
            ),
            is_block=is_block,
        )
        for number, (is_block, specs) in enumerate(units)
    ]


@EXAMPLES
@given(UNITS, LIMITS, SMALL, st.one_of(st.none(), st.integers(0, 5000)))
def test_every_parameter_is_in_exactly_one_bucket_of_its_kind(
    drawn: list[tuple[bool, list[ParamSpec]]], bucket_numel: int, small_numel: int, small_total: int | None
) -> None:
    units = named(drawn)
    plans = plan_buckets(
        units, num_slices=4, bucket_numel=bucket_numel, small_numel=small_numel, small_total_numel=small_total
    )
    placed = [each.fqn for plan in plans for each in plan.params]
    assert sorted(placed) == sorted(each.fqn for unit in units for each in unit.params)
    for plan in plans:
        assert {(each.dtype, each.trainable) for each in plan.params} == {(plan.dtype, plan.trainable)}
        assert plan.layout.numels == tuple(each.numel for each in plan.params)
    assert len({plan.name for plan in plans}) == len(plans)


@EXAMPLES
@given(UNITS, LIMITS, SMALL, st.one_of(st.none(), st.integers(0, 5000)))
def test_limits_of_buckets_are_kept(
    drawn: list[tuple[bool, list[ParamSpec]]], bucket_numel: int, small_numel: int, small_total: int | None
) -> None:
    plans = plan_buckets(
        named(drawn), num_slices=4, bucket_numel=bucket_numel, small_numel=small_numel, small_total_numel=small_total
    )
    kept = [each.numel for plan in plans if plan.keep_whole for each in plan.params]
    assert all(numel <= small_numel for numel in kept)
    assert sum(kept) <= (sum(kept) if small_total is None else small_total)
    for plan in plans:
        numels = [each.numel for each in plan.params]
        if not plan.keep_whole:
            assert sum(numels) <= bucket_numel or sum(numels) - numels[-1] == 0  # one too large has it to itself
            assert small_total is not None or all(numel > small_numel for numel in numels)


@EXAMPLES
@given(UNITS, LIMITS, SMALL)
def test_gathered_buckets_stay_in_order_of_use_and_within_one_unit(
    drawn: list[tuple[bool, list[ParamSpec]]], bucket_numel: int, small_numel: int
) -> None:
    units = named(drawn)
    plans = plan_buckets(units, num_slices=2, bucket_numel=bucket_numel, small_numel=small_numel)
    gathered = [plan for plan in plans if not plan.keep_whole]
    numbers = [{int(each.fqn[4:].split(".")[0]) for each in plan.params} for plan in gathered]
    assert all(len(each) == 1 for each in numbers)
    order = [next(iter(each)) for each in numbers]
    assert order == sorted(order)


@EXAMPLES
@given(UNITS, LIMITS, SMALL, st.sampled_from([1, 2, 64, 1024]))
def test_which_parameters_share_a_bucket_does_not_depend_on_the_number_of_ranks(
    drawn: list[tuple[bool, list[ParamSpec]]], bucket_numel: int, small_numel: int, num_slices: int
) -> None:
    def cut(num_slices: int) -> list[tuple[str, tuple[ParamSpec, ...]]]:
        plans = plan_buckets(named(drawn), num_slices=num_slices, bucket_numel=bucket_numel, small_numel=small_numel)
        return [(plan.name, plan.params) for plan in plans]

    assert cut(num_slices) == cut(4)


def describe(plans: tuple[BucketPlan, ...]) -> list[tuple[str, list[str], bool]]:
    return [(plan.name, [each.fqn for each in plan.params], plan.keep_whole) for plan in plans]


def test_golden_buckets_of_a_small_gpt() -> None:
    units = [
        Unit("wte", (spec("wte", 50, 8), spec("wpe", 9, 8, trainable=False)), is_block=False),
        Unit("h.0", (spec("h.0.ln", 8), spec("h.0.up", 8, 32), spec("h.0.down", 32, 8)), is_block=True),
        Unit("h.1", (spec("h.1.ln", 8), spec("h.1.half", 8, 32, dtype=torch.bfloat16)), is_block=True),
        Unit("ln_f", (spec("ln_f", 8), spec("scale")), is_block=False),
    ]
    assert describe(plan_buckets(units, num_slices=2, bucket_numel=300, small_numel=8)) == [
        ("wte [1/2]", ["wte"], False),  # larger than a bucket may be, but never cut
        ("wte [2/2]", ["wpe"], False),  # frozen
        ("h.0 [1/2]", ["h.0.up"], False),
        ("h.0 [2/2]", ["h.0.down"], False),
        ("h.1", ["h.1.half"], False),
        ("small parameters", ["h.0.ln", "h.1.ln", "ln_f", "scale"], True),
    ]
    assert describe(plan_buckets(units, num_slices=2, bucket_numel=10**9)) == [
        ("wte [1/2]", ["wte"], False),
        ("wte [2/2]", ["wpe"], False),
        ("h.0", ["h.0.ln", "h.0.up", "h.0.down"], False),
        ("h.1 [1/2]", ["h.1.ln"], False),
        ("h.1 [2/2]", ["h.1.half"], False),
        ("ln_f", ["ln_f", "scale"], False),
    ]


def test_a_long_run_outside_blocks_is_cut_and_a_block_of_that_size_is_not() -> None:
    layers = tuple(spec(f"{index}", 1024, 1024) for index in range(16))  # a mebi-element each
    run, block = Unit("run", layers, is_block=False), Unit("block", layers, is_block=True)
    assert RUN_FLOOR_NUMEL == 2**20
    assert len(plan_buckets([run], num_slices=2, bucket_numel=10**9)) == 8
    assert len(plan_buckets([block], num_slices=2, bucket_numel=10**9)) == 1


def test_the_allowance_for_small_parameters_is_spent_in_order() -> None:
    units = [Unit("run", tuple(spec(f"{index}", 10) for index in range(4)), is_block=False)]
    plans = plan_buckets(units, num_slices=2, bucket_numel=10**9, small_numel=10, small_total_numel=25)
    assert describe(plans) == [("run", ["2", "3"], False), ("small parameters", ["0", "1"], True)]
