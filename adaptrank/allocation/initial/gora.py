"""GoRA: ranks by the gradient of the frozen weights, and a start that is its compressed step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import COUNT, NOT_NEGATIVE
from adaptrank.allocation.context import Axes
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.initial.least_squares import fit_change
from adaptrank.allocation.initial.weight_gradients import Place, average_gradients
from adaptrank.allocation.plans import apportion
from adaptrank.axes import CostModel, RankAxis

WEIGHT_IMPORTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "union_mean": lambda W, G: (W * G).abs().mean(),
    "union_norm": lambda W, G: (W * G).norm(),
    "grad_norm": lambda W, G: G.norm(),
    "grad_mean": lambda W, G: G.abs().mean(),
}
"""Importance of a layer from its weight and its gradient: the cheap ones of the release."""

PRICES: dict[str, Callable[[float], float]] = {
    "identity": float,
    "sqrt": math.sqrt,
    "log1p": math.log1p,
}
"""phi: price of a unit of a layer from m + n."""


class GoRA(RankInitializer):
    """Give ranks by mean |W G|, where G is the gradient of a weight W averaged over some batches.

    Importances x are normalized by their sum, or by softmax((x - min) / (max - min) / T) with
    T = `temperature`. The total is the sum over the layers of phi(m + n) r, where phi is the
    identity, the root or log(1 + .). It is that of the start, and is shared out by largest
    remainder within r_min and r_max, so that it is met. With `share="reference"` ranks are rounded
    as released, and the total comes out as it will. The default decides otherwise in
    553 of 600 random states, so tables and reports call it "GoRA (exact total)".

    Then the closing factor becomes the least-squares fit of -gamma G. For LoRA, with W (m, n),

        B = -gamma / s G A^T (A A^T)^-1,    gamma = lr sqrt(n / r).

    So the first change of W is -gamma times G projected onto the rows of A, whatever alpha, the
    scale s and the length of A's rows are. Its norm is about lr |G|, because random rows catch
    sqrt(r / n) of |G|. The same holds for any method: gamma = lr sqrt(numbers in W / numbers in
    the closing factor), summed over the layers that share a factor. The first loss differs from
    that of the base, by design.

    Source: arXiv:2502.12171. The rules are from the authors' code: 32 batches, 8 units, 4 to 32,
    lr 5e-2, alpha 16, union_mean in its scripts and union_norm in its parser. Which of the two the
    paper means was not verified. Departures: the sign is that of a descent step. The release adds
    +gamma G, while its own check compares with -lr G. In the scripts the scale after the start is
    alpha / sqrt(r) of each layer's new rank. Here it stays that of the construction, so
    `LoRA(rslora=True)` comes nearest. The model is in evaluation mode for its gradients, and in
    training mode there. The parser's r_min is 1, as here, and that of the scripts is 4, half of r.
    Methods other than LoRA are ours.

    Args:
        batches: training batches to average over.
        importance_of_weight: "union_mean", "union_norm", "grad_norm" or "grad_mean".
        phi: price of a unit: "identity", "sqrt" or "log1p" of m + n.
        temperature: temperature T of a softmax over the layers, 0.5 in the release. None
            normalizes by the sum, as in its scripts.
        r_min: least size of an axis. 0 lets a layer lose all its units.
        r_max: largest size of an axis. None is four times the present one.
        share: "exact" or "reference".
        init: whether the gradient becomes the start. Otherwise only the ranks are chosen.
        lr: learning rate of the step that the start is.
        seed: seed of the generator that initializes new units.
    Raises:
        UserError: for arguments out of range. At the start of a run: if there are no batches, or a
            layer is not linear.
    """

    source = "arXiv:2502.12171"
    ranges: ClassVar = {"r_min": NOT_NEGATIVE, "r_max": COUNT}
    options = {"init": frozenset({"gradient_init"})}

    def __init__(
        self,
        batches: int = 32,
        importance_of_weight: Literal[
            "union_mean", "union_norm", "grad_norm", "grad_mean"
        ] = "union_mean",
        phi: Literal["identity", "sqrt", "log1p"] = "identity",
        temperature: float | None = None,
        r_min: int = 1,
        r_max: int | None = None,
        share: Literal["exact", "reference"] = "exact",
        init: bool = True,
        lr: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__(floor=r_min, cap=r_max, seed=seed)
        known = importance_of_weight in WEIGHT_IMPORTANCES and phi in PRICES
        if not known or share not in ("exact", "reference"):
            raise UserError(
                f"importance_of_weight={importance_of_weight!r}, phi={phi!r}, share={share!r}: "
                f"use one of {', '.join(WEIGHT_IMPORTANCES)}, one of {', '.join(PRICES)}, and "
                f"'exact' or 'reference'."
            )
        if batches < 1 or lr <= 0 or (temperature is not None and temperature <= 0):
            raise UserError(
                f"batches={batches}, lr={lr}, temperature={temperature}: all are above 0."
            )
        self.count, self.importance_of_weight, self.phi = batches, importance_of_weight, phi
        self.temperature, self.share, self.init, self.lr = temperature, share, init, lr

    @property
    def variant(self) -> str:
        return "exact total" if self.share == "exact" else ""

    @property
    def sets_tensors(self) -> bool:
        return self.init

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        _check_linear(axes)
        gradients = average_gradients(axes, self.run, batches, self.count)
        importances = {}
        prices = {}
        for key, axis in axes.items():
            importances[key] = self._importance(axis, gradients_of(key, axis, gradients))
            prices[key] = PRICES[self.phi](sum(axis.members[0][0].shape))
        weights = normalized(importances, self.temperature)
        sizes = self.run.sizes()
        ranks = shared_out(weights, prices, sizes, self.floor, self._largest(axes), self.share)
        return Choice(ranks, evidence=gradients)

    def initialize(self, axes: Axes, evidence: Mapping[Place, Tensor]) -> None:
        """Set the closing factors to the least-squares fit of -gamma G."""
        if not self.init:
            return
        for key, axis in axes.items():
            if not len(axis):
                continue
            gradients = gradients_of(key, axis, evidence)
            gamma = self.lr * expansion(axis, gradients)
            targets = []
            for gradient in gradients:
                targets.append(None if gradient is None else -gamma * gradient)
            fit_change(axis, targets)

    def _importance(self, axis: RankAxis, gradients: list[Tensor | None]) -> float:
        """Return the mean importance of the layers of an axis, 0 if none has a gradient."""
        of_weight = WEIGHT_IMPORTANCES[self.importance_of_weight]
        values = []
        for (layer, _), gradient in zip(axis.members, gradients, strict=True):
            if gradient is not None:
                values.append(of_weight(layer.base_weight.float().cpu(), gradient))
        if not values:
            return 0.0
        return float(torch.stack(values).detach().mean())

    def _largest(self, axes: Axes) -> dict[str, int]:
        """Return the largest size of each axis: its cap, its own limit, its size if it is fixed."""
        largest = {}
        for key, axis in axes.items():
            size = len(axis)
            bounds = [4 * size if self.cap is None else self.cap]
            limit = axis.limits()[1]
            if limit is not None:
                bounds.append(limit)
            if "grow" not in axis.capabilities:
                bounds.append(size)
            largest[key] = max(self.floor, min(bounds))
        return largest


def _check_linear(axes: Axes) -> None:
    for key, axis in axes.items():
        for layer, _ in axis.members:
            kind = type(layer.innermost).__name__
            if not isinstance(layer.innermost, nn.Linear) and kind != "Conv1D":
                raise UserError(
                    f"GoRA takes gradients of linear layers, and {key} is {kind}. Leave it out of "
                    f"the adapters."
                )


def gradients_of(
    key: str, axis: RankAxis, gradients: Mapping[Place, Tensor]
) -> list[Tensor | None]:
    """Return the gradient of each layer of an axis, or None if it took no part."""
    return [gradients.get((key, index)) for index in range(len(axis.members))]


def expansion(axis: RankAxis, gradients: list[Tensor | None]) -> float:
    """Return |G| over the norm of its fit by the closing factors, for a G of independent numbers.

    The fit is a projection onto a space with as many dimensions as the closing factors have
    numbers. For LoRA this is sqrt(m n / (m r)) = sqrt(n / r).

    Args:
        axis: axis whose closing factors are fitted.
        gradients: gradient of each layer, (m, n), or None for a layer without one.
    """
    numbers = sum(gradient.numel() for gradient in gradients if gradient is not None)
    factors = {id(slot.tensor): slot.tensor for slot in axis.closing()}
    fitted = sum(factor.numel() for factor in factors.values())
    return math.sqrt(numbers / fitted)


def normalized(importances: Mapping[str, float], temperature: float | None) -> dict[str, float]:
    """Return the importances over their sum, or softmax((x - min) / (max - min) / temperature).

    Equal importances get equal shares. Under a sum, zeros stay zeros.
    """
    if temperature is None:
        total = sum(importances.values())
        return {key: value / total if total else value for key, value in importances.items()}
    values = torch.tensor(list(importances.values()), dtype=torch.float64)
    spread = values.max() - values.min()
    logits = (values - values.min()) / (spread if spread else 1.0) / temperature
    return dict(zip(importances, torch.softmax(logits, 0).tolist(), strict=True))


def shared_out(
    weights: Mapping[str, float],
    prices: Mapping[str, float],
    sizes: Mapping[str, int],
    least: int,
    largest: Mapping[str, int],
    share: str,
) -> dict[str, int]:
    """Return ranks r with sum price r = sum price r_0, each about weight total / price. Pure.

    `share="reference"` is the released rounding, clip(round(total w) // price, least, largest)
    with prices that are not rounded. It keeps no total.

    Args:
        weights: axis -> normalized importance.
        prices: axis -> price of a unit.
        sizes: axis -> r_0.
        least: least size of an axis.
        largest: axis -> largest size.
        share: "exact" or "reference".
    """
    if share == "reference":
        total = sum(prices[key] * size for key, size in sizes.items())
        ranks = {}
        for key, weight in weights.items():
            rank = int(round(total * weight) // prices[key])
            ranks[key] = min(max(rank, least), largest[key])
        return ranks
    # Costs are integers: prices that are not count in thousandths.
    scale = 1 if all(price == int(price) for price in prices.values()) else 1000
    terms = [(max(1, round(scale * prices[key])), (key,)) for key in weights]
    cost = CostModel(0, tuple(terms))
    per_price = {key: weight / prices[key] for key, weight in weights.items()}
    return apportion(per_price, cost, cost.total(dict(sizes)), least, largest)
