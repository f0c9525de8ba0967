"""Tests of the SVD form beside the common contract."""

import pytest
import torch
from torch import nn

from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.parameterizations import SVD, LoRA
from adaptrank.testing import builder, check_parameter_count, perturb
from adaptrank.training.penalties import add_penalty_gradients


def build(**arguments):
    layer = SVD(nn.Linear(48, 24).double(), **arguments)
    perturb(layer)
    return layer


def test_closed_count():
    check_parameter_count(builder(SVD, nn.Linear(48, 24)), lambda m, n: 8 * (m + n + 1))


def test_the_penalty_is_that_of_the_released_codes():
    layer = build(orth=0.3)
    eye = torch.eye(8, dtype=torch.float64)
    off_p = (layer.P.T @ layer.P - eye).square().sum().sqrt()
    off_q = (layer.Q @ layer.Q.T - eye).square().sum().sqrt()
    torch.testing.assert_close(layer.penalty(), 0.3 * (off_p + off_q) / 2, rtol=1e-12, atol=1e-12)
    assert build(orth=0).penalty() is None


def test_the_library_averages_the_penalty_over_all_p_and_q():
    model = nn.Sequential(build(orth=0.3), nn.Sequential(build(orth=0.3), LoRA(nn.Linear(4, 4))))
    layers = [model[0], model[1][0]]
    want = torch.stack([layer.penalty() for layer in layers]).mean()
    grads = torch.autograd.grad(want, [layer.P for layer in layers])
    layers[0].P.grad = torch.ones_like(layers[0].P)
    value = add_penalty_gradients(model)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(layers[0].P.grad, 1 + grads[0])
    torch.testing.assert_close(layers[1].P.grad, grads[1])
    assert layers[0].l.grad is None
    assert add_penalty_gradients(nn.Sequential(LoRA(nn.Linear(4, 4)))) is None


@pytest.mark.parametrize("keep", [range(8), [1, 5], [2, 2, 3]])
def test_fresh_directions_are_orthogonal_to_the_living_and_as_long(keep):
    layer = build()
    axis, keep = rank_axes(layer)[":rank"], list(keep)
    axis.resize(keep, 3, generator(0, axis.key, 1))
    for columns in (layer.P.detach(), layer.Q.detach().T):
        old, new = columns[:, : len(keep)], columns[:, len(keep) :]
        length = old.square().sum(0).mean().sqrt()
        torch.testing.assert_close(
            new.T @ new, length**2 * torch.eye(3).double(), rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(
            old.T @ new, torch.zeros(len(keep), 3).double(), rtol=1e-10, atol=1e-10
        )
    assert not layer.l[len(keep) :].any()


def test_there_is_room_for_min_m_n_units_and_no_more():
    layer = build()
    axis = rank_axes(layer)[":rank"]
    axis.resize(grow=16, generator=generator(0, "a", 1))
    assert len(axis) == 24
    with pytest.raises(ValueError, match="holds at most 24 units"):
        axis.resize(grow=1, generator=generator(0, "a", 2))
    with pytest.raises(ValueError, match="does not fit a 24x48 layer; use 1 to 24"):
        SVD(nn.Linear(48, 24), rank=25)


def test_the_diagonal_is_the_gate():
    layer = build()
    layer(torch.randn(5, 48, dtype=torch.float64)).square().sum().backward()
    axis = rank_axes(layer)[":rank"]
    torch.testing.assert_close(
        axis.gate_grad(), layer.l.detach() * layer.l.grad, rtol=1e-12, atol=1e-12
    )
    assert cost_model(layer).marginal(":rank", {}) == 48 + 24 + 1
