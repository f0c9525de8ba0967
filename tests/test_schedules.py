"""Pure: optimizer step -> event, budget, swaps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaptrank.allocation.schedules import Phases, cubic, late_drop, steps


def test_the_swap_table_of_the_spec():
    progress = [0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1]
    assert [late_drop(4, p) for p in progress] == [4, 4, 4, 3, 3, 2, 1, 1, 0]


def test_halves_round_up():
    assert late_drop(1, 0.5 ** (1 / 3)) == 1
    assert late_drop(3, 0.5 ** (1 / 3)) == 2


@given(st.integers(0, 100), st.integers(0, 100), st.integers(1, 200))
def test_cubic(start, fall, n):
    target = max(0, start - fall)
    curve = [cubic(start, target, i / n) for i in range(n + 1)]
    assert curve[0] == start
    assert curve[-1] == target
    assert curve == sorted(curve, reverse=True)
    for i, value in enumerate(curve):
        exact = target + (start - target) * (1 - i / n) ** 3
        assert exact - 1 - 1e-6 < value <= exact + 1e-6


def test_cubic_is_floor_of_the_formula_and_float_noise_does_not_take_one_away():
    assert cubic(48, 18, 0.5) == math.floor(18 + 30 / 8)
    assert cubic(10, 2, 1 - 0.5) == 3  # exactly 3
    assert cubic(37, 10, 1 - 1 / 3) == 11  # 10 + 27 / 27, not 10.999...
    assert cubic(18, 18, 0.3) == 18


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.integers(1, 50))
def test_phases(total, warmup, final, every):
    phases = Phases(total, warmup, final, every)
    events = [step for step in range(-5, total + 50) if phases.is_event(step)]
    assert events == phases.events()
    assert all(warmup < step <= total - final for step in events)
    assert len(events) == max(0, math.ceil((phases.end - warmup) / every))
    if events:
        assert events[-1] == phases.end
        assert {(step - warmup) % every for step in events[:-1]} <= {0}
        assert phases.progress(events[-1]) == 1
    values = [phases.progress(step) for step in range(total + 1)]
    assert values == sorted(values)
    assert all(0 <= value <= 1 for value in values)


def test_progress_is_a_fraction_of_the_middle_phase():
    phases = Phases(100, 10, 40, 20)
    assert phases.events() == [30, 50, 60]
    assert [phases.progress(step) for step in (0, 10, 35, 60, 100)] == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize(
    ("amount", "total", "want"),
    [(7, 100, 7), (0.1, 100, 10), (1, 100, 1), (1.0, 100, 100), (0, 9, 0)],
)
def test_steps(amount, total, want):
    assert steps(amount, total) == want


@pytest.mark.parametrize("amount", [-1, -0.5, 1.5])
def test_lengths_that_are_none(amount):
    with pytest.raises(ValueError, match="Give whole steps, or a fraction from"):
        steps(amount, 10)
