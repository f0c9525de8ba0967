"""Allocation down to no units: it is found where it is right, survived, and left again."""

import io
from functools import partial

import pytest
import torch
from test_pairs import SHORT, TABLE, Stack, build
from torch import nn

from adaptrank.allocation import (
    ALLOCATORS,
    EVA,
    AdaLoRA,
    ALoRA,
    DynamicRank,
    ElaLoRA,
    RankInitializer,
    SoRA,
    SubLoRA,
)
from adaptrank.allocation.context import Run, ScoreContext
from adaptrank.allocation.plans import Resize, apportion, exchange, keep_best, reallocate
from adaptrank.allocation.scores.curvature import SecondOrder
from adaptrank.allocation.scores.importance import IMPORTANCES, importance
from adaptrank.allocation.scores.submodular import as_plan, greedy
from adaptrank.allocation.scores.virtual_gates import dense_grad
from adaptrank.allocation.state import Progress, TrackedTensors
from adaptrank.axes import CostModel, fit_ranks, rank_axes, rank_cost
from adaptrank.injection import adapt
from adaptrank.parameterizations import (
    NOLA,
    PARAMETERIZATIONS,
    SVD,
    DoRA,
    Kronecker,
    LoRA,
    PiCa,
    TensorTrain,
    on_example,
)
from adaptrank.testing import perturb, trainable

# ---- one layer of four matters, and the budget is one unit a layer


SIDE, IMPORTANT, STEPS = 12, 2, 70
FAST = {"every": 5, "warmup": 15, "final": 15}


class One(nn.Module):
    """Four maps that are zero. The target of one has rank 4, the other targets are noise alone."""

    def __init__(self, method, seed):
        super().__init__()
        torch.manual_seed(seed)
        maps = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(4)]
        for base in maps:
            nn.init.zeros_(base.weight)
        self.maps = nn.ModuleList(method(base) for base in maps)
        self.directions = torch.linalg.qr(torch.randn(SIDE, SIDE)).Q[:, :4]
        self.target = self.directions @ torch.randn(4, SIDE)
        self.random = torch.Generator().manual_seed(seed)

    def draw(self):
        x = torch.randn(32, 4, SIDE, generator=self.random)
        y = 0.1 * torch.randn(32, 4, SIDE, generator=self.random)
        y[:, IMPORTANT] += x[:, IMPORTANT] @ self.target.T
        return x, y

    def loss(self, batch):
        x = batch[0].unbind(1)
        out = torch.stack([layer(rows) for layer, rows in zip(self.maps, x, strict=True)], 1)
        return (out - batch[1]).square().sum(-1).mean()


def final_ranks(allocator, method, seed=0, weight_decay=0.0):
    model = One(method, seed)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-2, weight_decay=weight_decay)
    batches = [model.draw() for _ in range(4)]
    allocator.start(model, optimizer, STEPS, batches=batches, loss=model.loss)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model.loss(model.draw()).backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
    allocator.finish()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    return [len(axis) for axis in rank_axes(model).values()]


FOUND = {
    "AdaLoRA": (4, lambda: AdaLoRA(4, **FAST)),
    "AdaLoRA, hard": (4, lambda: AdaLoRA(4, soft=False, **FAST)),
    "SoRA": (4, lambda: SoRA(4, xi=0.02, gate_lr_ratio=4.0, **FAST)),
    "SubLoRA": (4, lambda: SubLoRA(4, "published", 1, **FAST | {"every": 30, "warmup": 25})),
    "ElaLoRA, floor 0": (1, lambda: ElaLoRA(floor=0, swaps=1, **FAST | {"every": 10})),
    # Its rule moves a unit in every round, so it stops at the third.
    "ALoRA": (1, lambda: ALoRA(units=1, rounds=3, batches=4, **FAST | {"every": 13})),
}
"""Name -> (rank of each layer at the start, allocator). The budget is four units of four layers."""
ROWS = [*((name, LoRA, 0) for name in FOUND), ("AdaLoRA", SVD, 0), ("SoRA", SVD, 0)]
MORE = [
    *((name, LoRA, seed) for name in FOUND for seed in (1, 2)),
    # ALoRA's scores on four batches are too noisy for the SVD form at two of these three seeds.
    *((name, SVD, seed) for name in FOUND if name != "ALoRA" for seed in (0, 1, 2)),
    *((name, method, 0) for name in ("AdaLoRA", "SoRA") for method in (DoRA, Kronecker, PiCa)),
]


@pytest.mark.parametrize(
    ("name", "method", "seed"),
    [
        *ROWS,
        *(pytest.param(*row, marks=pytest.mark.tables) for row in MORE if row not in ROWS),
    ],
)
def test_all_units_end_in_the_one_layer_that_matters(name, method, seed):
    rank, make = FOUND[name]
    assert final_ranks(make(), partial(method, rank=rank), seed) == [0, 0, 4, 0]


def test_eva_starts_with_all_units_where_few_directions_carry_the_inputs():
    """The inputs of one layer vary in four directions alike, those of the others in all twelve."""
    model = One(partial(LoRA, rank=1), 0)
    batches = []
    for _ in range(8):
        x, y = model.draw()
        x[:, IMPORTANT] = x[:, IMPORTANT, :4] @ model.directions.T
        batches.append((x, y))
    allocator = EVA(rho=4.0)
    optimizer = torch.optim.Adam(trainable(model).values())
    allocator.start(model, optimizer, STEPS, batches=batches, loss=model.loss)
    assert [len(axis) for axis in rank_axes(model).values()] == [0, 0, 4, 0]
    model.loss(batches[0]).backward()


def test_sora_finds_it_by_its_default_xi_alone():
    """Without a budget, and with the decay of the release."""
    allocator = SoRA(gate_lr_ratio=6.0, **FAST)
    found = final_ranks(allocator, partial(LoRA, rank=4), weight_decay=0.1)
    assert found[IMPORTANT] == 4
    assert found.count(0) >= 2


def test_with_a_floor_of_one_the_outcome_is_known_before_and_refused():
    """The control. ElaLoRA has this floor as its default."""
    scores = {f"{i}:rank": torch.full((4,), 10.0**i) for i in range(4)}
    plan = keep_best(scores, rank_cost(scores), 4, floor=1)
    assert [len(plan[key].keep) for key in scores] == [1, 1, 1, 1]
    for allocator in (AdaLoRA(4, floor=1, **FAST), SoRA(4, floor=1, **FAST)):
        with pytest.raises(ValueError, match=r"leaves the floor of 1 unit\(s\) to each of 4 axes"):
            final_ranks(allocator, partial(LoRA, rank=4))
    with pytest.raises(ValueError, match="every axis starts at its floor of 1"):
        final_ranks(ElaLoRA(**FAST), partial(LoRA, rank=1))


def test_a_share_within_its_layer_never_takes_the_last_unit():
    """DynamicRank's score of a unit that is alone is 1, however little its layer matters."""
    assert final_ranks(DynamicRank(4, **FAST), partial(LoRA, rank=4)) == [1, 1, 1, 1]


# ---- plans


def test_an_axis_without_units_grows_after_the_others_of_its_round():
    """The mean score of no units counts as lower than any, whatever the sign of the scores."""
    scores = {
        "a:rank": torch.zeros(0),
        "b:rank": torch.tensor([-5.0, -4.0]),
        "c:rank": torch.tensor([-9.0, -8.0, -7.0]),
    }
    cost = rank_cost(scores)
    plan = reallocate(scores, cost, 5, 1, floor=0)
    assert plan == {"b:rank": Resize((0, 1), 1), "c:rank": Resize((1, 2))}
    plan = reallocate(scores, cost, 5, 2, floor=0)
    assert plan["a:rank"] == Resize((), 1)
    assert plan["b:rank"] == Resize((0, 1), 1)


def test_a_round_never_prunes_the_last_unit_of_all():
    scores = {"a:rank": torch.tensor([1.0]), "b:rank": torch.tensor([2.0])}
    plan = reallocate(scores, rank_cost(scores), 2, 5, floor=0)
    assert plan == {"a:rank": Resize(()), "b:rank": Resize((0,), 1)}
    assert reallocate({"a:rank": torch.ones(1)}, rank_cost(["a:rank"]), 1, 1, floor=0) == {}


def test_an_axis_without_units_offers_nothing_for_exchange():
    scores = {"a:rank": torch.zeros(0), "b:rank": torch.tensor([1.0]), "c:rank": torch.ones(3) * 9}
    plan = exchange(scores, rank_cost(scores), 4, swaps=1, floor=0)
    assert plan == {"b:rank": Resize(()), "c:rank": Resize((0, 1, 2), 1)}


def test_an_axis_without_weight_gets_nothing_of_a_total():
    weights = {"a:rank": 0.0, "b:rank": 3.0, "c:rank": 1.0}
    sizes = apportion(weights, rank_cost(weights), 4, floor=0)
    assert sizes == {"a:rank": 0, "b:rank": 3, "c:rank": 1}


def test_costs_of_the_greedy_choice_know_axes_without_units():
    """A tensor between two axes costs the product of their sizes, also where one is 0."""
    g, M = torch.tensor([-1.0, -3.0, -2.0]).double(), torch.eye(3).double()
    units = [("a:rank", 0), ("a:rank", 1), ("c:rank", 0)]
    second = SecondOrder(units, g, [(0, M)], empty=("b:rank",))
    cost = CostModel(0, ((5, ("a:rank",)), (7, ("a:rank", "b:rank")), (4, ("c:rank",))))
    kept, _ = greedy(second, cost, 9, floor=0)
    assert as_plan(second, kept) == {"a:rank": Resize((1,))}


def test_no_unit_may_help_and_one_stays():
    g, M = torch.tensor([3.0, 2.0]).double(), torch.eye(2).double()
    second = SecondOrder([("a:rank", 0), ("b:rank", 0)], g, [(0, M)])
    assert greedy(second, rank_cost(["a:rank", "b:rank"]), 2, floor=0, stop=True)[0] == [1]


# ---- scores


class Mixed(nn.Module):
    """A layer without units, one with two axes without, and one with three units."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
        for index, method in enumerate((LoRA, TensorTrain, partial(LoRA, rank=3))):
            self.layers[index] = method(self.layers[index])
        perturb(self, seed=1)
        axes = rank_axes(self)
        self.lost = [key for key in axes if key.startswith("layers.0")]
        self.stopped = [key for key in axes if key.startswith("layers.1")]
        # Between two axes without units, a unit holds no number at all.
        self.lost += [self.stopped.pop(2), self.stopped.pop(0)]

    def empty(self):
        for key in self.lost:
            rank_axes(self)[key].resize([])

    def loss(self, x):
        return self.layers(x).square().mean()


@pytest.mark.parametrize("name", [n for s in IMPORTANCES for n in (s, f"{s}_per_cost")])
def test_scores_of_units_that_another_axis_stops_are_numbers_and_not_high(name):
    """An axis may be emptied when its units were important: what was averaged does not count."""
    model, score = Mixed(), importance(name)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    axes = rank_axes(model)
    progress = Progress(examples=[x])
    run = Run("test", model, axes, [], progress, loss_function=model.loss)
    state = TrackedTensors()
    context = ScoreContext(run, state, 0.85, 0)
    for emptied in (False, True):
        if emptied:
            for key in model.lost:
                state.follow(axes[key], Resize(()))
            model.empty()
        model.zero_grad()
        model.loss(x).backward()
        with torch.no_grad():
            if score.observe is not None:
                score.observe(axes, context)
            scores = score.score(axes, context)
    assert {key: len(values) for key, values in scores.items()} == run.sizes()
    assert all(bool(values.isfinite().all()) for values in scores.values())
    if name.startswith(("random", "uniform")):
        return
    lost = torch.cat([scores[key] for key in model.stopped])
    if "ablation" not in name:
        assert (lost.abs() <= 1e-8).all()
    alive = scores["layers.2:rank"]
    assert len(lost.unique()) <= len(model.stopped)
    assert (lost != alive.mean()).all()


def test_a_loss_without_a_graph_has_no_gradient_in_any_gate():
    """As where every layer has an axis without units."""
    (grad,) = dense_grad(torch.tensor(2.0), [torch.ones(3, requires_grad=True)])
    assert torch.equal(grad, torch.zeros(3))


# ---- runs that stop and go on with an axis without units


def run_pair(name, nest, cut=None):
    """Train a stack whose first axis has no units, and prune more of them.

    Args:
        name: allocator.
        nest: class names of the methods.
        cut: step at which everything is stored, and built anew from what was stored.
    """
    _, steps, phases, _ = SHORT
    model, optimizer, allocator = start_pair(name, nest, phases, steps)
    batches = list(model.train_dataloader())
    allocator.start(model, optimizer, steps, batches=batches, loss=model.training_step)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        for half in batches[step].chunk(2):
            (model.training_step(half) / 2).backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
        if step == cut:
            stored = io.BytesIO()
            state = [part.state_dict() for part in (model, optimizer, allocator)]
            torch.save(state, stored)
            weights, moments, progress = torch.load(
                io.BytesIO(stored.getvalue()), weights_only=True
            )
            allocator.finish()
            model, optimizer, allocator = start_pair(name, nest, phases, steps)
            fit_ranks(model, weights)
            model.load_state_dict(weights)
            optimizer.load_state_dict(moments)
            allocator.load_state_dict(progress)
            allocator.start(model, optimizer, steps, batches=batches, loss=model.training_step)
            assert not all(map(len, rank_axes(model).values())), "nothing is without units"
    allocator.finish()
    return model, optimizer, allocator


def start_pair(name, nest, phases, steps):
    model = Stack(nest, blocks=3)
    axes = rank_axes(model)
    next(iter(axes.values())).resize([])
    units = sum(map(len, axes.values()))
    few = {
        "ElaLoRA": {"floor": 0, "swaps": 9},
        "ALoRA": {"units": 0.4, "importance": "ablation_first_order"},
    }
    kept = sum(axis.multiplies for axis in axes.values())
    budget = {"budget": max(len(axes) // 2, units // 4, kept + 1), "batches": 1}
    if name in ("ElaLoRA", "ALoRA"):
        budget = few[name]
    allocator = build(name, phases, **budget)
    return model, model.configure_optimizers(), allocator


def stacks(nest):
    """Whether the methods of a nest wrap the linear layers of a stack, and have an axis."""
    linear = PARAMETERIZATIONS[nest[0]].wraps(nn.Linear(4, 4))
    return linear and any(on_example(PARAMETERIZATIONS[name]).axes for name in nest)


PAIRS = [
    (allocator, nest)
    for allocator, cells in TABLE.items()
    for nest, cell in cells.items()
    if cell == "works" and stacks(nest) and not issubclass(ALLOCATORS[allocator], RankInitializer)
]
FEW = [
    ("AdaLoRA", ("TensorTrain",)),
    ("ALoRA", ("LoRA",)),
    ("SoRA", ("DoRA",)),
    ("SubLoRA", ("LoRA",)),
    ("ElaLoRA", ("SVD",)),
    ("DynamicRank", ("PiCa",)),
    ("BeamLoRA", ("LoRA",)),
    ("DyLoRA", ("LoRA",)),
]


@pytest.mark.parametrize(
    ("name", "nest"),
    [*FEW, *(pytest.param(*pair, marks=pytest.mark.tables) for pair in PAIRS if pair not in FEW)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_a_pair_survives_axes_without_units_and_goes_on_bit_by_bit(name, nest):
    model, optimizer, allocator = run_pair(name, nest)
    # At its first event ALoRA grows what has no units; the others have pruned more by step 6.
    again, moments, resumed = run_pair(name, nest, cut=3 if name == "ALoRA" else 6)
    assert allocator.events == resumed.events
    assert not any("skipped" in event for event in allocator.events)
    want, have = model.state_dict(), again.state_dict()
    assert want.keys() == have.keys()
    assert all(torch.equal(want[key], have[key]) for key in want)
    stored, restored = optimizer.state_dict()["state"], moments.state_dict()["state"]
    for index, entries in stored.items():
        assert all(torch.equal(value, restored[index][key]) for key, value in entries.items())
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    if name == "ALoRA":
        grown = [key for event in allocator.events for key in event["grown"]]
        assert next(iter(rank_axes(model))) in grown, "an axis without units takes part again"


def test_a_run_under_the_floor_of_an_earlier_version_names_the_difference():
    phases = {"every": 2, "warmup": 2, "final": 2}
    model, stored = One(LoRA, 0), AdaLoRA(8, floor=1, **phases)
    optimizer = torch.optim.Adam(trainable(model).values())
    stored.start(model, optimizer, 9)
    resumed = AdaLoRA(8, **phases)
    resumed.load_state_dict(stored.state_dict())
    with pytest.raises(ValueError, match="floor is 0 here and 1 in the checkpoint"):
        resumed.start(model, optimizer, 9)
    same = AdaLoRA(8, floor=1, **phases)
    same.load_state_dict(stored.state_dict())
    same.start(model, optimizer, 9)


# ---- refusals


def test_an_adapter_without_units_has_nothing_to_allocate():
    model = adapt(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "all-linear", LoRA)
    for axis in rank_axes(model).values():
        axis.resize([])
    optimizer = torch.optim.Adam(trainable(model).values())
    for allocator in (AdaLoRA(3, **FAST), SoRA(**FAST)):
        with pytest.raises(ValueError, match="no layer has units at the start"):
            allocator.foresee(model, STEPS)
        with pytest.raises(ValueError, match="no layer has units at the start"):
            allocator.start(model, optimizer, STEPS)


def test_axes_that_multiply_each_other_keep_a_unit_each():
    model = adapt(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), "all-linear", TensorTrain)
    axes = rank_axes(model)
    assert len(axes) > 2
    assert all(axis.multiplies for axis in axes.values())
    for budget, sentence in ((len(axes) - 1, "is below"), (len(axes), "nothing to decide")):
        with pytest.raises(ValueError, match=rf"{sentence}.*raise `budget`\."):
            AdaLoRA(budget, **FAST).foresee(model, STEPS)
    AdaLoRA(len(axes) + 1, **FAST).foresee(model, STEPS)


def test_of_two_sides_only_the_one_that_the_other_needs_keeps_a_unit():
    """NOLA's input side has an anchor, without which nothing would be left for the output side."""
    multiply = {key: axis.multiplies for key, axis in rank_axes(NOLA(nn.Linear(8, 8))).items()}
    assert multiply == {":alpha": False, ":beta": True}
    assert not any(axis.multiplies for axis in rank_axes(DoRA(nn.Linear(8, 8))).values())


def test_if_every_gate_is_zero_one_layer_keeps_a_unit_and_the_record_says_why():
    allocator = SoRA(xi=50.0, **FAST)
    assert sum(final_ranks(allocator, partial(LoRA, rank=2))) == 1
    assert allocator.events[-1]["reason"].endswith("every gate is zero, so lower `xi`")
