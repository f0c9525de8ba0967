"""Adapters whose axes have no units: files, merging, composition, penalties, clipping, reports."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import METHODS
from test_allocators import SVD4, Toy, fit, sizes
from torch import nn

from adaptrank import adapt, compose, load_adapter, merge, save_adapter
from adaptrank.artifacts import read_adapter
from adaptrank.artifacts.planning import at_the_end
from adaptrank.axes import generator, rank_axes
from adaptrank.composition import Compression, spectra
from adaptrank.composition.changes import Product, shared_ranks
from adaptrank.composition.operators import OPERATORS
from adaptrank.injection import parameter_table
from adaptrank.modules.optim import parameter_groups
from adaptrank.parameterizations import SVD, DoRA, LoRA
from adaptrank.reports.history import read_history
from adaptrank.reports.ranks import write_report
from adaptrank.testing import first_tensor, perturb
from adaptrank.training.adapter_gradients import AdapterGradients
from adaptrank.training.penalties import add_penalty_gradients

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
WITH_AXES = [cls for cls in METHODS if rank_axes(cls(cls.example()))]


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))


def emptied(method, numbers, seed=1, model=None):
    """Return an adapted net whose layers of these numbers have no units."""
    model = adapt(model or net(), "all-linear", method)
    perturb(model, seed=seed)
    for number in numbers:
        for axis in rank_axes(model[number]).values():
            axis.resize([])
    return model


# ---- files


class Holder(nn.Module):
    """The example of a method."""

    def __init__(self, method):
        super().__init__()
        torch.manual_seed(0)
        self.layer = method.example()

    def forward(self, x):
        return first_tensor(self.layer(x))


@pytest.mark.parametrize("method", WITH_AXES, ids=lambda cls: cls.__name__)
@torch.no_grad()
def test_an_adapter_without_any_unit_is_saved_and_loads(tmp_path, method):
    model = adapt(Holder(method).eval(), "layer", method)
    perturb(model)
    for axis in rank_axes(model).values():
        axis.resize([])
    layer = model.layer
    x = layer.example_input((3,), torch.Generator().manual_seed(0))
    save_adapter(model, tmp_path)
    assert set(read_adapter(tmp_path)["ranks"].values()) == {0}
    loaded = load_adapter(Holder(method).eval(), tmp_path)
    assert loaded.layer.idle == layer.idle
    assert torch.equal(loaded(x), model(x))
    if layer.idle:
        assert torch.equal(loaded(x), Holder(method).eval()(x))
    # It loads into an adapter that has units, too.
    other = adapt(Holder(method).eval(), "layer", method)
    perturb(other, seed=2)
    assert torch.equal(load_adapter(other, tmp_path)(x), model(x))


def test_merging_leaves_the_bits_of_layers_without_units():
    base = net().to(torch.bfloat16)
    model = emptied(LoRA, [0, 2], model=copy.deepcopy(base))
    merge(model)
    assert [torch.equal(a.weight, b.weight) for a, b in zip(model, base, strict=True)] == [
        True,
        False,
        True,
    ]


def test_a_quantized_layer_without_units_can_be_merged_away(monkeypatch):
    """No bit of it changes, and only a change is refused there."""
    base = net()
    model = emptied(LoRA, [1], model=copy.deepcopy(base))
    monkeypatch.setattr("adaptrank.layers.quantized", lambda layer: layer is model[1].innermost)
    merge(model)
    assert torch.equal(model[1].weight, base[1].weight)
    other = emptied(LoRA, [0])
    monkeypatch.setattr("adaptrank.layers.quantized", lambda layer: layer is other[1].innermost)
    with pytest.raises(ValueError, match="1 is quantized"):
        merge(other)


# ---- figures


def test_figures_count_layers_without_units():
    model = emptied(LoRA, [0, 1, 2])
    assert sum(row[3] for row in parameter_table(model)) == 0
    assert sum(row[1] for row in parameter_table(model)) == 3
    # A budget has no proportion to follow, so the axes grow alike: 32 numbers a unit.
    assert at_the_end(model, "ranks", 6) == 6 * 32
    for measures in spectra(model).values():
        assert (measures["norm"], measures["rank"], measures["effective_rank"]) == (0, 0, 0)


def test_a_report_of_a_run_from_and_to_zero(tmp_path):
    pytest.importorskip("matplotlib")
    events = [
        {"step": 0, "sizes": {"a.0.q:rank": 2, "a.1.q:rank": 0}, "total": 2},
        {
            "step": 4,
            "sizes": {"a.0.q:rank": 0, "a.1.q:rank": 1},
            "pruned": {"a.0.q:rank": [0, 1]},
            "grown": {"a.1.q:rank": 1},
            "total": 1,
        },
        {"step": 6, "sizes": {"a.1.q:rank": 0}, "pruned": {"a.1.q:rank": [0]}, "total": 0},
    ]
    (tmp_path / "ranks.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (tmp_path / "ranks.json").write_text(json.dumps({"a.0.q:rank": 0, "a.1.q:rank": 0}))
    history = read_history(tmp_path)
    assert set(history.end.values()) == {0}
    page = write_report(history, tmp_path / "report", "replay")[-1]
    assert "2 to 0 on 2 axes" in Path(page).read_text()


# ---- composition


@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_composition_of_adapters_without_units(tmp_path, operator):
    whole, none = emptied(LoRA, [0], seed=2), emptied(LoRA, [0, 1, 2])
    save_adapter(whole, tmp_path / "whole")
    save_adapter(none, tmp_path / "none")
    nothing = compose(net(), [tmp_path / "none"] * 2, operator=operator, merged=True)
    assert nothing["rms_cos"] is None
    for adapters in (["whole", "none"], ["none", "none"]):
        model = net()
        report = compose(
            model,
            [tmp_path / name for name in adapters],
            operator=operator,
            compression=Compression(rank=8),
        )
        assert [facts["interference"] for facts in report["layers"].values()] == [0, 0, 0]
        save_adapter(model, tmp_path / "composed")
        loaded = load_adapter(net(), tmp_path / "composed")
        assert torch.equal(loaded(X), model(X))
        if operator == "sum" or adapters[0] == "none":
            want = whole if adapters[0] == "whole" else net()
            torch.testing.assert_close(model(X), want(X), rtol=1e-4, atol=1e-5)


def test_no_direction_is_paid_for_a_change_of_rank_0():
    empty, other = (Product(torch.ones(4, r), torch.ones(r, 4)) for r in (0, 1))
    assert shared_ranks([empty, other], 8) == [0, 1]
    with pytest.raises(ValueError, match="budget of 7 parameters is below 8"):
        shared_ranks([empty, other], 7)


# ---- training


def test_the_penalty_is_a_mean_over_all_layers_whether_they_have_units_or_not():
    """With the penalties R_1 and R_2, and a layer without units, it is (R_1 + R_2) / 3."""
    model = emptied(partial(SVD, rank=4, orth=0.3), [0])
    want = sum(layer.penalty() for layer in model[1:]) / 3
    gradients = torch.autograd.grad(want, [layer.P for layer in model[1:]])
    torch.testing.assert_close(add_penalty_gradients(model), want.detach())
    for layer, gradient in zip(model[1:], gradients, strict=True):
        torch.testing.assert_close(layer.P.grad, gradient)
    assert model[0].P.grad is None
    assert add_penalty_gradients(emptied(SVD, [0, 1, 2])) is None


@pytest.mark.parametrize("method", [partial(DoRA, rank=4), SVD4], ids=["DoRA", "SVD"])
def test_gradients_can_be_clipped_by_their_largest_value(method):
    """PyTorch knows no largest value of an empty gradient, and DoRA trains without units."""

    class Clipped(Toy):
        def configure_gradient_clipping(self, optimizer, *_, **__):
            nn.utils.clip_grad_norm_(self.parameters(), 0.1, float("inf"))
            self.largest = max(p.grad.abs().max() for p in self.parameters() if p.grad is not None)

    model = Clipped(method, make=partial(torch.optim.AdamW, fused=True))
    first = next(iter(rank_axes(model).values()))
    first.resize([])
    fit(model, AdapterGradients(), steps=2)
    assert sizes(model)["maps.0:rank"] == 0
    assert 0 < model.largest <= 0.1 + 1e-6


def test_an_adapter_that_cannot_learn_is_refused():
    model = emptied(LoRA, [0, 1, 2])
    with pytest.raises(ValueError, match=r"No layer has a unit.*in rank_pattern"):
        parameter_groups(model)
    rank_axes(model)["2:rank"].resize(None, 1, generator(0, "2:rank", 0))
    assert len(parameter_groups(model)) == 1


def test_a_compiled_model_recompiles_when_a_layer_loses_or_gets_its_units():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = emptied(LoRA, [])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    axis = rank_axes(model)["0:rank"]
    for count, change in enumerate(
        (
            lambda: axis.resize(range(8)),
            lambda: axis.resize([]),
            lambda: axis.resize(None, 2, generator(0, axis.key, 0)),
        ),
        start=1,
    ):
        change()
        for _ in range(2):
            y = compiled(X)
            y.sum().backward()
            torch.testing.assert_close(y, model(X))
        assert len(graphs) == count
    assert axis.members[0][0].B.grad.any()
