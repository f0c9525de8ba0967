"""ScaledGD: gradient descent on two factors in the metric of their product."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adaptrank.optimizers.factor_pairs import Factor
from adaptrank.optimizers.model_optimizer import Parameters
from adaptrank.optimizers.pair_optimizer import PairOptimizer
from adaptrank.optimizers.preconditioned_gradients import preconditioned


class ScaledGD(PairOptimizer):
    """A -= lr (B^T B + d I)^-1 gA and B -= lr gB (A A^T + d I)^-1, with d = damping tr / r + 1e-12.

    This is gradient descent with a Riemannian preconditioner. Without damping the path of B A does
    not depend on how it is split into factors. LoRA-RITE without momentum and second moment is the
    same step. Both factors use the other one from before the step. The release updates A first in
    some variants. A factor that is zero has a gradient of zero for its dual, so that the large
    inverse does no harm there.

    Ranks may move, since a pair has no state.

    Source: arXiv:2402.02347 (paper and the authors' code). That d is relative to the mean of the
        diagonal, and a start of B at zero, are decisions of this library.
    Args:
        params: a model, or parameters or groups of them, see `ModelOptimizer`.
        lr: learning rate of the pairs, far above that of Adam.
        weight_decay: decay of both factors, times lr, and of everything else.
        damping: d over the mean of the diagonal.
        betas: of the AdamW that trains everything else.
        adamw_lr: learning rate of everything that belongs to no pair; None is lr.
    Raises:
        UserError: for a number out of range, or a model without a pair of factors.
    """

    source = "arXiv:2402.02347"

    def __init__(
        self,
        params: Parameters,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_lr: float | None = 1e-3,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "damping": damping}
        super().__init__(params, defaults, adamw_lr)

    def step_pairs(
        self, pairs: Sequence[tuple[Factor, ...]], groups: Mapping[int, dict[str, Any]]
    ) -> None:
        for parameter, gradient in preconditioned(pairs, groups):
            group = groups[id(parameter)]
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(gradient * group["lr"])

    def state_numbers(self, model: torch.nn.Module) -> int:
        paired = {id(f.tensor) for left in self.pairs_of(model) for f in (left, left.dual)}
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in paired]
        return sum(2 * parameter.numel() for parameter in others)
