"""PT-PEFT: prefix-tuning first, then another method together with the prefix."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import NOT_NEGATIVE, POSITIVE
from adaptrank.allocation.schedules import check_length, steps
from adaptrank.parameterizations import Prefix, wrappers
from adaptrank.strategies.rounds import Rounds
from adaptrank.strategies.strategy import TrainingStrategy


class PTPEFT(TrainingStrategy):
    """Trains a prefix alone, and then other adapters together with it.

    The model has a `Prefix` and other adapters, such as LoRA, that start at the frozen weights.
    Stage 1 trains the prefix. The others are part of the model, and change nothing yet. Stage 2
    trains all of them from a fresh optimizer state. The learning rate warms up again, and that of
    the prefix is `prefix_rate` of its own. With w steps of warm-up, step t of stage 2 has

        schedule * min(1, t / w),    with t counted from 0,

    and the prefix has `prefix_rate` of that. The user's schedule runs over both stages. Modules
    that train whole, such as a classifier, train in both.

    A prefix and another adapter need different rates, as in `learning_rates: {Prefix: 0.01}`. This
    library suggests 1e-2 for the prefix and 2e-4 for LoRA. An allocator acts in stage 2 alone, so
    its warm-up covers stage 1.

    Source: arXiv:2411.00029. Its abstract says that the order keeps the model's space of features.
        The lengths of the stages and the rates were not read, and are this library's choice.
    Args:
        stage1: length of stage 1, as a number of steps, or as a fraction of all steps.
        warmup: length of the warm-up of stage 2, as a number of steps, or as a fraction of its
            steps.
        prefix_rate: learning rate of the prefix in stage 2, over its learning rate.
        freeze_prefix: whether the prefix stays as it is in stage 2.
    Raises:
        UserError: if a stage has no step, if the model has no prefix or nothing else, if another
            adapter does not start at the frozen weight, or if the optimizer has no group for the
            prefix alone.
    """

    source = "arXiv:2411.00029"
    ranges: ClassVar = {
        "stage1": NOT_NEGATIVE,
        "warmup": NOT_NEGATIVE,
        "prefix_rate": POSITIVE,
    }
    beside = ("Prefix",)

    def __init__(
        self,
        *,
        stage1: int | float = 0.3,
        warmup: int | float = 0.1,
        prefix_rate: float = 0.1,
        freeze_prefix: bool = False,
    ) -> None:
        super().__init__()
        check_length("stage1", stage1)
        check_length("warmup", warmup)
        self.stage1, self.warmup = stage1, warmup
        self.prefix_rate, self.freeze_prefix = prefix_rate, freeze_prefix

    def rounds(self, total_steps: int) -> Rounds:
        border = steps(self.stage1, total_steps)
        if not 0 < border < total_steps:
            raise UserError(
                f"stage1={self.stage1} leaves one of the two stages of {self.label} without a step "
                f"in a run of {total_steps}; give a fraction between 0.0 and 1.0, such as 0.3, or "
                f"train longer."
            )
        return Rounds.at([border], total_steps)

    def prepare(self, model: nn.Module) -> None:
        others = [wrapper for wrapper in wrappers(model) if not isinstance(wrapper, Prefix)]
        if len(others) == len(wrappers(model)):
            raise UserError(
                f"{self.label} trains a prefix first, and this model has none; add "
                f"{{targets: all, parameterization: [Prefix]}} to model.adapters."
            )
        if not others:
            raise UserError(
                f"{self.label} trains other adapters after the prefix, and this model has none; "
                f"add one such as {{parameterization: [LoRA]}} to model.adapters."
            )
        for wrapper in others:
            if not wrapper.starts_at_base:
                raise UserError(
                    f"{self.label} trains the prefix of the frozen model, and "
                    f"{type(wrapper).__name__} with these arguments does not start at it; use a "
                    f"method such as LoRA."
                )

    def enter(self, number: int) -> None:
        if number == 1:
            self.forget(self.run.optimized())

    def arrange(self, number: int) -> None:
        if self.prefix_rate != 1 and not self.freeze_prefix:
            self._check_groups()
        optimized = set(map(id, self.run.optimized()))
        for wrapper in wrappers(self.run.model):
            stages: tuple[int, ...] = (1,)
            if isinstance(wrapper, Prefix):
                stages = (0,) if self.freeze_prefix else (0, 1)
            for _, tensor in wrapper.own_parameters():
                if id(tensor) in optimized and self.run.flags.trained(tensor):
                    tensor.requires_grad_(number in stages)
        for allocator in self.run.allocators:
            allocator.engine.rest_until(self.run.rounds.start(1))

    def rate(self, steps_done: int, group: Mapping[str, Any]) -> float:
        rounds = self.run.rounds
        if rounds.number(steps_done) == 0:
            return 1.0
        step, warmup = steps_done - rounds.start(1), steps(self.warmup, rounds.length(1))
        rising = step / warmup if step < warmup else 1.0
        prefix = self._prefix_ids()
        is_prefix = any(id(tensor) in prefix for tensor in group["params"])
        return rising * self.prefix_rate if is_prefix else rising

    def _prefix_ids(self) -> set[int]:
        """Return the ids of the tensors of the prefix, an encoder's included."""
        inside = [wrapper for layer in self.layers.values() for wrapper in layer.nest]
        prefixes = [wrapper for wrapper in inside if isinstance(wrapper, Prefix)]
        return {id(tensor) for prefix in prefixes for _, tensor in prefix.own_parameters()}

    def _check_groups(self) -> None:
        """Refuse a parameter group that holds the prefix and other tensors.

        Raises:
            UserError: says how to give the prefix a group of its own.
        """
        prefix = self._prefix_ids()
        for optimizer in self.run.optimizers:
            for group in optimizer.param_groups:
                of_prefix = sum(id(tensor) in prefix for tensor in group["params"])
                if 0 < of_prefix < len(group["params"]):
                    raise UserError(
                        f"{self.label} multiplies the learning rate of the prefix by "
                        f"prefix_rate={self.prefix_rate} in stage 2, and the optimizer has the "
                        f"prefix in one parameter group with other tensors; give the prefix a rate "
                        f"of its own, learning_rates: {{Prefix: 0.01}} in the model, or set "
                        f"prefix_rate: 1."
                    )
