"""Rank initializers against references in NumPy, written from the formulas of papers and releases.

GoRA: MyTransformers of its authors. EVA: HF PEFT. GeLoRA and PRILoRA: the formulas of the papers.
"""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptrank.allocation import EVA, GeLoRA, GoRA, PRILoRA
from adaptrank.allocation.initial.gora import PRICES, normalized, shared_out
from adaptrank.allocation.initial.sketch import Sketch
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import PARAMETERIZATIONS, LoRA, MELoRA, PiCa, SBoRA, wrappers

# ---- GoRA: the first change of W


def released_change(G, A, alpha, lr):
    """Return the change of W that the release's factors multiply to, with the sign of a descent."""
    rank, width = A.shape
    divisor = np.sqrt(rank)  # of alpha, with rank stabilization and the layer's own rank
    compressed = G @ np.linalg.pinv(A)
    B = -compressed * (lr * np.sqrt(width / rank) * divisor) / alpha
    return (alpha / divisor) * B @ A


def started(method, shape, gradients, lr, blocks=1):
    """Return the changes of the weights of some layers by GoRA's start."""
    model = nn.Sequential(*(nn.Linear(shape[1], shape[0]) for _ in range(blocks))).double()
    adapt(model, "all-linear", method)
    before = [layer.dense().detach() for layer in wrappers(model)]
    axes = rank_axes(model)
    evidence = {}
    remaining = iter(gradients)
    for key, axis in axes.items():
        for index in range(len(axis.members)):
            evidence[key, index] = next(remaining)
    GoRA(lr=lr).initialize(axes, evidence)
    layers = list(wrappers(model))
    changes = [layer.dense().detach() - start for layer, start in zip(layers, before, strict=True)]
    return layers, changes


@pytest.mark.parametrize("init", ["kaiming", "orthogonal"])
@pytest.mark.parametrize(("rslora", "alpha"), [(False, 16), (True, 16), (True, 3)])
@pytest.mark.parametrize("rank", [2, 8, 16])
@pytest.mark.parametrize("shape", [(96, 64), (32, 200)])
def test_the_first_change_is_that_of_gora(shape, rank, rslora, alpha, init):
    torch.manual_seed(rank)
    G = torch.randn(shape, dtype=torch.float64)
    method = partial(LoRA, rank=rank, alpha=alpha, rslora=rslora, init=init)
    (layer,), (change,) = started(method, shape, [G], lr=0.05)
    A = layer.A.detach()
    expected = released_change(G.numpy(), A.numpy(), alpha, 0.05)
    np.testing.assert_allclose(change.numpy(), expected, rtol=0, atol=1e-9)
    # The squared norm is chi-squared with m r degrees of freedom.
    deviation = (2 * shape[0] * rank) ** -0.5
    assert float(change.norm() / G.norm()) == pytest.approx(0.05, rel=3 * deviation)
    assert float((change * G).sum()) < 0

    seen = torch.randn(shape[0], rank, dtype=torch.float64) @ A
    _, (change,) = started(lambda base: _with_rows(base, method, A), shape, [seen], lr=0.05)
    torch.testing.assert_close(change, -0.05 * (shape[1] / rank) ** 0.5 * seen)


def _with_rows(base, method, A):
    layer = method(base)
    layer.A.data.copy_(A)
    return layer


ALL = [cls for cls in PARAMETERIZATIONS.values() if "gradient_init" in cls.capabilities]
VARIANTS = [
    partial(LoRA, alpha=1, rslora=True),
    partial(PiCa, side="output"),
    partial(PiCa, share=False),
    partial(PiCa, share=False, side="output"),
    partial(SBoRA, variant="fb", alpha=3),
    partial(MELoRA, minis=4, rank=[1, 2, 3, 2]),
]


@pytest.mark.parametrize("method", [*ALL, *VARIANTS])
@pytest.mark.parametrize("shape", [(40, 96), (96, 40)])
def test_the_first_change_of_every_method_is_lr_times_the_gradient(method, shape):
    """A projection of random gradients onto d of N dimensions has sqrt(d / N) of their norm."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    _, changes = started(method, shape, gradients, lr=0.02, blocks=3)
    norm = torch.stack(changes).norm() / torch.stack(gradients).norm()
    assert float(norm) == pytest.approx(0.02, rel=0.1)


# ---- GoRA: ranks


PHI = {"identity": lambda count: count, "sqrt": np.sqrt, "log1p": np.log1p}


def released_ranks(importances, features, temperature, phi, r0, least, most):
    """Return the ranks of the release, with its rounding."""
    x = np.array(importances)
    if temperature is None:
        weights = x / x.sum()
    else:
        powers = np.exp((x - x.min()) / (x.max() - x.min()) / temperature)
        weights = powers / powers.sum()
    prices = [phi(count) for count in features]
    total = r0 * sum(prices)
    ranks = [
        round(np.floor(round(total * w) / price)) for w, price in zip(weights, prices, strict=True)
    ]
    return [int(min(max(rank, least), most)) for rank in ranks]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1e-6, 1), st.integers(8, 9000)), min_size=2, max_size=7),
    st.sampled_from(sorted(PHI)),
    st.sampled_from([None, 0.5, 2.0]),
)
def test_reference_ranks_are_those_of_gora(layers, phi, temperature):
    importances = [importance for importance, _ in layers]
    if max(importances) == min(importances):
        importances[0] /= 2
    features = [count for _, count in layers]
    expected = released_ranks(importances, features, temperature, PHI[phi], 8, 4, 32)
    weights = normalized(dict(enumerate(importances)), temperature)
    prices = {index: PRICES[phi](count) for index, count in enumerate(features)}
    sizes, largest = dict.fromkeys(weights, 8), dict.fromkeys(weights, 32)
    ranks = shared_out(weights, prices, sizes, 4, largest, "reference")
    assert list(ranks.values()) == expected


def test_equal_importances_share_equally_at_any_temperature():
    assert normalized({"a": 3.0, "b": 3.0}, 0.5) == {"a": 0.5, "b": 0.5}
    assert normalized({"a": 0.0, "b": 0.0}, None) == {"a": 0.0, "b": 0.0}


# ---- EVA: principal components of the inputs


def principal_components(rows):
    """Return (singular values, directions, explained variance ratios) of centred rows."""
    centred = rows - rows.mean(0)
    _, S, Vh = np.linalg.svd(centred, full_matrices=False)
    return S, Vh, S**2 / (centred**2).sum()


def inputs(seed, *counts, width=6):
    """Return parts of rows whose mean is far from zero."""
    random = np.random.default_rng(seed)
    gains = np.array([9.0, 5, 3, 2, 1, 0.5])[:width]
    parts = []
    for count in counts:
        rows = random.normal(size=(count, width)) * gains
        parts.append(torch.tensor(rows @ np.roll(np.eye(width), 1, 0) + 20))
    return parts


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 8))
def test_a_sketch_of_uneven_batches_is_the_full_decomposition(counts):
    parts = inputs(len(counts), *counts)
    S, Vh, ratios = principal_components(torch.cat(parts).numpy())
    whole, narrow = Sketch(6), Sketch(2)
    of_processes = [Sketch(6) for _ in parts]
    for part, of_process in zip(parts, of_processes, strict=True):
        whole.add(part)
        narrow.add(part)
        of_process.add(part)
    merged = Sketch(6)
    merged.merge([*(sketch.moments for sketch in of_processes), merged.moments])
    for sketch in (whole, merged):
        np.testing.assert_allclose(sketch.shares().numpy(), ratios, rtol=1e-8)
        for index in range(6):
            plain, white = sketch.direction(index, False), sketch.direction(index, True)
            np.testing.assert_allclose(abs(plain.numpy() @ Vh[index]), 1, rtol=1e-8)
            np.testing.assert_allclose((plain / white).numpy(), S[index] ** 0.5, rtol=1e-8)
    assert len(narrow.SV) <= 2
    assert narrow.moments.total == pytest.approx(float(S @ S))
    np.testing.assert_allclose(narrow.moments.mean.numpy(), torch.cat(parts).mean(0).numpy())


def test_without_centring_the_first_direction_is_the_mean():
    (rows,) = inputs(0, 200)
    mean = rows.mean(0) / rows.mean(0).norm()
    for center, smallest in ((True, 0.0), (False, 0.97)):
        sketch = Sketch(3, center)
        sketch.add(rows)
        cosine = abs(float(sketch.direction(0, False) @ mean))
        assert smallest <= cosine if not center else cosine < 0.5


@pytest.mark.parametrize("mean", [0.0, 3.0, 1e4])
def test_inputs_that_do_not_vary_have_no_direction(mean):
    torch.manual_seed(0)
    sketch = Sketch(4)
    row = torch.rand(16) + mean
    for _ in range(3):
        rounding = 1 + 1e-7 * torch.randn(20, 16)
        sketch.add(row * rounding)
    assert sketch.shares().tolist() == [0] * 4
    assert sketch.direction(0, False) is None
    assert not sketch.settled(1, 0.99)
    assert sketch.settled(0, 0.99), "a layer without units does not hold up the search"


class Parallel(nn.Module):
    """Three layers that read inputs of their own."""

    def __init__(self, rank=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 5) for _ in range(3)).double()
        adapt(self, "all-linear", partial(LoRA, rank=rank))

    def inputs(self, index):
        counts = (12 + 5 * index, 30, 9)
        parts = []
        for position, count in enumerate(counts):
            (rows,) = inputs(10 * index + position, count)
            parts.append(rows * torch.arange(1, 7) ** position)
        return parts

    def loss(self, index):
        pairs = zip(self.layers, self.inputs(index), strict=True)
        return sum(layer(rows).square().mean() for layer, rows in pairs)


def start(allocator, model, batches, steps=4, lr=0.0):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    allocator.start(model, optimizer, steps, batches=batches, loss=model.loss)
    return optimizer


@pytest.mark.parametrize("whiten", [False, True])
def test_ranks_and_rows_of_eva(whiten):
    model = Parallel()
    start(EVA(max_batches=4, tau=1.0, whiten=whiten), model, range(4))
    ratios, directions = [], []
    for position in range(3):
        rows = torch.cat([model.inputs(index)[position] for index in range(4)])
        S, Vh, explained = principal_components(rows.numpy())
        ratios += [(-ratio, position) for ratio in explained]
        directions.append(Vh / S[:, None] ** 0.5 if whiten else Vh)
    winners = [position for _, position in sorted(ratios)[:9]]
    ranks = [winners.count(position) for position in range(3)]
    assert len(set(ranks)) > 1
    for layer, rank, rows in zip(model.layers, ranks, directions, strict=True):
        A = layer.A.detach().numpy()
        signs = np.sign((A * rows[:rank]).sum(1, keepdims=True))
        np.testing.assert_allclose(A, signs * rows[:rank], rtol=1e-7, atol=1e-9)
        assert not layer.B.any()
        assert layer.scale == 16 / 3


class Attention(nn.Module):
    """Three layers that read one tensor, and two with an input of their own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict({name: nn.Linear(24, 10) for name in "abcde"})

    def forward(self, x):
        first, second, third = (part.contiguous() for part in x.chunk(3, -1))
        outputs = [self.layers[name](first) for name in "abc"]
        return sum(outputs) + self.layers["d"](second) + self.layers["e"](third)


def batch(seed, tokens, third):
    """Return inputs (1, tokens, 72): spectra from steep to nearly flat, off centre."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(1, tokens, 3, 24, generator=random)
    falls = torch.tensor([0.5, 0.7, third])[:, None] ** torch.arange(24)
    return (x * falls + torch.tensor([2.0, -1.0, 5.0])[:, None]).flatten(2)


@pytest.mark.parametrize(("rank", "whiten"), [(4, False), (4, True), (1, False)])
def test_ranks_and_rows_are_those_of_peft(rank, whiten):
    peft = pytest.importorskip("peft", minversion="0.21")
    third = 0.95 if rank == 1 else 0.8
    batches = [batch(0, 400, third), batch(1, 300, third)]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list("abcde"),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.5, whiten=whiten),
    )
    theirs = peft.get_peft_model(Attention(), config, low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(
        theirs,
        batches,
        forward_fn=lambda model, x: model(x),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=None,
        show_progress_bar=False,
    )
    model = Attention()
    adapt(model, "all-linear", partial(LoRA, rank=rank, alpha=2 * rank))
    model.loss = lambda x: model(x).square().mean()
    start(EVA(tau=0.5, whiten=whiten, max_batches=2), model, batches)
    ranks = []
    for name, layer in model.layers.items():
        released = theirs.base_model.model.layers[name]
        ranks.append(len(layer.A))
        if isinstance(released, nn.Linear):
            assert len(layer.A) == 0
            continue
        A, B = released.lora_A["default"].weight, released.lora_B["default"].weight
        assert (layer.A.shape, layer.B.shape) == (A.shape, B.shape)
        assert layer.scale == released.scaling["default"] == 2
        # PEFT divides in place, once for each of the layers that share their directions.
        if not whiten or name in "de":
            signs = (A * layer.A).sum(1, keepdim=True).sign()
            torch.testing.assert_close(signs * layer.A, A, rtol=1e-3, atol=2e-4)
    assert sum(ranks) == 5 * rank
    assert len(set(ranks)) > 1
    assert (min(ranks) == 0) == (rank == 1)


# ---- GeLoRA: intrinsic dimensions


def two_nearest_neighbours(points):
    """Return the slope of -log(1 - F) on log mu through the origin, below the 90th percentile."""
    logs = []
    for index, point in enumerate(points):
        others = np.delete(points, index, 0)
        first, second = np.sort(np.linalg.norm(others - point, axis=1))[:2]
        logs.append(np.log(second / first))
    kept = int(0.9 * len(logs))
    heights = -np.log(1 - np.arange(1, kept + 1) / len(logs))
    return np.linalg.lstsq(np.sort(logs)[:kept, None], heights, rcond=None)[0][0]


class Blocks(nn.Module):
    """Blocks that show 1, 4, 2 and 5 coordinates."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(3))
        shown = torch.arange(6) < torch.tensor([[1], [4], [2], [5]])
        gains = torch.where(shown, 1, 1e-6).double()
        self.start = gains[0]
        self.double()
        for index, layer in enumerate(self.layers):
            layer[0].weight.data = torch.diag(gains[index + 1] / gains[index])
            layer[0].bias.data.zero_()
        adapt(self, "all-linear", partial(LoRA, rank=4))

    def states(self, x):
        states = [x * self.start]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return states

    def loss(self, x):
        return self.states(x)[-1].square().mean()


def test_ranks_of_gelora():
    model = Blocks()
    torch.manual_seed(0)
    x = torch.randn(250, 6, dtype=torch.float64)
    allocator = GeLoRA(samples=250)
    start(allocator, model, x.split(50))
    dimensions = [two_nearest_neighbours(state.detach().numpy()) for state in model.states(x)]
    assert allocator.events[0]["dimensions"] == pytest.approx(dimensions, abs=2e-3)
    whole = [int(np.floor(dimension + 0.5)) for dimension in dimensions]
    expected = [max(whole[i + 1] - whole[i], 0) + 1 for i in range(3)]
    assert [len(axis) for axis in rank_axes(model).values()] == expected
    assert expected[0] > expected[1] == 1 < expected[2]
    assert [layer.scale for layer in wrappers(model)] == [4, 4, 4]


# ---- PRILoRA: ranks on a line, and zeros in A


def test_ranks_and_zeros_of_prilora():
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(4)).double()
    adapt(model, "all-linear", partial(LoRA, rank=3))
    allocator = PRILoRA(first=2, last=7, every=2, beta=0.8, final=1)
    optimizer = start(_without_batches(allocator, model), model, [], steps=5)
    # 2, 11/3, 16/3 and 7: the remainders 2/3 and 1/3 go to the larger.
    assert [len(axis) for axis in rank_axes(model).values()] == [2, 4, 5, 7]

    expected = [layer.A.detach().clone().numpy() for layer in model.layers]
    averages = np.zeros((4, 7))
    for step in range(1, 5):
        x = torch.randn(3, 4, 7, dtype=torch.float64) * torch.rand(7, dtype=torch.float64)
        for layer in model.layers:
            layer(x).sum().backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        root_mean_square = np.sqrt((x.numpy() ** 2).mean((0, 1)))
        averages = 0.8 * averages + 0.2 * root_mean_square
        for A, average in zip(expected, averages, strict=True):
            if step % 2 == 0:
                for row in A:
                    row[np.argsort(np.abs(row) * average, kind="stable")[:4]] = 0
    for layer, A in zip(model.layers, expected, strict=True):
        np.testing.assert_array_equal(layer.A.detach().numpy(), A)
        assert ((A == 0).sum(1) == 4).all()


def _without_batches(allocator, model):
    """PRILoRA reads no batches, so the model needs no loss."""
    model.loss = None
    return allocator
