"""One `transformers.Trainer` and the allocators in it: gradients, clipping, checkpoints."""

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaptrank._collectives import several
from adaptrank._errors import UserError
from adaptrank._files import atomic_file
from adaptrank.allocation import checks
from adaptrank.allocation.shells.trainer_data import TrainerBatches, loss_of
from adaptrank.axes import misfit_of_state
from adaptrank.checkpoints import follow_trainer_files, load_best_adapter, write_trainer_files
from adaptrank.parameterizations import COUNTS_AS_ADAPTED, TRAINER_WRITER, wrapped_layers
from adaptrank.training.clipping import warn_of_clipping
from adaptrank.training.penalties import add_penalty_gradients

if TYPE_CHECKING:
    from transformers import TrainerState, TrainingArguments

    from adaptrank.allocation.participant import Participant

log = logging.getLogger("adaptrank")

STATE = "allocator.pt"
"""File of the allocator in checkpoints of earlier versions, and of models that are no transformers
models."""

POSTPONED = "_adaptrank_max_grad_norm"
"""Attribute of training arguments: the norm to clip to, while clipping is postponed."""


class TrainerRun:
    """Joint run of all allocators of one Trainer.

    The Trainer clips gradients before it calls anyone. So its own clipping is switched off for the
    length of a step, and done here: after the penalties were added and the allocators have seen the
    complete, unscaled gradients, and before the optimizer's step.

    The model carries this object, because `save_pretrained` and `load_state_dict` have to find it.
    A copy of the model takes part in no run.
    """

    def __init__(self) -> None:
        self.hooks: list[object] = []
        """Everything in the Trainer's callbacks that belongs to this run, allocators included."""
        self.members: list[Participant] = []
        """The allocators and rank initializers."""
        self._init_state: object = None
        self._state: TrainerState | None = None
        self._started: list[Participant] = []
        self._loaded: Mapping[str, Any] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: Any = None
        self._save_only_model = False
        self._begun_on: dict[int, nn.Module] = {}
        """Allocator -> the model that it has begun to train."""

    def __reduce__(self) -> tuple[type["TrainerRun"], tuple[()]]:
        """Copy and pickle as a run without members."""
        return TrainerRun, ()

    # ---- who takes part

    @classmethod
    def joined(cls, model: nn.Module, state: object) -> "TrainerRun":
        """Return the run of the Trainer with this state, which the model carries.

        Args:
            model: the Trainer's model.
            state: what the Trainer hands to all of its callbacks at this event.
        """
        run = model.__dict__.get(TRAINER_WRITER)
        if isinstance(run, cls) and run._knows(state):
            return run
        run = cls()
        run._init_state = state
        run.attach(model)
        return run

    def _knows(self, state: object) -> bool:
        return state is self._init_state or state is self._state

    def attach(self, model: nn.Module) -> None:
        """Let a model carry the run, and load the checkpoints of the run."""
        if TRAINER_WRITER not in model.__dict__:
            follow_trainer_files(model)
        model.__dict__[TRAINER_WRITER] = self
        # `allow_quantized` sets this for the Trainer's constructor.
        if not getattr(model, "peft_config", None):
            model.__dict__.pop(COUNTS_AS_ADAPTED, None)

    def add(self, hook: object, member: "Participant | None") -> None:
        """Add one of the Trainer's callbacks, once.

        Raises:
            UserError: if it cannot share a run with the others.
        """
        if hook in self.hooks:
            return
        for other in self.members:
            if member is not None:
                checks.check_beside(member, other)
                checks.check_beside(other, member)
        self.hooks.append(hook)
        if member is not None:
            self.members.append(member)

    def leads(self, hook: object) -> bool:
        """Tell whether the callback is the one that acts for all."""
        return bool(self.hooks) and self.hooks[0] is hook

    # ---- the start

    def begin(self, args: "TrainingArguments", state: "TrainerState", kwargs: Any) -> None:
        """Prepare a training that starts or resumes, once however many callbacks call this.

        Raises:
            UserError: for what the Trainer does and adapters cannot follow.
        """
        if self._state is state:
            return
        restore_clipping(args)
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.attach(model)
        self._check_trainer(args, model)
        self._state, self._started = state, []
        self._save_only_model = bool(args.save_only_model)
        # accelerate's wrapper holds the optimizer, and in float16 the scaler.
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        self._scaler = getattr(optimizer, "scaler", None)
        warn_of_clipping(self._optimizer, "max_grad_norm", args.max_grad_norm)
        _let_gradients_pass(args, model)
        if not state.global_step:
            self._loaded = None
            _forget_misfits(self._optimizer)
        elif self.members and not self._has_state_of(state.global_step):
            self._loaded = _read_state_file(args, state)

    def _check_trainer(self, args: "TrainingArguments", model: nn.Module) -> None:
        if not wrapped_layers(model):
            raise UserError(
                f"This {type(model).__name__} holds no adapter; call adaptrank.adapt(model, ...) "
                f"before you give it to the Trainer."
            )
        names = " and ".join(member.label for member in self.members)
        if not names:
            return
        if several() or args.n_gpu > 1:
            raise UserError(
                f"{names}: ranks move under several processes or devices with Lightning only; run "
                f"the Trainer in one process, with CUDA_VISIBLE_DEVICES naming one device."
            )
        masking = [member.label for member in self.members if member.masks_base]
        if masking and args.load_best_model_at_end:
            raise UserError(
                f"{masking[0]} masks parts of the base for good, so the weights of an earlier step "
                f"would not be those of its checkpoint; use load_best_model_at_end=False, and load "
                f"the best checkpoint by adaptrank.load_adapter(base, checkpoint)."
            )
        for option in ("deepspeed", "fsdp"):
            if getattr(args, option, None):
                raise UserError(
                    f"{names}: the Trainer's {option} keeps parameters in buffers of its own, "
                    f"which cannot follow a rank; leave {option} out."
                )
        if getattr(args, "sync_ref_model", False):
            raise UserError(
                "sync_ref_model=True moves a reference model towards the trained one, and the "
                "reference of an adapter is its frozen base; use sync_ref_model=False."
            )

    def start(self, member: "Participant", args: "TrainingArguments", kwargs: Any) -> None:
        """Start an allocator, or let it go on from the checkpoint, once.

        Raises:
            UserError: for what the allocator refuses.
        """
        if member in self._started:
            return
        self._started.append(member)
        # Ranks to start from come first, whatever the order of the callbacks.
        if not member.chooses_ranks:
            for other in self.members:
                if other.chooses_ranks:
                    self.start(other, args, kwargs)
        model, state = kwargs["model"], self._state
        assert state is not None
        self._end_broken_training(member, args)
        self._check_again(member, model)
        if state.global_step:
            member.load_state_dict(self._stored_state(member, state.global_step))
        member.start(
            model,
            self._optimizer or [],
            state.max_steps,
            batches=TrainerBatches(kwargs["train_dataloader"], args.device),
            loss=loss_of(model, member.label),
        )

    def _end_broken_training(self, member: "Participant", args: "TrainingArguments") -> None:
        """Remove the hooks of a training that an error or an interrupt has ended."""
        engine = member.engine
        if not engine.running:
            return
        moved = any(event.get("step") for event in member.events)
        if args.auto_find_batch_size and moved:
            raise UserError(
                f"auto_find_batch_size starts training again after {member.label} has moved ranks; "
                f"set per_device_train_batch_size yourself, and auto_find_batch_size=False."
            )
        engine.running = False
        engine.finish()

    def _check_again(self, member: "Participant", model: nn.Module) -> None:
        """Refuse a second training of what the first one has changed for good.

        Raises:
            UserError: for masks that stay.
        """
        again = self._begun_on.get(id(member)) is model and member.engine.progress.steps_done > 0
        self._begun_on[id(member)] = model
        if again and member.masks_base:
            raise UserError(
                f"The masks of {member.label} stay on this model after an earlier train(); build "
                f"the model and the Trainer anew to train or to resume."
            )

    # ---- each step

    def postpone_clipping(self, args: "TrainingArguments") -> None:
        """Switch the Trainer's clipping off for one step. It unscales and measures as ever."""
        if POSTPONED not in args.__dict__:
            args.__dict__[POSTPONED] = args.max_grad_norm
            args.max_grad_norm = math.inf

    def before_step(self, args: "TrainingArguments", model: nn.Module) -> None:
        """Add penalties, let the allocators look at the gradients, and clip them."""
        restore_clipping(args)
        add_penalty_gradients(model)
        scale = 1.0 if self._scaler is None else self._scaler.get_scale()
        for member in self._running():
            member.engine.before_step(scale)
        if args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)

    def step(self) -> None:
        """Finish the optimizer step."""
        for member in self._running():
            member.engine.step()

    def read_bad_steps(self) -> None:
        """Note how many steps in a row had gradients that were not finite."""
        for member in self._running():
            member.engine.read_bad_steps()

    def _running(self) -> Iterator["Participant"]:
        for member in self._started:
            if member.engine.running:
                yield member

    # ---- checkpoints

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write the model's part of a checkpoint; `save_pretrained` calls this."""
        write_trainer_files(model, folder, self._run_state())

    def _run_state(self) -> dict[str, Any]:
        """Return the state of the allocators, or {} where nothing will go on from it."""
        if self._state is None or self._save_only_model:
            return {}
        allocators = {member.label: member.state_dict() for member in self._running()}
        return {"step": self._state.global_step, "allocators": allocators}

    def take_run_state(self, state: Mapping[str, Any]) -> None:
        """Remember the state of a checkpoint that the model is loaded from."""
        self._loaded = state

    def write_state_file(self, args: "TrainingArguments", state: "TrainerState") -> None:
        """Write the allocators' state beside the weights of a model that is no transformers model.

        The Trainer saves such a model whole, and `write` is not called.
        """
        folder = _checkpoint_folder(args, state)
        if not self._save_only_model and not (folder / "adapter_model.safetensors").is_file():
            with atomic_file(folder / STATE) as partial:
                torch.save(self._run_state(), partial)

    def _has_state_of(self, step: int) -> bool:
        return self._loaded is not None and self._loaded.get("step") == step

    def _stored_state(self, member: "Participant", step: int) -> dict[str, Any]:
        stored = self._loaded or {}
        allocators = stored.get("allocators", {})
        if "tracked" in stored:
            # Earlier versions stored the state of the one allocator as it is.
            allocators = {member.label: stored}
        if member.label not in allocators:
            there = ", ".join(allocators) or "none"
            raise UserError(
                f"The checkpoint of step {step} holds no state of {member.label}, so it cannot go "
                f"on; allocators in the checkpoint: {there}. Resume with the callbacks of the run "
                f"that saved it, or start a new run."
            )
        state: dict[str, Any] = allocators[member.label]
        return state

    # ---- the end

    def end(self, args: "TrainingArguments", state: "TrainerState", model: nn.Module) -> None:
        """Complete the best weights if the Trainer has loaded them, and finish the allocators."""
        restore_clipping(args)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._complete_best(model, Path(state.best_model_checkpoint), state.best_global_step)
        for member in list(self._started):
            member.finish()

    def _complete_best(self, model: nn.Module, folder: Path, step: int | None) -> None:
        """Put the gates of the best checkpoint into its weights, and say what its ranks miss."""
        load_best_adapter(model, folder)
        for member in self._started:
            phases = member.engine.progress.phases
            if member.moves and phases is not None and step is not None and step < phases.end:
                log.warning(
                    "%s: the best checkpoint is of step %d, before the last event at step %d, and "
                    "has the ranks of that step. To choose among the final ranks, use "
                    "eval_delay=%d.",
                    member.label,
                    step,
                    phases.end,
                    phases.end,
                )


def restore_clipping(args: "TrainingArguments") -> None:
    """Give training arguments the norm back that `postpone_clipping` has taken out."""
    if POSTPONED in args.__dict__:
        args.max_grad_norm = args.__dict__.pop(POSTPONED)


def _let_gradients_pass(args: "TrainingArguments", model: nn.Module) -> None:
    """Let reentrant gradient checkpointing reach adapters behind frozen embeddings."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        options = getattr(args, f"{name}_kwargs", None) or {}
        if getattr(args, name, False) and options.get("use_reentrant"):
            enable: Any = getattr(model, "enable_input_require_grads", None)
            if enable is not None:
                enable()
            return


def _forget_misfits(optimizer: torch.optim.Optimizer) -> None:
    """Drop the moments of tensors that got another size after the last training.

    The best checkpoint of a training may have other ranks than its end.
    """
    misfits = [
        parameter
        for parameter in optimizer.state
        if misfit_of_state(optimizer, [parameter], known_roles_only=True)
    ]
    for parameter in misfits:
        del optimizer.state[parameter]
    if misfits:
        log.warning(
            "The optimizer starts anew for %d tensors, which have other ranks than at the end of "
            "the last training.",
            len(misfits),
        )


def _checkpoint_folder(args: "TrainingArguments", state: "TrainerState") -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _read_state_file(args: "TrainingArguments", state: "TrainerState") -> Mapping[str, Any] | None:
    """Return the contents of an `allocator.pt`, or None if there is none."""
    file = _checkpoint_folder(args, state) / STATE
    if not file.is_file():
        return None
    stored: Mapping[str, Any] = torch.load(file, weights_only=True)
    return stored
