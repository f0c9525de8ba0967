"""PairOptimizer: the two factors of a change step together, and everything else by AdamW."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError, some
from adaptrank._options import NOT_NEGATIVE, POSITIVE
from adaptrank.optimizers.factor_pairs import Factor, find_wrappers, left_factor, why_no_pair
from adaptrank.optimizers.model_optimizer import (
    ModelOptimizer,
    Parameters,
    check_options,
    log,
    trained,
)
from adaptrank.parameterizations import Parameterization

ADAMW_EPS = 1e-8
"""The eps of AdamW, for what belongs to no pair."""


class PairOptimizer(ModelOptimizer):
    """An optimizer whose step depends on both factors of a pair.

    A subclass writes `step_pairs`. Whatever belongs to no pair (heads, biases, magnitudes, other
    methods in a nest) is trained by an AdamW with the decay and the betas of its group, whose
    state lies in this optimizer's. So a trainer sees one optimizer, and a schedule moves all
    learning rates alike.

    Args:
        params: a model, or parameters or groups of them.
        defaults: hyperparameters of a group, with lr, betas and weight_decay.
        adamw_lr: learning rate of everything else, in groups without a learning rate of their own;
            None is lr. In a schedule it keeps its ratio to the learning rate of the group.
    Raises:
        UserError: for a number out of range, or a model that does not fit.
    """

    ranges: ClassVar = {"adamw_lr": NOT_NEGATIVE, "damping": NOT_NEGATIVE, "clip": POSITIVE}
    mixes_units = True
    own_rates = True
    _wrappers: Sequence[Parameterization] = ()
    _adamw: torch.optim.AdamW | None = None

    def __init__(
        self, params: Parameters, defaults: dict[str, Any], adamw_lr: float | None
    ) -> None:
        numbers = {key: value for key, value in defaults.items() if not isinstance(value, bool)}
        check_options(type(self), **numbers, adamw_lr=adamw_lr)
        lr = defaults["lr"]
        ratio = 1.0 if adamw_lr is None else adamw_lr / lr if lr else 0.0
        # PyTorch's words for its implementations. They are AdamW's.
        words = {"adamw_lr_ratio": ratio, "fused": None, "foreach": None}
        super().__init__(trained(params), {**defaults, **words})
        if isinstance(params, nn.Module):
            self.bind(params)

    @classmethod
    def misfit(cls, wrapper: Parameterization) -> str:
        return why_no_pair(wrapper)

    def learn(self, model: nn.Module) -> None:
        self._wrappers = find_wrappers(model, type(self).__name__)
        pairs = self.pairs()
        paired = {id(factor.tensor) for factor in pairs} | {id(f.dual.tensor) for f in pairs}
        others = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in paired
        ]
        if others:
            log.info(
                "%s steps %d pairs of factors. Its AdamW steps %d other tensors (%s).",
                type(self).__name__,
                len(pairs),
                len(others),
                some(others, 3),
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters. Pairs among them are found if the model is known."""
        if "lr" in param_group:
            # A rate of its own is meant for all that is in the group.
            param_group.setdefault("adamw_lr_ratio", 1.0)
        super().add_param_group(param_group)
        if self._model is not None:
            self.learn(self._model)

    def pairs_of(self, model: nn.Module) -> list[Factor]:
        """Return the left factor of each pair of a model, which need not be bound."""
        return [left_factor(wrapper) for wrapper in find_wrappers(model, type(self).__name__)]

    def pairs(self) -> list[Factor]:
        """Return the left factor of each pair of the model.

        Raises:
            UserError: if a wrapper does not fit any more, because gates were hung on its units.
        """
        pairs = []
        for wrapper in self._wrappers:
            if wrapper.gates and (reason := self.misfit(wrapper)):
                raise UserError(
                    f"{type(self).__name__} cannot step {type(wrapper).__name__}, which {reason}; "
                    f"use torch.optim.AdamW."
                )
            pairs.append(left_factor(wrapper))
        return pairs

    @abstractmethod
    def step_pairs(
        self, pairs: Sequence[tuple[Factor, ...]], groups: Mapping[int, dict[str, Any]]
    ) -> None:
        """Step the factors that have a gradient.

        Args:
            pairs: the moving factors of each pair that has any, one or two.
            groups: id of a parameter -> its group.
        """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all parameters that have a gradient.

        Raises:
            UserError: if the model is not known, or has gates on a pair's units.
        """
        self.require_model()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        moving: list[tuple[Factor, ...]] = []
        paired: set[int] = set()
        for left in self.pairs():
            factors = [f for f in (left, left.dual) if id(f.tensor) in groups]
            paired.update(id(factor.tensor) for factor in factors)
            if steps := tuple(factor for factor in factors if factor.moves):
                moving.append(steps)
        if moving:
            self.step_pairs(moving, groups)
        self.step_by_adamw(lambda parameter: id(parameter) not in paired, scaled_lr=True)
        return loss

    def step_by_adamw(
        self,
        chosen: Callable[[Tensor], bool],
        scaled_lr: bool,
        eps: Callable[[Mapping[str, Any]], float] = lambda group: ADAMW_EPS,
    ) -> None:
        """Step some parameters by AdamW, whose state is in this optimizer.

        Args:
            chosen: whether a parameter is stepped.
            scaled_lr: whether the learning rate is that of everything beside pairs.
            eps: group -> eps of AdamW.
        """
        if self._adamw is None:
            self._adamw = torch.optim.AdamW([torch.zeros(1)])
        groups = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if chosen(parameter)]
            if not parameters:
                continue
            settings = {
                "params": parameters,
                "lr": group["lr"] * group["adamw_lr_ratio"] if scaled_lr else group["lr"],
                "eps": eps(group),
            }
            same = ("betas", "weight_decay", "fused", "foreach")
            settings |= {key: group[key] for key in same}
            groups.append({**self._adamw.defaults, **settings})
        self._adamw.param_groups, self._adamw.state = groups, self.state
        if groups:
            self._adamw.step()


@contextmanager
def replaced_gradients(gradients: Collection[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the block, let parameters have other gradients, given as (parameter, gradient)."""
    originals = [(parameter, parameter.grad) for parameter, _ in gradients]
    try:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        yield
    finally:
        for parameter, original in originals:
            parameter.grad = original
