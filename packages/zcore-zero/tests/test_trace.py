"""The order of uses: what it lets us start early, when a step leaves it, and what comes back soon."""

from hypothesis import given, settings
from hypothesis import strategies as st

from zcore.zero.trace import Pass, Trace, Use, plan_prefetch

FORWARD, BACKWARD = Pass.FORWARD, Pass.BACKWARD
EXAMPLES = settings(deadline=None, derandomize=True, max_examples=100)
STEPS = st.lists(st.builds(Use, st.integers(0, 4), st.sampled_from(Pass)), max_size=12)


def uses(*buckets: int, during: Pass = FORWARD) -> list[Use]:
    return [Use(bucket, during) for bucket in buckets]


def run(trace: Trace, step: list[Use]) -> list[bool]:
    trace.begin()
    return [trace.add(use) for use in step]


def planned(upcoming: list[Use], *, held: tuple[int, ...] = (), budget_numel: int) -> list[int]:
    """With buckets of 10 elements."""
    return plan_prefetch(
        upcoming, numel_of=lambda _: 10, is_held=lambda bucket: bucket in held, budget_numel=budget_numel
    )


def test_nothing_is_expected_in_the_first_step() -> None:
    trace = Trace()
    trace.begin()
    trace.add(Use(0, FORWARD))
    assert list(trace.upcoming) == []


def test_the_second_step_expects_what_the_first_one_did() -> None:
    trace = Trace()
    step = uses(0, 1, 2) + uses(2, 1, 0, during=BACKWARD)
    run(trace, step)
    trace.begin()
    assert list(trace.upcoming) == step
    trace.add(step[0])
    assert list(trace.upcoming) == step[1:]


def test_a_departure_is_told_once_and_ends_expectations_for_this_step_only() -> None:
    trace = Trace()
    run(trace, uses(0, 1, 2, 3))
    assert run(trace, uses(0, 2, 3, 1)) == [True, False, True, True]
    assert trace.left_at == 1
    assert list(trace.upcoming) == []
    trace.begin()
    assert trace.left_at is None
    assert list(trace.upcoming) == uses(0, 2, 3, 1)


def test_a_step_that_goes_on_where_the_recorded_one_ended_is_no_departure() -> None:
    trace = Trace()
    run(trace, uses(0, 1))
    assert run(trace, uses(0, 1, 2)) == [True, True, True]
    assert list(trace.upcoming) == []


def test_the_same_use_twice_in_a_row_is_one() -> None:
    trace = Trace()
    run(trace, uses(0, 0, 1, 1, 0))
    trace.begin()
    assert list(trace.upcoming) == uses(0, 1, 0)


def test_a_forward_without_uses_keeps_what_was_recorded() -> None:
    trace = Trace()
    run(trace, uses(0, 1))
    trace.begin()
    trace.begin()
    assert list(trace.upcoming) == uses(0, 1)


@EXAMPLES
@given(STEPS)
def test_a_repeated_step_never_departs_and_expects_nothing_at_its_end(step: list[Use]) -> None:
    trace = Trace()
    run(trace, step)
    assert all(run(trace, step))
    assert list(trace.upcoming) == []


@EXAMPLES
@given(STEPS, STEPS)
def test_any_step_is_followed_and_reports_at_most_one_departure(first: list[Use], second: list[Use]) -> None:
    trace = Trace()
    run(trace, first)
    assert run(trace, second).count(False) <= 1
    run(trace, second)
    assert trace.left_at is None


def test_prefetch_takes_the_next_buckets_within_the_budget() -> None:
    upcoming = uses(1, 2, 3, 4)
    assert planned(upcoming, budget_numel=25) == [1, 2]
    assert planned(upcoming, budget_numel=30) == [1, 2, 3]
    assert planned(upcoming, budget_numel=9) == []
    assert planned(upcoming, budget_numel=-5) == []
    assert planned(upcoming, budget_numel=10**9) == [1, 2, 3, 4]


def test_prefetch_skips_what_is_held_and_plans_nothing_twice() -> None:
    assert planned(uses(1, 2, 1, 3), held=(2,), budget_numel=20) == [1, 3]


def test_prefetch_never_overtakes_a_bucket_that_is_too_large() -> None:
    numels = {1: 10, 2: 1000, 3: 10}
    found = plan_prefetch(uses(1, 2, 3), numel_of=numels.__getitem__, is_held=lambda _: False, budget_numel=50)
    assert found == [1]


def test_prefetch_looks_from_the_end_of_the_forward_into_the_backward() -> None:
    assert planned(uses(3) + uses(3, 2, during=BACKWARD), held=(3,), budget_numel=10) == [2]


def test_a_bucket_returns_if_it_comes_again_in_the_same_pass_soon_enough() -> None:
    trace = Trace(numel_of=lambda _: 10)
    run(trace, uses(1, 2, 0) + uses(5, during=BACKWARD))
    trace.begin()

    def returns(use: Use, distance_numel: int) -> bool:
        return trace.returns_within(use, distance_numel=distance_numel)

    assert returns(Use(0, FORWARD), 20)
    assert not returns(Use(0, FORWARD), 19)
    assert returns(Use(1, FORWARD), 0)
    assert not returns(Use(5, BACKWARD), 1000)  # only in the other pass
    assert not returns(Use(7, FORWARD), 1000)
    trace.add(Use(1, FORWARD))
    assert not returns(Use(1, FORWARD), 1000)  # it does not come again
    trace.add(Use(0, FORWARD))
    assert not returns(Use(0, FORWARD), 1000)  # nothing is expected any more


@EXAMPLES
@given(STEPS, st.integers(0, 12), st.integers(0, 60))
def test_what_returns_is_what_a_walk_through_the_upcoming_finds(step: list[Use], at: int, distance: int) -> None:
    trace = Trace(numel_of=lambda bucket: 3 * bucket + 1)
    run(trace, step)
    run(trace, step[:at])
    for use in [Use(bucket, during) for bucket in range(5) for during in Pass]:
        passed, expected = 0, False
        for other in trace.upcoming:
            if other == use:
                expected = passed <= distance
                break
            if other.during is not use.during:
                break
            passed += 3 * other.bucket + 1
        assert trace.returns_within(use, distance_numel=distance) == expected
