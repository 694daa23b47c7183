"""The plan of joins loses no call, stays within the budget, and keeps what is urgent in front."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcore.comm.calls.joins import JoinCall, plan_joins
from zcore.core.errors import ConfigError

calls_of_any_kind = st.lists(
    st.builds(
        JoinCall,
        kind=st.sampled_from(["gather", "sum", "sum of bf16", None]),
        num_bytes=st.integers(0, 20),
        priority=st.integers(-2, 2),
    ),
    max_size=40,
)
budgets = st.integers(1, 30)


@given(calls_of_any_kind, budgets)
def test_every_call_goes_once_with_its_kind_and_within_the_budget(calls, budget):
    groups = plan_joins(calls, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(calls)))
    for group in groups:
        assert len({calls[index].kind for index in group}) == 1
        if len(group) > 1:
            assert calls[group[0]].kind is not None
            assert sum(calls[index].num_bytes for index in group) <= budget


@given(calls_of_any_kind, budgets)
def test_groups_start_by_priority_and_nobody_starts_behind_a_less_urgent_call(calls, budget):
    places = [(calls[group[0]].priority, group[0]) for group in plan_joins(calls, budget)]
    assert places == sorted(places)
    for group in plan_joins(calls, budget):
        assert list(group) == sorted(group, key=lambda index: (calls[index].priority, index))


@given(calls_of_any_kind, budgets)
def test_groups_that_follow_each_other_would_not_fit_together(calls, budget):
    total_before = {}
    for group in plan_joins(calls, budget):
        first = calls[group[0]]
        if first.kind is None or first.num_bytes >= budget:
            continue  # goes alone, and those around it join each other
        assert total_before.get(first.kind, budget + 1) + first.num_bytes > budget
        total_before[first.kind] = sum(calls[index].num_bytes for index in group)


@pytest.mark.parametrize(
    ("calls", "groups"),
    [
        ([], []),
        ([("a", 0, 0)], [(0,)]),
        ([("a", 5, 0), ("a", 5, 0), ("a", 1, 0)], [(0, 1), (2,)]),
        ([("a", 5, 0), ("b", 5, 0), ("a", 5, 0), ("b", 5, 0)], [(0, 2), (1, 3)]),
        ([("a", 4, 0), ("a", 20, 0), ("a", 4, 0)], [(0, 2), (1,)]),  # a large one goes alone, and parts nobody
        ([("a", 4, 1), ("a", 4, 0), ("b", 4, -1)], [(2,), (1, 0)]),
        ([(None, 1, 0), (None, 1, 0)], [(0,), (1,)]),
        ([("a", 0, 0), ("a", 10, 0), ("a", 0, 0)], [(0, 1, 2)]),
    ],
)
def test_the_plan_is_what_the_table_says(calls, groups):
    assert plan_joins([JoinCall(*call) for call in calls], 10) == groups


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="budget of joined calls is 0 bytes; expected 1 or more"):
        plan_joins([], 0)
