"""A gate on an axis: what an allocator multiplies units by, in every method that has an axis."""

import pytest
import torch

from adaptrank.artifacts import load_adapter, save_adapter
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt, delete_adapter
from adaptrank.parameterizations import PARAMETERIZATIONS, LoRA, on_example
from adaptrank.testing import perturb

METHODS = [name for name, cls in PARAMETERIZATIONS.items() if on_example(cls).axes]


def example(name, seed=0):
    """A perturbed layer in float64, an input, and its axes."""
    cls = PARAMETERIZATIONS[name]
    torch.manual_seed(seed)
    holder = torch.nn.Module()
    layer = holder.layer = cls(cls.example().double())
    perturb(layer)
    x = layer.example_input((3,), torch.Generator().manual_seed(seed)).double()
    return holder, layer, x


@pytest.mark.parametrize("name", METHODS)
def test_the_gradient_of_a_gate_is_that_of_the_virtual_one(name):
    holder, layer, x = example(name)
    for axis in rank_axes(holder).values():
        gate = torch.ones(len(axis), dtype=torch.float64, requires_grad=True)
        with axis.gated(gate):
            layer(x).square().sum().backward()
        torch.testing.assert_close(gate.grad, axis.gate_grad(), rtol=1e-9, atol=1e-10)
        layer.zero_grad()
        assert axis.gate is None


@pytest.mark.parametrize("name", METHODS)
def test_a_gate_of_zeros_and_ones_is_ablation_and_reaches_the_weight_too(name):
    holder, layer, x = example(name)
    for axis in rank_axes(holder).values():
        mask = (torch.arange(len(axis)) % 2).double()
        off = [unit for unit in range(len(axis)) if not mask[unit]]
        with axis.closed(off):
            want, dense = layer(x), layer.dense()
        with axis.gated(mask):
            torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(layer.dense(), dense, rtol=1e-12, atol=1e-12)
            if layer.mergeable:
                torch.testing.assert_close(layer.definition(x), want, rtol=1e-9, atol=1e-9)
        # On top of one another, a function or not.
        with axis.gated(lambda mask=mask: mask), axis.gated(mask * 2), axis.gated(mask / 2):
            torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
        assert axis.gate is None


@pytest.mark.parametrize("name", METHODS)
def test_folding_leaves_the_function(name):
    holder, layer, x = example(name)
    axes = rank_axes(holder)
    for i, axis in enumerate(axes.values()):
        axis.gate = torch.linspace(0.5, 2 + i, len(axis), dtype=torch.float64)
    want = layer(x)
    for axis in axes.values():
        axis.fold()
        torch.testing.assert_close(layer(x), want, rtol=1e-9, atol=1e-10)
    assert not layer.gates


def test_a_file_holds_the_gate_multiplied_in(tmp_path):
    def build():
        torch.manual_seed(0)
        return adapt(
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)), "all-linear", LoRA
        )

    model, x = build(), torch.randn(2, 8)
    for layer in model:
        perturb(layer)
    for axis in rank_axes(model).values():
        axis.gate = torch.linspace(0, 1, len(axis))
    save_adapter(model, tmp_path / "a")
    again = build()
    delete_adapter(again, "default")
    load_adapter(again, tmp_path / "a")
    torch.testing.assert_close(again(x), model(x))
