"""Pure: importance, cost, budget -> what to keep, close and grow."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from adaptrank.allocation.plans import Resize, apportion, exchange, keep_best, ranked, reallocate
from adaptrank.axes import CostModel, natural, rank_cost

NAMES = [f"layers.{i}.{name}:rank" for i in (0, 2, 10) for name in ("q", "v")]


def sizes_after(scores, plan):
    """Axis -> units, once the plan is carried out."""
    return {
        axis: len(plan[axis].keep) + plan[axis].grow if axis in plan else len(v)
        for axis, v in scores.items()
    }


def additive(prices, fixed=0):
    return CostModel(fixed, tuple((price, (axis,)) for axis, price in prices.items()))


@st.composite
def problem(draw, distinct=False, ranks=False, least=1):
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    counts = [draw(st.integers(least, 7)) for _ in names]
    values = st.floats(0, 10) if distinct else st.sampled_from([0.0, 0.5, 1.0, 2.0])
    flat = draw(st.lists(values, min_size=sum(counts), max_size=sum(counts), unique=distinct))
    scores, i = {}, 0
    for name, n in zip(names, counts, strict=True):
        scores[name] = torch.tensor(flat[i : i + n], dtype=torch.float64)
        i += n
    cost = (
        rank_cost(scores)
        if ranks
        else additive({name: draw(st.integers(1, 9)) for name in names}, draw(st.integers(0, 20)))
    )
    return scores, cost


def shuffled(scores, data):
    return {axis: scores[axis] for axis in data.draw(st.permutations(list(scores)))}


def permuted(scores, data):
    """The same scores with units in another order, and axis -> order."""
    orders = {axis: data.draw(st.permutations(range(len(v)))) for axis, v in scores.items()}
    return {axis: v[list(orders[axis])] for axis, v in scores.items()}, orders


# ---- keep_best


@given(problem(least=0), st.integers(0, 200), st.integers(0, 3))
def test_keep_best_holds_budget_and_floors(case, budget, floor):
    scores, cost = case
    floors = {axis: min(floor, len(v)) for axis, v in scores.items()}
    if cost.total(floors) > budget:
        with pytest.raises(ValueError, match=f"A budget of {budget} is below {cost.total(floors)}"):
            keep_best(scores, cost, budget, floor)
        return
    plan = keep_best(scores, cost, budget, floor)
    sizes = sizes_after(scores, plan)
    assert cost.total(sizes) <= budget
    assert all(sizes[axis] >= floors[axis] for axis in scores)
    for axis, v in scores.items():
        if sizes[axis] < len(v):  # within one unit: none of those that went would fit
            assert cost.total(sizes) + cost.marginal(axis, sizes) > budget
    for axis, change in plan.items():
        assert change.grow == 0
        assert list(change.keep) == sorted(set(change.keep))
        gone = set(range(len(scores[axis]))) - set(change.keep)
        assert gone
        least_kept = min((float(scores[axis][u]) for u in change.keep), default=math.inf)
        assert max(float(scores[axis][u]) for u in gone) <= least_kept


@given(problem(ranks=True), st.data())
def test_a_budget_in_ranks_is_met_exactly(case, data):
    scores, cost = case
    total = sum(len(v) for v in scores.values())
    budget = data.draw(st.integers(len(scores), total))
    assert sum(sizes_after(scores, keep_best(scores, cost, budget)).values()) == budget


@given(problem(ranks=True, distinct=True), st.data())
def test_with_equal_costs_the_best_are_kept(case, data):
    scores, cost = case
    budget = data.draw(st.integers(len(scores), sum(len(v) for v in scores.values())))
    plan = keep_best(scores, cost, budget)
    kept = {a: set(plan[a].keep) if a in plan else set(range(len(v))) for a, v in scores.items()}
    # Each axis keeps its best unit in any case. Of the others, no pruned unit is better than a kept
    # one.
    stays = [float(scores[a][u]) for a in scores for u in kept[a] - {ranked(scores[a])[0]}]
    goes = [float(v[u]) for a, v in scores.items() for u in set(range(len(v))) - kept[a]]
    assert max(goes, default=-1) < min(stays, default=11)


@given(problem(), st.integers(20, 200), st.data())
def test_keep_best_does_not_depend_on_the_order_of_axes(case, budget, data):
    scores, cost = case
    assume(cost.total(dict.fromkeys(scores, 1)) <= budget)
    assert keep_best(shuffled(scores, data), cost, budget) == keep_best(scores, cost, budget)


@given(problem(distinct=True), st.integers(20, 200), st.data())
def test_permuting_units_permutes_the_plan(case, budget, data):
    scores, cost = case
    assume(cost.total(dict.fromkeys(scores, 1)) <= budget)
    other, orders = permuted(scores, data)
    plan, twin = keep_best(scores, cost, budget), keep_best(other, cost, budget)
    assert plan.keys() == twin.keys()
    for axis in plan:
        assert sorted(orders[axis][unit] for unit in twin[axis].keep) == list(plan[axis].keep)


def test_ties_fall_in_natural_order():
    scores = {name: torch.zeros(3) for name in ("layers.10.q:rank", "layers.2.q:rank")}
    plan = keep_best(scores, rank_cost(scores), 4)
    assert plan == {"layers.10.q:rank": Resize((0,))}
    assert ranked(torch.tensor([1.0, 2.0, 1.0, 2.0])) == [1, 3, 0, 2]


def test_all_tied_scores_keep_exactly_the_budget():
    """The released rule, a threshold with <=, keeps none of 10 where 7 are asked for."""
    scores = {"a:rank": torch.zeros(10)}
    assert keep_best(scores, rank_cost(scores), 7) == {"a:rank": Resize(tuple(range(7)))}
    assert keep_best(scores, rank_cost(scores), 10) == {}


def test_value_is_score_per_cost():
    scores = {"cheap:rank": torch.tensor([9.0, 2.0]), "dear:rank": torch.tensor([9.0, 5.0])}
    cost = additive({"cheap:rank": 1, "dear:rank": 10})
    assert keep_best(scores, cost, 21) == {"dear:rank": Resize((0,))}
    assert keep_best(scores, rank_cost(scores), 3) == {"cheap:rank": Resize((0,))}


@given(
    st.lists(st.floats(0, 5), min_size=2, max_size=6),
    st.lists(st.floats(0, 5), min_size=2, max_size=6),
    st.integers(30, 200),
)
def test_costs_that_depend_on_a_neighbour(first, second, budget):
    """Two bonds of a tensor train: a unit of one costs more, the more units the other has."""
    scores = {"a:bond_1": torch.tensor(first), "a:bond_2": torch.tensor(second)}
    cost = CostModel(3, ((5, ("a:bond_1",)), (1, ("a:bond_1", "a:bond_2")), (7, ("a:bond_2",))))
    sizes = sizes_after(scores, keep_best(scores, cost, budget))
    assert cost.total(sizes) <= budget
    for axis, v in scores.items():
        assert sizes[axis] == len(v) or cost.total(sizes) + cost.marginal(axis, sizes) > budget


def test_infinite_scores():
    scores = {
        "a:rank": torch.tensor([float("-inf"), 1.0, float("inf")]),
        "b:rank": torch.tensor([0.0, float("-inf")]),
    }
    assert keep_best(scores, rank_cost(scores), 3) == {
        "a:rank": Resize((1, 2)),
        "b:rank": Resize((0,)),
    }


# ---- exchange


@settings(max_examples=100)
@given(
    problem(ranks=True, least=0),
    st.integers(0, 8),
    st.integers(1, 4),
    st.integers(0, 3),
    st.booleans(),
    st.data(),
)
def test_an_exchange_in_ranks_keeps_the_total(case, swaps, pool, floor, reference, data):
    scores, cost = case
    caps = {
        axis: data.draw(st.one_of(st.none(), st.integers(len(v), 9))) for axis, v in scores.items()
    }
    total = sum(len(v) for v in scores.values())
    plan = exchange(scores, cost, total, swaps, pool, floor, caps, reference)
    sizes = sizes_after(scores, plan)
    assert sum(sizes.values()) == total
    pruned = {
        axis: set(range(len(scores[axis]))) - set(change.keep) for axis, change in plan.items()
    }
    assert sum(map(len, pruned.values())) <= swaps
    for axis, change in plan.items():
        assert list(change.keep) == sorted(change.keep)
        assert len(change.keep) >= min(floor, len(scores[axis]))
        assert len(pruned[axis]) <= pool
        assert change.grow <= pool
        assert caps[axis] is None or sizes[axis] <= caps[axis]


@settings(max_examples=100)
@given(problem(), st.integers(0, 8), st.integers(1, 4), st.integers(0, 10), st.booleans())
def test_an_exchange_in_parameters_stays_within_one_unit(case, swaps, pool, slack, reference):
    scores, cost = case
    sizes = {axis: len(v) for axis, v in scores.items()}
    budget = cost.total(sizes) + slack
    plan = exchange(scores, cost, budget, swaps, pool, reference=reference)
    after = sizes_after(scores, plan)
    assert cost.total(after) <= budget
    winners = [axis for axis, change in plan.items() if change.grow]
    for axis in winners:  # what is left over buys none of them a further unit
        assert cost.total(after) + cost.marginal(axis, after) > budget


def test_cheap_winners_spend_what_dear_units_freed():
    scores = {
        "dear:rank": torch.tensor([0.1, 0.2, 0.3, 0.4]),
        "cheap:rank": torch.tensor([8.0, 9.0]),
    }
    cost = additive({"dear:rank": 1000, "cheap:rank": 10})
    plan = exchange(scores, cost, cost.total({"dear:rank": 4, "cheap:rank": 2}), swaps=1, pool=1)
    assert plan == {"dear:rank": Resize((1, 2, 3)), "cheap:rank": Resize((0, 1), 100)}


@given(problem(), st.integers(1, 8), st.integers(1, 4), st.data())
def test_an_exchange_does_not_depend_on_the_order_of_axes(case, swaps, pool, data):
    scores, cost = case
    budget = cost.total({axis: len(v) for axis, v in scores.items()})
    assert exchange(shuffled(scores, data), cost, budget, swaps, pool) == exchange(
        scores, cost, budget, swaps, pool
    )


@given(problem(distinct=True), st.integers(1, 8), st.integers(1, 4), st.data())
def test_permuting_units_permutes_the_exchange(case, swaps, pool, data):
    scores, cost = case
    budget = cost.total({axis: len(v) for axis, v in scores.items()})
    other, orders = permuted(scores, data)
    plan, twin = (
        exchange(scores, cost, budget, swaps, pool),
        exchange(other, cost, budget, swaps, pool),
    )
    assert plan.keys() == twin.keys()
    for axis in plan:
        assert twin[axis].grow == plan[axis].grow
        assert sorted(orders[axis][unit] for unit in twin[axis].keep) == list(plan[axis].keep)


def test_the_weakest_go_and_those_whose_weakest_matter_grow():
    scores = {
        "a:rank": torch.tensor([0.1, 5.0, 0.2]),
        "b:rank": torch.tensor([3.0, 4.0]),
        "c:rank": torch.tensor([1.0, 9.0]),
    }
    plan = exchange(scores, rank_cost(scores), 7, swaps=2, pool=2)
    # c's best unit wins because c offers it in its pool of two, not because it is the best.
    assert plan == {
        "a:rank": Resize((1,)),
        "b:rank": Resize((0, 1), 1),
        "c:rank": Resize((0, 1), 1),
    }


@pytest.mark.parametrize("reference", [False, True])
def test_rank_one_everywhere_is_left_alone(reference):
    scores = {axis: torch.rand(1) for axis in NAMES}
    assert exchange(scores, rank_cost(scores), 6, 4, 2, reference=reference) == {}


def test_all_at_their_caps_and_one_axis_alone():
    scores = {axis: torch.rand(3) for axis in NAMES}
    assert exchange(scores, rank_cost(scores), 18, 4, 2, caps=dict.fromkeys(scores, 3)) == {}
    one = {"a:rank": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    plan = exchange(one, rank_cost(one), 4, 4, 2)
    assert sizes_after(one, plan) == {"a:rank": 4}


def test_an_axis_at_its_cap_is_skipped_and_the_next_best_wins():
    scores = {
        "a:rank": torch.tensor([9.0, 9.0]),
        "b:rank": torch.tensor([5.0, 5.0]),
        "c:rank": torch.tensor([0.1, 0.2]),
    }
    free = exchange(scores, rank_cost(scores), 6, 1, 1)
    capped = exchange(scores, rank_cost(scores), 6, 1, 1, caps={"a:rank": 2})
    assert free == {"a:rank": Resize((0, 1), 1), "c:rank": Resize((1,))}
    assert capped == {"b:rank": Resize((0, 1), 1), "c:rank": Resize((1,))}


def test_no_swap_leaves_the_pattern():
    scores = {axis: torch.rand(3) for axis in NAMES}
    assert exchange(scores, rank_cost(scores), 18, 0) == {}


def test_an_axis_of_one_unit_can_grow_again_only_with_two_pools():
    """The absorbing state of the released rule."""
    scores = {
        "fell:rank": torch.tensor([9.0]),
        "b:rank": torch.tensor([1.0, 2.0]),
        "c:rank": torch.tensor([0.5, 3.0]),
    }
    two = exchange(scores, rank_cost(scores), 5, 1, 2)
    assert two["fell:rank"] == Resize((0,), 1)
    assert "fell:rank" not in exchange(scores, rank_cost(scores), 5, 1, 2, reference=True)


def test_the_sort_key_is_natural():
    assert sorted(NAMES, key=natural) == NAMES


@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=8
    ),
    st.integers(0, 2),
    st.integers(0, 200),
)
def test_apportioned_sizes_spend_the_budget_within_floors_and_caps(axes, floor, more):
    weights = {f"{i}:rank": w for i, (w, _, _) in enumerate(axes)}
    caps = {f"{i}:rank": max(cap, floor) for i, (_, _, cap) in enumerate(axes)}
    for costs in ([1] * len(axes), [c for _, c, _ in axes]):
        cost = CostModel(0, tuple((c, (axis,)) for c, axis in zip(costs, weights, strict=True)))
        budget = cost.total(dict.fromkeys(weights, floor)) + more
        sizes = apportion(weights, cost, budget, floor, caps)
        assert all(floor <= sizes[a] <= caps[a] for a in sizes)
        total = cost.total(sizes)
        assert total <= budget
        assert all(sizes[a] == caps[a] or total + cost.marginal(a, sizes) > budget for a in sizes)
        shuffled = apportion(dict(reversed(list(weights.items()))), cost, budget, floor, caps)
        assert shuffled == sizes


def test_apportioned_by_largest_remainder():
    cost = rank_cost("abc")
    assert apportion({"a": 5, "b": 3, "c": 2}, cost, 10) == {"a": 5, "b": 3, "c": 2}
    assert apportion({"a": 2, "b": 1.5, "c": 1.5}, cost, 6) == {"a": 2, "b": 2, "c": 2}
    assert apportion({"a": 9, "b": 1, "c": 0}, cost, 12) == {"a": 10, "b": 1, "c": 1}
    assert apportion({"a": 9, "b": 1, "c": 0}, cost, 12, caps={"a": 4}) == {"a": 4, "b": 7, "c": 1}
    assert apportion({"a": 0, "b": 0, "c": 0}, cost, 7) == {"a": 3, "b": 2, "c": 2}
    with pytest.raises(ValueError, match="every weight has to be a number"):
        apportion({"a": float("nan")}, rank_cost("a"), 3)
    with pytest.raises(ValueError, match="A budget of 2 is below 3"):
        apportion({"a": 1, "b": 1, "c": 1}, cost, 2)


@given(problem(least=0), st.integers(0, 1), st.integers(1, 30), st.booleans(), st.integers(0, 40))
def test_a_round_of_reallocation(problem, floor, units, capped, spare):
    scores, cost = problem
    sizes = {axis: len(values) for axis, values in scores.items()}
    caps = {axis: size + 2 for axis, size in sizes.items()} if capped else {}
    before = cost.total(sizes)
    budget = before + spare  # of an earlier round in which every axis lost a unit
    plan = reallocate(scores, cost, budget, units, floor, caps)
    after = sizes_after(scores, plan)
    assert cost.total(after) <= before
    assert all(size >= min(floor, sizes[a]) for a, size in after.items())
    assert any(after.values()) or not any(sizes.values())
    assert all(after[a] <= caps[a] for a in caps)
    assert not any(change.grow and len(change.keep) < sizes[a] for a, change in plan.items()), (
        "who lost one gains none"
    )
    assert plan == reallocate(
        dict(reversed(list(scores.items()))), cost, budget, units, floor, caps
    )


def test_eight_units_over_three_axes_are_3_3_2():
    scores = {f"{i}": torch.arange(8).double() for i in "abcd"}
    scores["b"], scores["c"], scores["d"] = (scores["a"] + 100 + k for k in (0, 2, 1))
    scores["a"] = torch.cat([scores["a"], torch.tensor([8.0])]).double()
    cost = rank_cost(scores)
    plan = reallocate(scores, cost, 33, 8)
    assert plan["a"] == Resize((8,))
    assert {axis: plan[axis].grow for axis in "bcd"} == {"c": 3, "d": 3, "b": 2}


def test_where_every_axis_lost_a_unit_nothing_is_added():
    scores = {axis: torch.tensor([0.0, 5.0, 6.0]) for axis in "abc"}
    plan = reallocate(scores, rank_cost(scores), 9, 3)
    assert plan == {axis: Resize((1, 2)) for axis in "abc"}
