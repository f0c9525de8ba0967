"""GoRA: gradients of the frozen weights, ranks within bounds, and the compressed step."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import Toy, everything, fit
from test_eva import Low, sizes
from torch import nn

from adaptrank.allocation import AdaLoRA, GoRA
from adaptrank.allocation.initial.gora import shared_out
from adaptrank.allocation.initial.least_squares import fit_change
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import NOLA, DoRA, HyperAdapt, LoRA, MELoRA, PiCa, SBoRA

LORA4 = partial(LoRA, rank=4)


def test_the_gradient_is_that_of_the_weight_and_the_ranks_follow_it():
    model = Low()
    found = {}

    class Look(GoRA):
        def initialize(self, axes, evidence):
            found.update(evidence)
            super().initialize(axes, evidence)

    plain = Low()
    for layer in plain.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.requires_grad_()
    sum(plain.training_step(None, 0) for _ in range(3)).div(3).backward()
    fit(model, Look(batches=3), steps=1)
    for (key, _), G in found.items():
        name, _, index = key.split(":")[0].partition(".")
        want = getattr(plain, name)[int(index)].innermost.weight.grad
        torch.testing.assert_close(G, want, rtol=1e-4, atol=1e-6)
    assert sum(sizes(model).values()) == 16


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 50), st.integers(1, 9)), min_size=1, max_size=8
    ),
    st.sampled_from(["identity", "sqrt"]),
)
def test_the_budget_is_met_within_the_bounds(layers, phi):
    weights = {f"{i}": w for i, (w, _, _) in enumerate(layers)}
    prices = {
        f"{i}": float(p) if phi == "identity" else p**0.5 for i, (_, p, _) in enumerate(layers)
    }
    before = {f"{i}": size for i, (_, _, size) in enumerate(layers)}
    largest = {key: 4 * size for key, size in before.items()}
    after = shared_out(weights, prices, before, 1, largest, "exact")
    spent = sum(prices[k] * after[k] for k in after)
    total = sum(prices[k] * before[k] for k in before)
    assert spent <= total * 1.001 + 0.01
    open_ = [k for k in after if after[k] < largest[k]]
    assert not open_ or total - spent < max(prices[k] for k in open_) + 0.01 * total
    assert all(1 <= after[k] <= largest[k] for k in after)


def test_planted_gradients_give_ranks_in_proportion():
    sizes_ = dict.fromkeys("abcd", 8)
    prices = dict.fromkeys("abcd", 100.0)
    after = shared_out(
        {"a": 0.5, "b": 0.25, "c": 0.125, "d": 0.125},
        prices,
        sizes_,
        1,
        dict.fromkeys("abcd", 32),
        "exact",
    )
    assert after == {"a": 16, "b": 8, "c": 4, "d": 4}
    released = shared_out(
        {"a": 0.9, "b": 0.1, "c": 0.0, "d": 0.0},
        prices,
        sizes_,
        4,
        dict.fromkeys("abcd", 16),
        "reference",
    )
    assert released == {"a": 16, "b": 4, "c": 4, "d": 4}, "clipped, and the total is not kept"


@pytest.mark.parametrize(
    "method",
    [
        LoRA,
        partial(PiCa, share=False),
        partial(PiCa, side="output", share=False),
        SBoRA,
        partial(SBoRA, variant="fb"),
        MELoRA,
    ],
    ids=["LoRA", "PiCa", "PiCa output", "SBoRA", "SBoRA fb", "MELoRA"],
)
def test_the_start_is_the_least_squares_fit(method):
    """Against numpy.

    Each column of the design is the change by one number of the closing factor.
    """
    torch.manual_seed(0)
    holder = nn.Module()
    layer = holder.layer = method(nn.Linear(24, 16).double())
    target = torch.randn(16, 24, dtype=torch.float64)
    (axis,) = rank_axes(holder).values()
    (closing,) = axis.closing()
    base = layer.dense().detach()
    columns = []
    for i in range(closing.tensor.numel()):
        closing.tensor.data.view(-1)[i] = 1
        columns.append((layer.dense().detach() - base).flatten())
        closing.tensor.data.view(-1)[i] = 0
    design = torch.stack(columns, 1).numpy()
    want = design @ np.linalg.lstsq(design, target.flatten().numpy(), rcond=None)[0]
    fit_change(axis, [target])
    np.testing.assert_allclose((layer.dense() - base).detach().flatten().numpy(), want, atol=1e-7)


def test_loras_fit_is_the_closed_form():
    torch.manual_seed(0)
    holder = nn.Module()
    layer = holder.layer = LoRA(nn.Linear(48, 24).double())
    G = torch.randn(24, 48, dtype=torch.float64)
    (axis,) = rank_axes(holder).values()
    fit_change(axis, [-0.3 * G])
    A = layer.A.detach()
    want = -0.3 / layer.scale * G @ A.T @ torch.linalg.inv(A @ A.T)
    torch.testing.assert_close(layer.B.detach(), want, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    "method",
    [
        LORA4,
        partial(MELoRA, minis=4),
        partial(SBoRA, rank=4),
        partial(PiCa, rank=4),
        [HyperAdapt, LORA4],
    ],
)
def test_the_start_is_a_descent_step(method):
    losses = {}

    class Look(GoRA):
        def initialize(self, axes, evidence):
            losses["base"] = float(self.run.loss(0))
            super().initialize(axes, evidence)
            losses["start"] = float(self.run.loss(0))

    fit(Low(method), Look(batches=1, lr=1e-3), steps=1)
    assert losses["start"] < losses["base"]


def test_allocation_alone_leaves_the_function():
    class Look(GoRA):
        def initialize(self, axes, evidence):
            before = float(self.run.loss(0))
            super().initialize(axes, evidence)
            assert float(self.run.loss(0)) == before

    for method in (partial(DoRA, rank=4), NOLA):
        with pytest.raises(
            ValueError,
            match=r"with init=True needs axes that can gradient_init "
            r"\(with init=False it does not\)",
        ):
            fit(Low(method), Look(), steps=1)
        fit(Low(method), Look(init=False, batches=2), steps=1)


@pytest.mark.parametrize("share", ["exact", "reference"])
def test_a_layer_without_gradient_may_lose_all_its_units(share):
    weights, prices = {"a": 1.0, "b": 0.0}, {"a": 20.0, "b": 20.0}
    sizes_, largest = dict.fromkeys(weights, 4), dict.fromkeys(weights, 16)
    assert shared_out(weights, prices, sizes_, 0, largest, share) == {"a": 8, "b": 0}


def test_the_start_passes_over_a_layer_without_units():
    model = Low()
    axes = rank_axes(model)
    axes["low.0:rank"].resize(keep=[])
    gradients = {(key, 0): torch.ones(12, 16) for key in axes}
    GoRA().initialize(axes, gradients)
    assert model.low[0].B.shape == (12, 0)
    assert model.low[1].B.any()


def test_frozen_weights_stay_frozen_and_without_gradient():
    model = Low()
    fit(model, GoRA(batches=2), steps=1)
    for layer in rank_axes(model).values():
        weight = layer.members[0][0].innermost.weight
        assert weight.grad is None
        assert not weight.requires_grad


def test_composition_and_resume(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def pair():
        return AdaLoRA(8, every=2, warmup=2, final=2), GoRA(batches=2)

    whole, (ada, gora) = Low(), pair()
    want = everything(whole, fit(whole, ada, gora, checkpoint, steps=10))
    assert ada.run.start_sizes == gora.events[0]["sizes"]
    for step in (1, 5, 9):
        model, (ada, gora) = Low(), pair()
        gora.choose = None
        have = everything(
            model, fit(model, ada, gora, ckpt_path=tmp_path / f"step={step}.ckpt", steps=10)
        )
        assert not [key for key in want if not torch.equal(have[key], want[key])], step


def test_refusals():
    for arguments in ({"importance_of_weight": "x"}, {"phi": "x"}, {"share": "x"}):
        with pytest.raises(ValueError, match="use one of union_mean"):
            GoRA(**arguments)
    with pytest.raises(ValueError, match="all are above 0"):
        GoRA(lr=0.0)
    model = Toy(LORA4)
    with pytest.raises(ValueError, match="GoRA looks at training batches, and got none"):
        GoRA().start(model, torch.optim.Adam(model.parameters()), 10)
