"""Penalties of all layers of a shape in one batch, against one layer at a time."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from adaptrank import adapt, set_enabled, testing
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import SVD, wrappers
from adaptrank.training import penalties


def test_penalties_in_batches_are_those_of_one_layer_at_a_time(monkeypatch):
    def gradients():
        torch.manual_seed(0)
        model = nn.Sequential(
            *[nn.Linear(12, 12) for _ in range(4)], nn.Linear(12, 20), nn.Linear(20, 12)
        ).double()
        adapt(model, "all-linear", partial(SVD, rank=3))
        wrappers(model)[1].orth = 0.7
        for wrapper in wrappers(model):
            testing.perturb(wrapper, 0.3)
        wrappers(model)[0].P.grad = torch.ones_like(wrappers(model)[0].P)
        value = penalties.add_penalty_gradients(model)
        return value, [p.grad for w in wrappers(model) for _, p in w.own_parameters()]

    value, grads = gradients()
    monkeypatch.setattr(penalties, "_batched", lambda group: None)
    plain, want = gradients()
    torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-12)
    assert [g is None for g in grads] == [g is None for g in want]
    for have, expected in zip(grads, want, strict=True):
        if expected is not None:
            torch.testing.assert_close(have, expected, rtol=1e-10, atol=1e-12)


def test_what_a_wrapper_went_through_does_not_change_the_order_of_a_sum(monkeypatch):
    """A resumed run has not gone through the same, and must be equal to the last bit."""
    model = adapt(
        nn.Sequential(*[nn.Linear(12, 12) for _ in range(3)]), "all-linear", partial(SVD, rank=3)
    )
    first = rank_axes(model)["0:rank"]
    first.resize([0, 1])
    first.resize(grow=1, generator=torch.Generator().manual_seed(0))
    with first.gated(torch.ones(3)):
        pass
    set_enabled(model, False)
    set_enabled(model, True)
    groups = []
    monkeypatch.setattr(penalties, "_batched", lambda group: groups.append(len(group)))
    penalties.add_penalty_gradients(model)
    assert groups == [3]


@pytest.mark.parametrize("silent", ["orth", "frozen"])
def test_an_empty_layer_counts_in_the_mean_only_if_it_did_before(silent):
    model = nn.ModuleList(SVD(nn.Linear(8, 8), rank=2) for _ in range(3))
    if silent == "orth":
        model[1].orth = 0.0
    else:
        model[1].requires_grad_(False)

    def weight_of_the_first():
        model[0].P.grad = None
        penalties.add_penalty_gradients(model)
        return model[0].P.grad.clone()

    before = weight_of_the_first()
    for key in ("1:rank", "2:rank"):
        rank_axes(model)[key].resize([])
        torch.testing.assert_close(weight_of_the_first(), before)


class Weighed(SVD):
    """A penalty that depends on a list, as a method of somebody's own may."""

    def __init__(
        self, base: nn.Module, *, weights: tuple[float, ...] = (1.0,), **kwargs: object
    ) -> None:
        super().__init__(base, **kwargs)
        self.weights = list(weights)

    def penalty(self) -> Tensor:
        return self.weights[0] * super().penalty()


def test_layers_whose_penalties_differ_by_a_list_are_not_taken_for_alike():
    layers = [Weighed(nn.Linear(12, 12), weights=(float(weight),)) for weight in (1, 1, 5)]
    for layer in layers:
        testing.perturb(layer, 0.3)
    want = torch.stack([layer.penalty() for layer in layers]).mean()
    torch.testing.assert_close(
        penalties.add_penalty_gradients(nn.Sequential(*layers)), want.detach()
    )
