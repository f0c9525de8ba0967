"""SD-LoRA: decoupled magnitude and direction for class-incremental learning."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import Range
from adaptrank.allocation import Participant
from adaptrank.axes import RankAxis, generator, rank_axes, resize_stack
from adaptrank.parameterizations import Parameterization, wrappers
from adaptrank.parameterizations.decoupled_lora import DecoupledLoRA
from adaptrank.strategies.merge_and_restart import hangs_on_units
from adaptrank.strategies.rounds import Rounds
from adaptrank.strategies.task_rounds import TaskRounds

NORMS = ("product", "product_of_norms")


class SDLoRA(TaskRounds):
    """Freezes the direction of each task when it ends, and goes on training its magnitude.

    The adapter is `DecoupledLoRA`. Task t trains

        W_t = W + sum_{k<t} a_k c_k unit(B_k A_k) + a_t s B_t A_t,

    with the pair (B_t, A_t) and all magnitudes a_1, ..., a_t. When it ends, the pair becomes a
    frozen direction of length 1, and a fresh pair takes its place: A is drawn anew, and B is zero.
    No example of an earlier task is kept, and at inference no component is chosen: a merge folds
    everything into one weight.

    With `fold_norm` the frozen c_k = s ||B_k A_k||_F of each layer takes up the length, so that the
    function of the model stays the same at the border. Without it c_k is 1, as in the released
    code, and the function jumps.

    `tau` is the variant that drops directions. Earlier directions of the layer explain a new one
    but for a rest. If the length of the rest is at most `tau` of the whole length, only the
    coefficients of the new direction are kept, and take no memory. The rest is lost.

    `ranks` is the variant with smaller ranks for later tasks. The released code takes 10 for four
    tasks, 8 for four, and then 6.

    Source: arXiv:2501.13198, and the released code. The paper's figure divides by the norm of the
        product, and the code by the product of the norms. The variant with `tau` has no released
        code. Its form here is from memory, and not verified. The code starts all magnitudes at 0.8
        again in each task.
    Args:
        norm: "product", ||B A||_F, or "product_of_norms", ||B||_F ||A||_F as in the code.
        fold_norm: whether the border leaves the function as it is.
        restart_magnitudes: whether all magnitudes start anew in each task, as in the code. By
            default they go on from where they are.
        ranks: rank of the pair in each task. None keeps the rank that each layer has.
        tau: largest rest of a direction that is dropped, over its length, such as 0.1. None drops
            none.
        steps_per_task, schedule, seed: as in `TaskRounds`.
    Raises:
        UserError: if the norm is unknown, or a rank is below 1. At the start of a run, if there is
            not one rank for each task, or no layer carries a `DecoupledLoRA`.
    """

    source = "arXiv:2501.13198"
    ranges: ClassVar = {"tau": Range(0, 1, open_high=True)}

    def __init__(
        self,
        *,
        norm: Literal["product", "product_of_norms"] = "product",
        fold_norm: bool = True,
        restart_magnitudes: bool = False,
        ranks: list[int] | None = None,
        tau: float | None = None,
        steps_per_task: list[int] | None = None,
        schedule: Literal["constant", "linear", "cosine"] = "constant",
        seed: int = 0,
    ) -> None:
        super().__init__(steps_per_task=steps_per_task, schedule=schedule, seed=seed)
        if norm not in NORMS:
            raise UserError(f"norm={norm!r} is unknown; use one of {', '.join(NORMS)}.")
        if ranks is not None and (not ranks or min(ranks) < 1):
            raise UserError(f"ranks={ranks} has to be a list of ranks of 1 or more.")
        self.norm, self.fold_norm, self.tau = norm, fold_norm, tau
        self.restart_magnitudes, self.ranks = restart_magnitudes, ranks
        self.preserves_function = fold_norm and not restart_magnitudes and tau is None

    def rounds(self, total_steps: int) -> Rounds:
        rounds = super().rounds(total_steps)
        tasks = len(self.steps_per_task or self._steps_of_data or ())
        if self.ranks is not None and len(self.ranks) != tasks:
            raise UserError(
                f"ranks={self.ranks} has {len(self.ranks)} ranks, and there are {tasks} tasks; "
                f"give one for each."
            )
        return rounds

    def prepare(self, model: nn.Module) -> None:
        if not any(isinstance(wrapper, DecoupledLoRA) for wrapper in wrappers(model)):
            present = dict.fromkeys(type(wrapper).__name__ for wrapper in wrappers(model))
            raise UserError(
                f"SDLoRA needs the adapter DecoupledLoRA, and this model has {', '.join(present)}; "
                f"set parameterization: [DecoupledLoRA]."
            )

    def enter(self, number: int) -> None:
        super().enter(number)
        begins = number > 0
        if not begins and any(_is_trained(wrapper) for wrapper in self._wrappers()):
            # The run goes on from an adapter, whose last pair is that of an earlier task.
            self.leave(number)
            begins = True
        if begins:
            self._add_magnitudes()
        for key, axis in self._pairs():
            size = len(axis) if self.ranks is None else self.ranks[number]
            if begins or size != len(axis):
                axis.resize([], size, generator(self.seed, key, number), self.run.optimizers)

    def leave(self, number: int) -> None:
        for wrapper in self._wrappers():
            wrapper.keep_direction(self.norm, self.fold_norm, self.tau)
            wrapper.renew()

    def rewritten(self) -> list[Parameterization]:
        return [*self._wrappers()]

    def refuses_allocator(self, allocator: Participant) -> str:
        return hangs_on_units(allocator)

    def describe_border(self, number: int) -> dict[str, Any]:
        kept = [wrapper.directions().shape[1] for wrapper in self._wrappers()]
        stored = [wrapper.A_past.numel() + wrapper.B_past.numel() for wrapper in self._wrappers()]
        return {"directions": sum(kept), "stored": sum(stored)}

    def trained_numbers(self, number: int) -> int:
        numbers = self.run.trained()
        if self.ranks is not None:
            for _, axis in self._pairs():
                per_unit = sum(slot.tensor.numel() for slot in axis.slots()) // max(1, len(axis))
                numbers += per_unit * (self.ranks[number] - len(axis))
        tied = {id(wrapper.magnitudes) for wrapper in self._wrappers()}
        return numbers + number * len(tied)

    def _add_magnitudes(self) -> None:
        """Add the magnitude of a task. Tied layers have one tensor, which grows once."""
        for wrapper in self._wrappers():
            tasks = len(wrapper.mix)
            resize_stack(wrapper, "tasks", tasks + 1)
            start = 0 if self.restart_magnitudes else tasks
            wrapper.magnitudes.data[start:] = wrapper.magnitude

    def _wrappers(self) -> list[DecoupledLoRA]:
        all_wrappers = wrappers(self.run.model)
        return [wrapper for wrapper in all_wrappers if isinstance(wrapper, DecoupledLoRA)]

    def _pairs(self) -> Iterator[tuple[str, RankAxis]]:
        """Yield the axes of the pairs that train, by key."""
        for key, axis in rank_axes(self.run.model).items():
            if isinstance(axis.members[0][0], DecoupledLoRA):
                yield key, axis


def _is_trained(wrapper: DecoupledLoRA) -> bool:
    """Return whether the pair of a wrapper changes anything."""
    closing = wrapper.axis_tensors("rank")[-1][0]
    return bool(getattr(wrapper, closing).any())
