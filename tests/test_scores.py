"""Pure: weights and gradients of an axis -> importance of each unit."""

import pytest
import torch
from torch import nn

from adaptrank.allocation.scores.gradient import gate, magnitude
from adaptrank.allocation.scores.importance import IMPORTANCES
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import SVD, LoRA
from adaptrank.testing import perturb


class Store:
    """Run of a model, `layer`, with an example and a loss, as a score of one axis sees it."""

    def __init__(self, beta=0.85, layer=None, example=None, loss=None, seed=0, steps_done=0):
        self.tensors, self.beta, self.seed, self.steps_done = {}, beta, seed, steps_done
        self.model, self.loss = layer, loss
        self.examples = () if example is None else (example,)

    def track(self, axis, name, tensor, where=0):
        return self.tensors.setdefault(name, tensor.clone())

    def reduce(self, tensor):
        return tensor

    def observe(self, name, axis):
        if (observe := IMPORTANCES[name].observe) is not None:
            observe({axis.key: axis}, self)

    def score(self, name, axis):
        return IMPORTANCES[name].score({axis.key: axis}, self)[axis.key]


def observed(cls, name, steps=5, beta=0.85):
    """(axis, store, per step: {tensor: (value, gradient)}) after some backward passes."""
    layer = cls(nn.Linear(48, 24).double(), rank=5)
    perturb(layer)
    axis, store, history = rank_axes(layer)[":rank"], Store(beta), []
    for step in range(steps):
        layer.zero_grad()
        x = torch.randn(6, 48, generator=torch.Generator().manual_seed(step)).double()
        (layer(x) - 1).square().sum().backward()
        history.append(
            {s.name: (s.tensor.detach().clone(), s.tensor.grad.clone()) for s in axis.slots()}
        )
        store.observe(name, axis)
        perturb(layer, 0.01, seed=step)
    return axis, store, history


def averages(stream, beta=0.85):
    I = U = 0.0
    for value in stream:
        I = beta * I + (1 - beta) * value
        U = beta * U + (1 - beta) * (value - I).abs()
    return I, U


@pytest.mark.parametrize("name", ["sensitivity", "sensitivity_uncertainty"])
def test_adaloras_triplet_score(name):
    axis, store, history = observed(SVD, name)
    want = torch.zeros(5).double()
    for tensor, dim in (("l", None), ("P", 0), ("Q", 1)):
        I, U = averages([(value * grad).abs() for value, grad in (h[tensor] for h in history)])
        element = I * U if name == "sensitivity_uncertainty" else I
        want = want + (element if dim is None else element.mean(dim))
    torch.testing.assert_close(store.score(name, axis), want, rtol=1e-12, atol=0)


def test_elsewhere_the_gate_stands_in_for_the_diagonal():
    axis, store, history = observed(LoRA, "sensitivity_uncertainty")
    gates = [(b * g).sum(0).abs() for b, g in (h["B"] for h in history)]
    want = torch.prod(torch.stack(averages(gates)), 0)
    for tensor, dim in (("A", 1), ("B", 0)):
        I, U = averages([(value * grad).abs() for value, grad in (h[tensor] for h in history)])
        want = want + (I * U).mean(dim)
    torch.testing.assert_close(
        store.score("sensitivity_uncertainty", axis), want, rtol=1e-12, atol=0
    )


def test_gate_keeps_one_number_a_unit():
    axis, store, history = observed(LoRA, "gate")
    want, _ = averages([(b * g).sum(0).abs() for b, g in (h["B"] for h in history)])
    torch.testing.assert_close(store.score("gate", axis), want, rtol=1e-12, atol=0)
    assert {name: t.shape for name, t in store.tensors.items()} == {"gate": (5,)}


@pytest.mark.parametrize("cls", [LoRA, SVD])
def test_magnitude_is_the_norm_of_a_rank_one_term_and_knows_no_gauge(cls):
    layer = cls(nn.Linear(48, 24).double(), rank=5, alpha=5)
    perturb(layer)
    axis = rank_axes(layer)[":rank"]
    want = []
    for unit in range(5):
        twin = rank_axes(layer)[":rank"]
        whole = layer.weight.detach()
        with twin.closed([unit]):
            want.append((whole - layer.weight.detach()).norm())
    torch.testing.assert_close(magnitude(axis), torch.stack(want), rtol=1e-10, atol=0)
    first, last = axis.slots()[0], axis.slots()[-1]
    with torch.no_grad():
        first.tensor.mul_(7), last.tensor.div_(7)
    torch.testing.assert_close(magnitude(axis), torch.stack(want), rtol=1e-10, atol=0)


def test_the_gate_score_knows_no_gauge():
    scores = []
    for t in (1, 7):
        torch.manual_seed(0)
        layer = LoRA(nn.Linear(48, 24).double())
        perturb(layer)
        with torch.no_grad():
            layer.A.mul_(t), layer.B.div_(t)
        layer(torch.ones(2, 48).double()).square().sum().backward()
        scores.append(gate(rank_axes(layer)[":rank"]))
    torch.testing.assert_close(*scores, rtol=1e-10, atol=0)


def test_uncertainty_vanishes_where_nothing_is_uncertain():
    """A constant sensitivity makes the product vanish: why `sensitivity` exists."""
    layer = LoRA(nn.Linear(48, 24).double())
    perturb(layer)
    layer(torch.ones(2, 48).double()).square().sum().backward()
    axis, store = rank_axes(layer)[":rank"], Store()
    for _ in range(200):
        store.observe("sensitivity_uncertainty", axis)
    product = store.score("sensitivity_uncertainty", axis)
    alone = store.score("sensitivity", axis)
    assert (product / alone.square()).max() < 1e-8
    assert alone.min() > 0


IGNORANT = ("random", "uniform")


@pytest.mark.parametrize("name", [name for name in IMPORTANCES if name not in IGNORANT])
def test_a_layer_that_takes_no_part_counts_for_nothing(name):
    layer, other = LoRA(nn.Linear(48, 24)), nn.Parameter(torch.ones(48))
    store = Store(
        layer=layer, example=torch.ones(2, 48), loss=lambda x: (x * other).square().mean()
    )
    axis = rank_axes(layer)[":rank"]
    store.observe(name, axis)
    jitter = 1e-8 if name.startswith("second_order") else 0  # on the diagonal of a Hessian
    assert store.score(name, axis).abs().max() <= jitter


@pytest.mark.parametrize("name", list(IMPORTANCES))
def test_scores_are_float32_or_better_over_half_precision(name):
    layer, x = SVD(nn.Linear(48, 24).to(torch.bfloat16)), torch.ones(2, 48, dtype=torch.bfloat16)
    perturb(layer)
    layer(x).sum().backward()
    axis, store = (
        rank_axes(layer)[":rank"],
        Store(layer=layer, example=x, loss=lambda batch: layer(batch).sum()),
    )
    store.observe(name, axis)
    score = store.score(name, axis)
    assert torch.finfo(score.dtype).bits >= 32
    assert score.isfinite().all()


@pytest.mark.parametrize("name", list(IMPORTANCES))
def test_accumulated_gradients_score_as_one_batch(name):
    """Scores read complete gradients, so 1 batch of 32 and 4 of 8 are the same."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(0)
        layer = LoRA(nn.Linear(48, 24).double())
        perturb(layer)
        whole = torch.randn(32, 48, generator=torch.Generator().manual_seed(1)).double()
        store = Store(
            layer=layer,
            example=whole[:4],
            loss=lambda x, layer=layer: (layer(x) - 1).square().mean(),
        )
        for x in whole.chunk(parts):
            (store.loss(x) / parts).backward()
        axis = rank_axes(layer)[":rank"]
        store.observe(name, axis)
        results.append(store.score(name, axis))
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-10, atol=0)


def test_random_scores_are_those_of_the_seed_the_axis_and_the_step():
    """So they are the same on every process and after a resume, whatever was drawn elsewhere."""
    axes = rank_axes(nn.Sequential(*(LoRA(nn.Linear(48, 24)) for _ in range(2))))

    def draw(seed=0, steps_done=7):
        torch.rand(3)
        scores = IMPORTANCES["random"].score(axes, Store(seed=seed, steps_done=steps_done))
        return torch.stack([*scores.values()])

    before = torch.random.get_rng_state()
    IMPORTANCES["random"].score(axes, Store())
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(draw(), draw())
    assert not any(
        torch.equal(draw(), other) for other in (draw(seed=1), draw(steps_done=8), draw().flip(0))
    )


def test_uniform_scores_are_all_equal():
    axes = rank_axes(
        nn.Sequential(LoRA(nn.Linear(48, 24), rank=2), LoRA(nn.Linear(24, 48), rank=5))
    )
    assert len(torch.cat([*IMPORTANCES["uniform"].score(axes, Store()).values()]).unique()) == 1
