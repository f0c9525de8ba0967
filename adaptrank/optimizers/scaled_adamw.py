"""ScaledAdamW: AdamW on gradients in the metric of the product of two factors."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptrank.optimizers.factor_pairs import Factor
from adaptrank.optimizers.model_optimizer import Parameters
from adaptrank.optimizers.pair_optimizer import PairOptimizer, replaced_gradients
from adaptrank.optimizers.preconditioned_gradients import preconditioned


class ScaledAdamW(PairOptimizer):
    """AdamW with gA <- (B^T B + d I)^-1 gA and gB <- gB (A A^T + d I)^-1 in place of gradients.

    d = damping tr / r + 1e-12. Both factors use the other one from before the step. Adam's moments
    are taken element by element, so that, unlike ScaledGD and LoRARITE, the path still depends on
    how the product is split.

    There is no state beyond Adam's. It follows changes of ranks as that of AdamW does.

    Source: arXiv:2402.02347 (paper and the authors' code). That d is relative to the mean of the
        diagonal is a decision of this library.
    Args:
        params: a model, or parameters or groups of them, see `ModelOptimizer`.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decay, times lr.
        damping: d over the mean of the diagonal.
        adamw_lr: learning rate of everything that belongs to no pair; None is lr.
    Raises:
        UserError: for a number out of range, or a model without a pair of factors.
    """

    source = "arXiv:2402.02347"

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        damping: float = 1e-6,
        adamw_lr: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
        }
        super().__init__(params, defaults, adamw_lr)

    def step_pairs(
        self, pairs: Sequence[tuple[Factor, ...]], groups: Mapping[int, dict[str, Any]]
    ) -> None:
        gradients = preconditioned(pairs, groups)
        moved = {id(parameter) for parameter, _ in gradients}
        with replaced_gradients(gradients):
            self.step_by_adamw(
                lambda parameter: id(parameter) in moved,
                scaled_lr=False,
                eps=lambda group: float(group["eps"]),
            )
