"""Gate Hessians, the greedy choice, and what it predicts."""

import itertools
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ablation import Here, bert, llama
from test_allocators import SVD4, Toy
from torch import nn

from adaptrank.allocation.scores.curvature import SecondOrder, estimate
from adaptrank.allocation.scores.explained_variance import explained_variance
from adaptrank.allocation.scores.single_examples import examples
from adaptrank.allocation.scores.submodular import as_plan, greedy
from adaptrank.axes import CostModel, rank_axes, rank_cost
from adaptrank.parameterizations import DoRA, LoRA, TensorTrain
from adaptrank.testing import perturb


def problem(n=10, seed=0, axes=1, gradient=0.02):
    """A Gauss-Newton Hessian in gates at c, with a small gradient, as near a stationary point."""
    random = torch.Generator().manual_seed(seed)
    J = torch.randn(30, n, generator=random, dtype=torch.float64)
    c = torch.randn(n, generator=random, dtype=torch.float64)
    M = (J.T @ J / 30) * torch.outer(c, c)
    g = gradient * torch.randn(n, generator=random, dtype=torch.float64) * c
    units = [
        (f"layers.{i * axes // n}:rank", i - math.ceil((i * axes // n) * n / axes))
        for i in range(n)
    ]
    return SecondOrder(units, g, [(0, M)])


def projected_change(second, discarded):
    P = [(i, M.clamp_min(0)) for i, M in second.blocks]
    for (_, Q), (_, M) in zip(P, second.blocks, strict=True):
        Q.diagonal().copy_(M.diagonal())
    return SecondOrder(second.units, second.g, P).change(discarded)


def best(second, keep):
    n = len(second.units)
    return min(
        second.change([i for i in range(n) if i not in kept])
        for kept in itertools.combinations(range(n), keep)
    )


def test_greedy_is_near_the_best_choice_in_the_worst_of_fifty():
    """As a share of the reduction that the best choice makes against discarding all."""
    worst = 1.0
    for seed in range(50):
        second = problem(seed=seed)
        kept, _ = greedy(second, rank_cost(dict(second.units)), 4, floor=0)
        everything = second.change(range(10))
        left = second.change([i for i in range(10) if i not in kept])
        worst = min(worst, (everything - left) / (everything - best(second, 4)))
    assert worst >= 0.85


@given(st.integers(0, 10**6), st.data())
@settings(max_examples=60)
def test_the_projected_gain_is_submodular(seed, data):
    second = problem(n=6, seed=seed)
    S = set(data.draw(st.lists(st.integers(0, 5), unique=True, max_size=4)))
    T = S | set(data.draw(st.lists(st.integers(0, 5), unique=True, max_size=2)))
    i = data.draw(st.integers(0, 5).filter(lambda i: i not in T)) if len(T) < 6 else None
    if i is None:
        return

    def gain(kept):
        out = [j for j in range(6) if j not in kept]
        return projected_change(second, out) - projected_change(second, [j for j in out if j != i])

    assert gain(S) >= gain(T) - 1e-12


def plain_greedy(second, cost, budget, floor):
    """The same without a heap: every gain anew at each step."""
    n, kept, axes = len(second.units), [], [axis for axis, _ in second.units]
    sizes = dict.fromkeys(axes, 0)
    floors = {axis: min(floor, axes.count(axis)) for axis in axes}

    def gain(i):
        out = [j for j in range(n) if j not in kept]
        return projected_change(second, out) - projected_change(second, [j for j in out if j != i])

    for needs in (True, False):
        while True:
            may = [
                i
                for i in range(n)
                if i not in kept
                and (
                    sizes[axes[i]] < floors[axes[i]]
                    if needs
                    else cost.total(sizes) + cost.marginal(axes[i], sizes) <= budget
                )
            ]
            if not may:
                break
            i = max(may, key=lambda i: (round(gain(i), 12), -i))
            kept.append(i)
            sizes[axes[i]] += 1
    return kept


@pytest.mark.parametrize("seed", range(8))
def test_the_heap_chooses_as_the_plain_algorithm(seed):
    second = problem(n=9, seed=seed, axes=3)
    cost = rank_cost(dict.fromkeys(axis for axis, _ in second.units))
    kept, _ = greedy(second, cost, 5, floor=1)
    assert sorted(kept) == sorted(plain_greedy(second, cost, 5, 1))


@given(
    st.integers(0, 1000), st.integers(1, 4), st.integers(0, 2), st.integers(0, 30), st.booleans()
)
@settings(max_examples=60)
def test_budget_and_floors_hold(seed, axes, floor, more, priced):
    second = problem(n=8, seed=seed, axes=axes)
    names = list(dict.fromkeys(axis for axis, _ in second.units))
    price = {axis: 1 + 2 * i if priced else 1 for i, axis in enumerate(names)}
    cost = CostModel(0, tuple((price[a], (a,)) for a in names))
    least = {a: min(floor, sum(x == a for x, _ in second.units)) for a in names}
    budget = cost.total(least) + more
    kept, _ = greedy(second, cost, budget, floor)
    sizes = {a: sum(second.units[i][0] == a for i in kept) for a in names}
    assert cost.total(sizes) <= budget
    assert all(sizes[a] >= least[a] for a in names)
    full = {a: sum(x == a for x, _ in second.units) for a in names}
    assert all(
        sizes[a] == full[a] or cost.total(sizes) + cost.marginal(a, sizes) > budget for a in names
    )
    plan = as_plan(second, kept)
    assert {a: len(plan[a].keep) if a in plan else full[a] for a in names} == sizes


def test_what_would_help_by_going_may_go():
    second = SecondOrder(
        [("a", 0), ("a", 1)], torch.tensor([1.0, -1.0]).double(), [(0, torch.eye(2).double())]
    )
    cost = rank_cost(["a"])
    kept, monotone = greedy(second, cost, 2, floor=0, stop=True)
    assert kept == [1]
    assert not monotone
    assert sorted(greedy(second, cost, 2, floor=0)[0]) == [0, 1]


@pytest.mark.parametrize(
    "method",
    [
        partial(LoRA, rank=3),
        SVD4,
        partial(TensorTrain),
        partial(DoRA, rank=2, **DoRA.exact_gradient),
    ],
)
def test_on_a_quadratic_loss_the_prediction_is_the_change(method):
    """The output of LoRA is linear in gates of its closing factor.

    The loss is quadratic in the output.
    """
    model = Toy(method, dtype=torch.float64)
    for layer in model.maps:
        perturb(layer, std=0.3)
    run = Here(model, lambda batch: model.loss(batch), [0])
    axes = rank_axes(model)
    second = estimate(axes, run, "exact")
    linear = (method not in (TensorTrain,) and not isinstance(method, partial)) or method.func in (
        LoRA,
    )
    discarded = [0, 2, 5] if linear else [0]
    before = float(run.loss(0))
    key_units = [second.units[i] for i in discarded]
    gates = {key: torch.ones(len(axis), dtype=torch.float64) for key, axis in axes.items()}
    for key, unit in key_units:
        gates[key][unit] = 0
    contexts = [axes[key].gated(gates[key]) for key in axes]
    for context in contexts:
        context.__enter__()
    after = float(run.loss(0))
    for context in reversed(contexts):
        context.__exit__(None, None, None)
    if linear or method.func is not DoRA:
        assert second.change(discarded) == pytest.approx(after - before, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("make", [llama, bert])
def test_the_exact_hessian_is_that_of_finite_differences(make):
    run = make()
    axes = dict(list(rank_axes(run.model).items())[:2])
    second = estimate(axes, run, "exact")
    ((_, M),) = second.blocks
    # A Llama takes its norms and its loss to float32, too coarse for small differences.
    (h, rel, absolute), n = (
        ((0.03, 0.05, 1e-3) if make is llama else (1e-4, 1e-3, 1e-5)),
        len(second.units),
    )

    def loss(point):
        gates, contexts = (
            {key: torch.ones(len(axis), dtype=torch.float64) for key, axis in axes.items()},
            [],
        )
        for (key, unit), step in zip(second.units, point, strict=True):
            gates[key][unit] += step
        for key, axis in axes.items():
            contexts.append(axis.gated(gates[key]))
            contexts[-1].__enter__()
        value = sum(float(run.loss(b).detach()) for b in run.examples) / len(run.examples)
        for context in reversed(contexts):
            context.__exit__(None, None, None)
        return value

    eye = torch.eye(n) * h
    for i, j in ((0, 0), (0, 1), (1, n - 1)):
        want = (
            loss(eye[i] + eye[j])
            - loss(eye[i] - eye[j])
            - loss(eye[j] - eye[i])
            + loss(-eye[i] - eye[j])
        ) / (4 * h * h)
        assert float(M[i, j]) == pytest.approx(want, rel=rel, abs=absolute)


@pytest.mark.tables
def test_fisher_is_the_hessian_of_a_gaussian_model_up_to_sampling():
    """y = sum_u g_u U_u x + noise of unit variance, with the negative log likelihood as loss.

    At the true gates both matrices are E[x' U_u' U_v x].
    """
    torch.manual_seed(0)
    base = nn.Linear(4, 4, bias=False).double()
    nn.init.zeros_(base.weight)
    model = nn.Sequential(LoRA(base, rank=3, alpha=3))
    perturb(model[0], std=0.7)
    x = torch.randn(6000, 4).double()
    y = model(x).detach() + torch.randn(6000, 4).double()
    run = Here(model, lambda b: (model(b[0]) - b[1]).square().sum(1).mean() / 2, [(x, y)])
    axes = rank_axes(model)
    exact = estimate(axes, run, "exact").blocks[0][1]
    fisher = estimate(axes, run, "fisher").blocks[0][1]
    torch.testing.assert_close(fisher, exact, rtol=0.1, atol=0.05 * float(exact.abs().max()))
    block = estimate(axes, run, "block").blocks[0][1]
    torch.testing.assert_close(block, fisher)


def test_single_examples_of_a_batch():
    batch = {
        "x": torch.arange(3),
        "more": [torch.zeros(3, 2), (torch.ones(3),)],
        "k": 7,
        "scalar": torch.tensor(1.0),
    }
    parts = list(examples(batch))
    assert len(parts) == 3
    assert parts[1]["x"].tolist() == [1]
    assert parts[1]["more"][0].shape == (1, 2)
    assert parts[1]["k"] == 7
    odd = {"x": torch.zeros(3), "y": torch.zeros(2)}
    assert list(examples(odd)) == [odd], "a batch whose parts disagree is taken whole"
    assert list(examples(5)) == [5]


def test_a_unit_that_is_off_is_the_lowest():
    model = Toy(partial(LoRA, rank=3), dtype=torch.float64)
    for layer in model.maps:
        perturb(layer, std=0.3)
        layer.B.data[:, 1] = 0
    run = Here(model, lambda batch: model.loss(batch), [0])
    second = estimate(rank_axes(model), run, "exact")
    for i, (_, unit) in enumerate(second.units):
        assert (abs(float(second.g[i])) < 1e-12) == (unit == 1)


@pytest.mark.parametrize("method", [partial(LoRA, rank=3), TensorTrain])
def test_explained_variance_is_that_of_each_units_own_change(method):
    model = Toy(method, dtype=torch.float64)
    for layer in model.maps:
        perturb(layer, std=0.3)
    run = Here(model, lambda batch: model.loss(batch), [0, 1])
    axes = rank_axes(model)
    have = explained_variance(axes, run)
    x = torch.cat(
        [torch.randn(8, 16, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    ).double()
    for key, axis in axes.items():
        layer = axis.members[0][0]
        parts = []
        with torch.no_grad():
            for unit in range(len(axis)):
                with axis.closed([u for u in range(len(axis)) if u != unit]):
                    change = layer.dense()
                with axis.closed(range(len(axis))):
                    change = change - layer.dense()
                parts.append(float((x @ change.T).square().sum()))
        want = torch.tensor(parts, dtype=torch.float64) / sum(parts)
        torch.testing.assert_close(have[key], want, rtol=1e-8, atol=1e-10)
