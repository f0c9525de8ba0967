"""GoRA: ranks by the gradient of the frozen weights, and a start that is its compressed step."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.plans import apportion
from adaptrank.axes import CostModel, RankAxis
from adaptrank.parameterizations import Parameterization

IMPORTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "union_mean": lambda W, G: (W * G).abs().mean(),
    "union_norm": lambda W, G: (W * G).norm(),
    "grad_norm": lambda W, G: G.norm(),
    "grad_mean": lambda W, G: G.abs().mean(),
}
"""Of a layer, from its weight and the gradient of it; those of the release that are cheap."""


class GoRA(Allocator):
    """Before training, average the gradient G of every weight W over some batches, and give ranks by mean |W G|.

    Importances are normalized by their sum, or by a softmax of temperature `temperature`. The total, sum over the layers of phi(m + n) r with
    phi the identity, the root or log(1 + .), is that of the start, and is shared out by largest remainder within r_min and r_max, so that it is
    met (`share="reference"` rounds as released, where the total comes out as it will).

    Then the closing factor becomes the least-squares fit of -gamma G, gamma = lr sqrt(n) / r: with LoRA, B = -gamma / s G A^T (A A^T)^-1.
    So the first loss is not the base's, by design. The sign is that of a descent step; the snapshot of the release that was read has no
    minus there, while its own check compares with one.

    Source: arXiv:2502.12171; rules from the authors' code: 32 batches, 8 units, 4 to 32, lr 5e-2, alpha 16, union_mean in its scripts and
        union_norm in its parser. Which of the two the paper means was not verified.
    Args:
        batches: training batches to average over.
        importance_of_weight: "union_mean", "union_norm", "grad_norm" or "grad_mean".
        phi: "identity", "sqrt" or "log1p", of what a unit costs.
        temperature: of a softmax over the layers, instead of the sum; None is the sum.
        r_min: least size of an axis.
        r_max: largest size of an axis; None is four times the present one.
        share: "exact" or "reference".
        init: whether the gradient becomes the start; without it only the ranks are chosen.
        lr: of the step that the start is.
        seed: of what fresh units draw.
    Raises:
        ValueError: for arguments out of range; at the start, if there are no batches, or a layer is not linear.
    """

    source = "arXiv:2502.12171"
    options = {"init": frozenset({"gradient_init"})}
    moves = False

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
        super().__init__(None, warmup=0, final=0, floor=r_min, cap=r_max, seed=seed)
        if (
            importance_of_weight not in IMPORTANCES
            or phi not in _PHI
            or share not in ("exact", "reference")
        ):
            raise UserError(
                f"importance_of_weight={importance_of_weight!r}, phi={phi!r}, share={share!r}; use one of {', '.join(IMPORTANCES)}; "
                f"of {', '.join(_PHI)}; 'exact' or 'reference'."
            )
        if batches < 1 or lr <= 0 or (temperature is not None and temperature <= 0):
            raise UserError(
                f"batches={batches}, lr={lr}, temperature={temperature}: all are above 0."
            )
        self.count, self.kind, self.phi, self.temperature = (
            batches,
            importance_of_weight,
            phi,
            temperature,
        )
        self.share, self.init, self.lr = share, init, lr
        self._gradients: dict[
            tuple[str, int], Tensor
        ] = {}  # (axis, which of its layers) -> (m, n), on the CPU

    def initial_ranks(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int]:
        self._gradients = self._average(batches)
        weights, prices, sizes = {}, {}, self.sizes()
        for key, axis in self.run.axes.items():
            found = [
                (layer, self._gradients.get((key, i))) for i, (layer, _) in enumerate(axis.members)
            ]
            values = [
                IMPORTANCES[self.kind](layer.base_weight.float().cpu(), G)
                for layer, G in found
                if G is not None
            ]
            weights[key] = float(torch.stack(values).detach().mean()) if values else 0.0
            prices[key] = _PHI[self.phi](sum(axis.members[0][0].shape))
        total = sum(weights.values())
        if self.temperature is not None and total:
            normalized = torch.tensor([w / total for w in weights.values()], dtype=torch.float64)
            weights = dict(
                zip(weights, torch.softmax(normalized / self.temperature, 0).tolist(), strict=True)
            )
        elif total:
            weights = {key: weight / total for key, weight in weights.items()}
        return shared_out(weights, prices, sizes, self.floor, self._largest(sizes), self.share)

    def _largest(self, sizes: Mapping[str, int]) -> dict[str, int]:
        own = {key: axis.limits()[1] for key, axis in self.run.axes.items()}
        caps = {key: 4 * size if self.cap is None else self.cap for key, size in sizes.items()}
        grows = {key: "grow" in axis.capabilities for key, axis in self.run.axes.items()}
        fits = {
            key: cap if (most := own[key]) is None else min(cap, most) for key, cap in caps.items()
        }
        return {
            key: max(self.floor, cap if grows[key] else min(cap, sizes[key]))
            for key, cap in fits.items()
        }

    def _average(self, batches: Iterable[Any]) -> dict[tuple[str, int], Tensor]:
        """The gradient of each weight, from what enters its layer and the gradient of what leaves it; the weight needs none."""
        sums: dict[tuple[str, int], Tensor] = {}
        handles = []
        for key, axis in self.run.axes.items():
            for i, (layer, _) in enumerate(axis.members):
                if (
                    not isinstance(layer.innermost, nn.Linear)
                    and type(layer.innermost).__name__ != "Conv1D"
                ):
                    raise UserError(
                        f"GoRA takes gradients of linear layers, and {key} is {type(layer.innermost).__name__}; leave it out of the adapters."
                    )
                handles.append(layer.register_forward_hook(partial(_gather, sums, (key, i))))
        read = 0
        try:
            for batch in batches:
                if read == self.count:
                    break
                with torch.enable_grad():
                    trained = [p for p in self.model.parameters() if p.requires_grad]
                    torch.autograd.grad(self.loss(batch), trained, allow_unused=True)
                read += 1
        finally:
            for handle in handles:
                handle.remove()
        if not read:
            raise UserError(
                "GoRA looks at training batches, and got none; give `start` batches and a loss."
            )
        return {place: self.reduce(sums[place] / read) for place in sorted(sums)}

    def begin(self, sizes: Mapping[str, int]) -> None:
        if self.init:
            for key, axis in self.run.axes.items():
                members = [layer for layer, _ in axis.members]
                targets = [self._gradients.get((key, i)) for i in range(len(members))]
                gamma = self.lr * math.sqrt(members[0].shape[1]) / len(axis)
                fit_change(axis, [None if G is None else -gamma * G for G in targets])
        self._gradients = {}


_PHI: dict[str, Callable[[float], float]] = {
    "identity": float,
    "sqrt": math.sqrt,
    "log1p": math.log1p,
}


def _gather(
    sums: dict[Any, Tensor], place: Any, layer: nn.Module, args: tuple[Any, ...], output: Tensor
) -> None:
    x = args[0].detach()

    def add(grad: Tensor) -> None:
        G = (grad.flatten(0, -2).float().T @ x.flatten(0, -2).float()).cpu()
        sums[place] = sums[place] + G if place in sums else G

    if output.requires_grad:
        output.register_hook(add)  # type: ignore[no-untyped-call]


def shared_out(
    weights: Mapping[str, float],
    prices: Mapping[str, float],
    sizes: Mapping[str, int],
    least: int,
    largest: Mapping[str, int],
    share: str,
) -> dict[str, int]:
    """Ranks with sum price r = sum price r_0, each about weight total / price, within bounds. Pure.

    `share="reference"` is the released rounding, clip(round(total w) // price, least, largest), which keeps no total.
    """
    total = sum(prices[key] * size for key, size in sizes.items())
    if share == "reference":
        return {
            k: min(max(round(total * w) // max(1, round(prices[k])), least), largest[k])
            for k, w in weights.items()
        }
    scale = 1 if all(price == int(price) for price in prices.values()) else 1000
    cost = CostModel(0, tuple((max(1, round(scale * prices[key])), (key,)) for key in weights))
    return apportion(
        {k: w / prices[k] for k, w in weights.items()},
        cost,
        cost.total(dict(sizes)),
        least,
        largest,
    )


@torch.no_grad()
def fit_change(axis: RankAxis, targets: list[Tensor | None], steps: int = 50) -> None:
    """Set the closing factors of an axis to the least-squares fit of its layers' change to `targets`, (m, n) each.

    The change is linear in the closing factors, so conjugate gradients on the normal equations need the method's own `weight` and its
    derivative, and no formula of a method: minimize sum ||D(c) - T||^2.
    """
    members = [
        (layer, target)
        for (layer, _), target in zip(axis.members, targets, strict=True)
        if target is not None
    ]
    closing = list({id(slot.tensor): slot.tensor for slot in axis.closing()}.values())
    if not members:
        return
    for tensor in closing:
        tensor.data.zero_()
    bases = [
        _dense(layer).detach() for layer, _ in members
    ]  # with the closing factors at zero: what D is counted from

    def change(values: list[Tensor]) -> list[Tensor]:
        _set(closing, values)
        return [
            _dense(layer).detach() - base for (layer, _), base in zip(members, bases, strict=True)
        ]

    def adjoint(residuals: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            total = sum(
                (_dense(layer) * R).sum() for (layer, _), R in zip(members, residuals, strict=True)
            )
            assert isinstance(total, Tensor)
            return list(torch.autograd.grad(total, closing))

    c = [torch.zeros_like(t) for t in closing]
    r = adjoint([T.to(base) for (_, T), base in zip(members, bases, strict=True)])
    p, size = [v.clone() for v in r], _dot(r, r)
    enough = size * (10 * torch.finfo(closing[0].dtype).eps) ** 2  # beyond it there is but rounding
    for _ in range(steps):
        q = adjoint(change(p)) if size > enough else []
        curvature = _dot(p, q)
        if curvature <= 0:
            break
        step = size / curvature
        c = [a + step * b for a, b in zip(c, p, strict=True)]
        r = [a - step * b for a, b in zip(r, q, strict=True)]
        before, size = size, _dot(r, r)
        p = [a + size / before * b for a, b in zip(r, p, strict=True)]
    _set(closing, c)


def _dense(layer: Parameterization) -> Tensor:
    return layer.dense()


def _set(tensors: list[Tensor], values: list[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.data.copy_(value)


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    return float(sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=False)))
