"""Events of a `transformers.Trainer`, which an allocator takes as it is: `callbacks=[AdaLoRA()]`.

The Trainer calls its callbacks by name and asks for no class. So transformers is not imported here.
"""

from typing import TYPE_CHECKING, Any, cast

from adaptrank.allocation.shells.trainer_run import TrainerRun, restore_clipping

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from adaptrank.allocation.participant import Participant


class TrainerHooks:
    """Calls a `TrainerRun` at the Trainer's events. Of several callbacks, the first one leads.

    Lightning knows none of these names but `on_train_end`.
    """

    _trainer_run: TrainerRun | None = None

    def _participant(self) -> "Participant | None":
        """Return the allocator among the Trainer's callbacks that this is, if it is one."""
        return cast("Participant", self)

    def _join(self, model: Any, state: object) -> TrainerRun:
        run = TrainerRun.joined(model, state)
        run.add(self, self._participant())
        self._trainer_run = run
        return run

    @property
    def _led_run(self) -> TrainerRun | None:
        """The run, if this is the callback that acts for all of them."""
        run = self._trainer_run
        return run if run is not None and run.leads(self) else None

    def on_init_end(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Prepare the model for a checkpoint, which is loaded before training starts."""
        restore_clipping(args)
        self._join(kwargs["model"], state)

    def on_train_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Start the run, or go on from the checkpoint."""
        run = self._trainer_run
        if run is None:  # added after the Trainer was made
            run = self._join(kwargs["model"], state)
        run.begin(args, state, kwargs)
        participant = self._participant()
        if participant is not None:
            run.start(participant, args, kwargs)

    def on_step_begin(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Keep the Trainer from clipping before the allocators have seen the gradients."""
        if (run := self._led_run) is not None:
            run.postpone_clipping(args)

    def on_pre_optimizer_step(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Add penalties, update the scores, and clip; the gradients are complete and unscaled."""
        if (run := self._led_run) is not None:
            run.before_step(args, kwargs["model"])

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Finish the optimizer step, with an event if one is due."""
        if (run := self._led_run) is not None:
            run.step()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Note how many steps in a row had gradients that were not finite."""
        if (run := self._led_run) is not None:
            run.read_bad_steps()

    def on_save(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Complete the checkpoint of a model that is no transformers model."""
        if (run := self._led_run) is not None:
            run.write_state_file(args, state)

    def end_training(
        self,
        args: "TrainingArguments",
        state: "TrainerState",
        control: "TrainerControl",
        **kwargs: Any,
    ) -> None:
        """Finish the run."""
        if (run := self._led_run) is not None:
            run.end(args, state, kwargs["model"])

    # ---- events at which there is nothing to do

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_predict(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def on_push_begin(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""


class AdapterCallback(TrainerHooks):
    """The callback of a `transformers.Trainer` whose adapters keep their ranks.

    Checkpoints hold the adapter only, and the penalties of methods are added to the gradients. An
    allocator in the callbacks does the same, so that this one is not needed beside it.
    """

    def _participant(self) -> None:
        return None

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Finish the run."""
        self.end_training(*args, **kwargs)
