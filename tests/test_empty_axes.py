"""Axes without units: what they cost, what optimizers keep, and how they grow again."""

import copy

import pytest
import torch
from torch import nn

from adaptrank import adapt
from adaptrank.axes import generator, rank_axes
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    TensorTrain,
    TensorTrainAdapter,
)
from adaptrank.testing import check_emptying, perturb


def stack(*kinds, width=16):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    return adapt(model, "all-linear", *(kinds or (LoRA,))).double()


def train(model, optimizer, steps=3):
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "moment"),
    [
        (torch.optim.AdamW, "exp_avg_sq"),
        (torch.optim.Adagrad, "sum"),
        (torch.optim.RMSprop, "square_avg"),
        (torch.optim.Adamax, "exp_inf"),
    ],
)
def test_a_unit_on_an_empty_axis_gets_the_second_moment_of_other_axes(cls, moment):
    model = stack()
    perturb(model)
    optimizer = cls(model.parameters(), lr=1e-3)
    train(model, optimizer)
    axes = rank_axes(model)
    first, second, third = axes.values()
    first.resize([], optimizers=[optimizer])
    train(model, optimizer)
    first.resize(None, 2, generator(0, first.key, 0), [optimizer], axes.values())
    for name in ("A", "B"):
        fresh = optimizer.state[getattr(first.members[0][0], name)][moment]
        others = [getattr(axis.members[0][0], name) for axis in (second, third)]
        mean = torch.cat([optimizer.state[other][moment].flatten() for other in others]).mean()
        assert mean > 0
        torch.testing.assert_close(fresh, mean.expand_as(fresh).to(fresh))


def test_without_the_same_tensors_elsewhere_all_of_the_optimizer_count():
    model = stack(LoRA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer)
    first, *others = rank_axes(model).values()
    first.resize([], optimizers=[optimizer])
    first.resize(None, 1, generator(0, first.key, 0), [optimizer])
    moments = [optimizer.state[slot.tensor]["exp_avg_sq"] for o in others for slot in o.slots()]
    mean = torch.cat([moment.flatten() for moment in moments]).mean()
    for slot in first.slots():
        fresh = optimizer.state[slot.tensor]["exp_avg_sq"]
        torch.testing.assert_close(fresh, mean.expand_as(fresh).to(fresh))


@pytest.mark.parametrize("kind", [LoRA, TensorTrain])
def test_an_idle_layer_runs_the_frozen_layer_and_nothing_else(kind):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def operations(model):
        x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
        with Count() as count:
            model(x).sum().backward()
        return count.names

    model = stack(kind)
    plain = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3))).double()
    plain.requires_grad_(False)
    for axis in rank_axes(model).values():
        axis.resize([])
    assert operations(model) == operations(plain)


NESTS = [
    (LoRA, HyperAdapt),
    (HyperAdapt, LoRA),
    (DoRA, LoRA),
    (SVD, TensorTrain),
    (LoRA, TensorTrainAdapter),
]


@pytest.mark.parametrize("kinds", NESTS, ids=lambda kinds: "-".join(k.__name__ for k in kinds))
def test_a_nest_of_which_one_wrapper_has_no_units(kinds):
    def build():
        torch.manual_seed(0)
        layer = nn.Linear(24, 16).double()
        for kind in kinds:
            layer = kind(layer)
        return layer

    check_emptying(build)


def test_hundreds_of_idle_wrappers_add_nothing():
    layer = nn.Linear(4, 4).double()
    frozen = copy.deepcopy(layer)
    for _ in range(40):
        layer = LoRA(layer, rank=1)
    perturb(layer)
    axes = list(rank_axes(layer).values())
    for axis in axes[:-1]:
        axis.resize([])
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = frozen(x) + layer.scale * x @ layer.A.T @ layer.B.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.dense(), frozen.weight + layer.scale * layer.B @ layer.A)
    axes[-1].resize([])
    assert torch.equal(layer(x), frozen(x))


def test_rows_of_a_batch_and_an_idle_adapter():
    layer = LoRA(nn.Linear(4, 4).double())
    perturb(layer)
    rank_axes(layer)[":rank"].resize([])
    layer.rows = (torch.tensor([0]), 3)
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base(x))


def test_growing_from_none_leaves_what_else_trains_and_all_generators_alone(monkeypatch):
    layer = LoRA(nn.Linear(4, 4))
    layer.base.bias.requires_grad_(True)
    axis = rank_axes(layer)[":rank"]
    axis.resize([])
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    state = torch.get_rng_state()
    axis.resize(grow=2, generator=generator(0, axis.key, 0))
    assert layer.base.bias.requires_grad
    assert not layer.base.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert not seeded


def test_if_no_tensor_can_lend_a_second_moment_steps_are_counted_anew():
    layer = LoRA(nn.Linear(16, 16).double(), init="gaussian")
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=0.1)
    train(layer, optimizer)
    axis = rank_axes(layer)[":rank"]
    axis.resize([], optimizers=[optimizer])
    axis.resize(None, 1, generator(0, axis.key, 0), [optimizer])
    assert not optimizer.state
    train(layer, optimizer, steps=1)
    assert int(optimizer.state[layer.B]["step"]) == 1
