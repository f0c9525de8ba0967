"""Promises of every allocation, over random shapes, methods, costs, floors, caps and ties."""

import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from adaptrank.allocation import Allocator, ElaLoRA
from adaptrank.allocation.plans import Resize
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import SVD, DoRA, HyperAdapt, LoRA, MELoRA, PiCa, TensorTrain
from adaptrank.testing import perturb, trainable

METHODS = {
    "LoRA": lambda rank: partial(LoRA, rank=rank),
    "SVD": lambda rank: partial(SVD, rank=rank),
    "DoRA": lambda rank: partial(DoRA, rank=rank),
    "PiCa": lambda rank: partial(PiCa, rank=rank),
    "MELoRA": lambda rank: partial(MELoRA, minis=2, rank=min(rank, 3)),
    "TensorTrain": lambda rank: partial(TensorTrain, rank=rank),
    "hybrid": lambda rank: [HyperAdapt, partial(LoRA, rank=rank)],
}
STEPS, EVENTS = 8, [3, 5, 7]


@dataclass(frozen=True)
class Problem:
    """layers: path -> (outputs, inputs, method, rank)."""

    layers: dict[str, tuple[int, int, str, int]]
    grows: bool
    unit: str
    levels: int  # of scores: with 1 all are tied
    floor: int
    cap: int | None
    share: float  # of the way from the floors to the start, where the budget lies
    bad: frozenset[int]  # events whose scores are not numbers


@st.composite
def problems(draw):
    names = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True))
    width = st.sampled_from([8, 12, 16])
    layers = {
        f"block_{n}": (
            draw(width),
            draw(width),
            draw(st.sampled_from(sorted(METHODS))),
            draw(st.integers(1, 5)),
        )
        for n in names
    }
    floor = draw(st.integers(0, 3))
    return Problem(
        layers,
        draw(st.booleans()),
        draw(st.sampled_from(["ranks", "parameters"])),
        draw(st.sampled_from([1, 2, 5, 10**6])),
        floor,
        draw(st.none() | st.integers(max(1, floor), 8)),
        draw(st.floats(0, 0.95)),
        draw(st.frozensets(st.sampled_from(EVENTS), max_size=2)),
    )


class Drawn:
    """Scores are drawn, with ties; the plan is left for the test to look at."""

    importance = "sensitivity"  # observed, so that there are averages to follow
    problem: Problem
    last: dict
    without: dict  # outputs of the layers, the units that will go being closed

    def score_units(self, state, axes):
        return {key: self.drawn_score(axis) for key, axis in axes.items()}

    def drawn_score(self, axis):
        step = self.run.steps_done
        drawn = torch.randint(
            self.problem.levels, (len(axis),), generator=generator(7, axis.key, step)
        )
        return drawn / 0 - drawn / 0 if step in self.problem.bad else drawn.double()

    def plan(self, *arguments):
        self.last = super().plan(*arguments)
        with ExitStack() as stack:
            for key, change in self.last.items():
                axis = self.run.axes[key]
                stack.enter_context(axis.closed(sorted(set(range(len(axis))) - set(change.keep))))
            self.without = outputs(self.run.model, self.problem)
        return self.last


@cache
def drawn(kind):
    """Defined in the first test, so that the registry is without it when that is over."""
    return type(f"Drawn{kind.__name__}", (Drawn, kind), {})


def build(problem, order):
    model = nn.Module()
    for name in order:
        outputs, inputs, method, rank = problem.layers[name]
        torch.manual_seed(zlib.crc32(name.encode()))
        block = nn.ModuleDict({"map": nn.Linear(inputs, outputs).double()})
        adapt(block, "all-linear", METHODS[method](rank))
        perturb(block, seed=zlib.crc32(name.encode()))
        model.add_module(name, block)
    return model


def allocator_for(problem, model):
    cost = (
        cost_model(model).total
        if problem.unit == "parameters"
        else lambda sizes: sum(sizes.values())
    )
    axes = rank_axes(model)
    sizes = {key: len(axis) for key, axis in axes.items()}
    start = cost(sizes)
    # Axes that multiply each other keep a unit.
    wanted = {key: max(problem.floor, int(axis.multiplies)) for key, axis in axes.items()}
    floors = {key: min(wanted[key], size) for key, size in sizes.items()}
    above = {
        key: cost(floors | {key: floors[key] + 1}) for key in sizes if sizes[key] > floors[key]
    }
    layers = [[key for key in sizes if key.startswith(f"{name}.")] for name in problem.layers]
    # Less than that leaves nothing to decide, or no layer at all.
    least = max(
        min(above.values(), default=start),
        min(cost(dict.fromkeys(sizes, 0) | dict.fromkeys(keys, 1)) for keys in layers),
    )
    assume(least < start)
    assume(sum(sizes.values()) > 1)
    phases = {
        "every": 2,
        "warmup": 1,
        "final": 1,
        "floor": problem.floor,
        "cap": problem.cap,
        "unit": problem.unit,
    }
    if problem.grows:
        found = drawn(ElaLoRA)(swaps=3, pool=2, **phases)
    else:
        found = drawn(Allocator)(least + int(problem.share * (start - least)), **phases)
    found.problem, found.last = problem, {}
    return found


def inputs(name, width, step):
    return torch.randn(6, width, generator=generator(3, name, step)).double()


def loss(model, problem, step):
    total = 0.0
    for name, (_, width, *_) in problem.layers.items():
        x = inputs(name, width, step)
        y = getattr(model, name)["map"](x)
        total = total + (y - x.sum(1, keepdim=True)).square().mean()
    return total


def outputs(model, problem):
    return {
        name: getattr(model, name)["map"](inputs(name, problem.layers[name][1], 99))
        for name in problem.layers
    }


def state(model, optimizer, allocator):
    """Everything that has to follow the units: (tensor, {dimension: axis}) by name."""
    found, dims = {}, {}
    for key, axis in rank_axes(model).items():
        for slot in axis.slots():
            dims.setdefault(id(slot.tensor), {})[slot.dim % slot.tensor.dim()] = key
            found[f"{key}.{slot.name}"] = slot.tensor
    kept = {}
    for name, tensor in found.items():
        kept[name] = (tensor.detach().clone(), dims[id(tensor)])
        for moment in ("exp_avg", "exp_avg_sq"):
            if moment in optimizer.state.get(tensor, {}):
                kept[f"{name} {moment}"] = (
                    optimizer.state[tensor][moment].clone(),
                    dims[id(tensor)],
                )
    for key, name, tracked in allocator.engine.state.items():
        kept[f"{key} average {name}"] = (
            tracked.tensor.detach().clone(),
            {dim: axis for axis, dim in tracked.dims},
        )
    return kept


def surviving(tensor, dims, plan):
    for dim, key in dims.items():
        if isinstance(change := plan.get(key), Resize):
            tensor = tensor.index_select(dim, torch.tensor(change.keep, dtype=torch.long))
    return tensor


def leading(tensor, shape):
    for dim, size in enumerate(shape):
        tensor = tensor.narrow(dim, 0, size)
    return tensor


def check_sizes(problem, allocator, model, event, before):
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    cost = allocator.run.cost()
    total = cost.total(sizes)
    assert total == event["total"] <= event["budget"]
    for key, size in sizes.items():
        limits = rank_axes(model)[key].limits()[1]
        cap = min([c for c in (problem.cap, limits) if c is not None], default=size)
        assert min(problem.floor, before[key]) <= size <= max(cap, before[key])
    if problem.unit == "ranks":
        assert total == event["budget"]
    elif not problem.grows:
        lost = [key for key in sizes if sizes[key] < before[key]]
        assert all(total + cost.marginal(key, sizes) > event["budget"] for key in lost), (
            "another unit would have fitted"
        )


def run(problem, order, check=True):
    model = build(problem, order)
    allocator = allocator_for(problem, model)
    optimizer = torch.optim.Adam(trainable(model).values(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.5, STEPS)
    ids = [id(p) for p in optimizer.param_groups[0]["params"]]
    allocator.start(model, optimizer, STEPS)
    fresh = {}
    for step in range(1, STEPS + 1):
        loss(model, problem, step).backward()
        for key, grown in fresh.items():
            axis = rank_axes(model)[key]
            for slot in axis.closing():
                rows = (
                    slot.tensor.grad.movedim(slot.dim, 0).flatten(1)
                    if slot.tensor.dim() > 1
                    else slot.tensor.grad[:, None]
                )
                assert (rows[-grown:].abs().sum(1) > 0).all(), "a fresh unit is dead"
        allocator.before_step()
        optimizer.step()
        optimizer.zero_grad()
        before = {key: len(axis) for key, axis in rank_axes(model).items()}
        old = state(model, optimizer, allocator)
        event = allocator.step()
        schedule.step()
        fresh = event["grown"] if event and "grown" in event else {}
        if event is None or not check:
            continue
        assert step in EVENTS or step > STEPS - 1
        plan = {} if "skipped" in event else allocator.last
        assert ("skipped" in event) == (step in problem.bad)
        if "skipped" in event:
            assert {key: len(axis) for key, axis in rank_axes(model).items()} == before
        else:
            check_sizes(problem, allocator, model, event, before)
        new = state(model, optimizer, allocator)
        for name, (tensor, _) in new.items():
            want = surviving(*old[name], plan)
            assert torch.equal(leading(tensor, want.shape), want), name
        if plan:
            for name, value in outputs(model, problem).items():
                torch.testing.assert_close(value, allocator.without[name], rtol=1e-12, atol=1e-12)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == ids
        assert len(optimizer.param_groups) == 1
    assert abs(optimizer.param_groups[0]["lr"] - 0.005) < 1e-12
    if check and not problem.bad and not problem.grows:
        assert allocator.events[-1]["budget"] == allocator.budget
    return allocator.events, {name: p.detach() for name, p in model.named_parameters()}


@given(problems())
@settings(max_examples=40, deadline=None)
def test_whatever_is_allocated(problem):
    run(problem, list(problem.layers))


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_modules_does_not_matter(problem, random):
    order = list(problem.layers)
    random.shuffle(order)
    events, tensors = run(problem, sorted(order), check=False)
    others, same = run(problem, order, check=False)
    assert events == others or problem.bad
    assert all(torch.equal(tensors[name], same[name]) for name in tensors)
