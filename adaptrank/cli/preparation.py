"""A run as it stands just before its first step, on a model without weights.

The run is Lightning's own: the Trainer is built, the data are read, the model is adapted on the
meta device, and the optimizer is made. So whatever `fit` refuses until then is refused here, with
the same sentence.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from adaptrank import backbones
from adaptrank.allocation import Participant
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.loggers import loggers_in
from adaptrank.cli.participants import participants, which_weights
from adaptrank.cli.quiet import quiet
from adaptrank.cli.train import AdaptrankCLI
from adaptrank.data import TaskData
from adaptrank.injection import by_layer
from adaptrank.modules import AdaptedModule
from adaptrank.training.distributed import check_launcher, keep_apart

MOST_ROWS = 1024
"""Rows of a split that are tokenized for a plan. The others stand for rows like these."""


class Planned(AdaptrankCLI):
    """Parses and builds the configuration of `fit`, and runs nothing."""

    probe: Trainer
    """Trainer of one process that prepares the run, in place of one that starts others."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer as `fit` does, without the files of a run."""
        configured = self._configured_callbacks()
        chosen = (self.configured("allocator"), self.configured("initial_ranks"))
        callbacks = participants(*chosen, configured)
        self.metric_names.adopt(self.model, configured)
        which_weights(self._get(self.config, "save"), configured)
        if not any(isinstance(callback, Checkpoint) for callback in configured):
            kwargs["enable_checkpointing"] = False
        kwargs["logger"] = loggers_in(None, self.configured("trainer.logger"), self.verb) or False
        kwargs["enable_progress_bar"] = False
        config = {**(self.configured("trainer") or {}), **kwargs}
        trainer = self._instantiate_trainer({**config, "callbacks": configured}, callbacks)
        check_launcher(trainer)
        self.probe = trainer
        if trainer.strategy.launcher is not None:
            one = {"devices": 1, "num_nodes": 1, "strategy": "auto", "callbacks": configured}
            self.probe = self._instantiate_trainer({**config, **one}, callbacks)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """No-op: the verb's work is the plan."""

    def prepare(self, look: Callable[[Trainer, AdaptedModule], None]) -> None:
        """Prepare the run, and look at it before its first step.

        Args:
            look: called with the Trainer and the module, whose model is on the meta device.

        Raises:
            UserError: if `fit` would refuse the configuration.
        """
        self._check_schedules()
        self._check_strategy()
        module = check_module(self.model)
        # What a validation can log, as far as the task says.
        self.metric_names.check(module, self._configured_callbacks(), module.metrics_shown)
        # Compiled blocks would be compiled for tensors without numbers.
        module.compile_options = None
        stop = _Stop(look)
        callbacks: list[Callback] = self.probe.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, stop)
        # A model without weights moves nowhere, before training and after it.
        self.probe.strategy.model_to_device = _noop  # type: ignore[method-assign]
        self.probe.strategy.teardown = _noop  # type: ignore[method-assign]
        try:
            with without_weights(), without_schedule(), few_rows(self.datamodule):
                self.probe.fit(module, datamodule=self.datamodule)
        except _Ready:
            return
        raise AssertionError("the run was not stopped before its first step")

    def _check_strategy(self) -> None:
        """Refuse a strategy beside which no allocator moves ranks.

        The trainer of one process has another strategy, which says nothing about it.
        """
        if self.probe is self.trainer:
            return
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Participant) for callback in callbacks):
            keep_apart(self.trainer)


def _noop() -> None:
    """Leave the model where it is."""


class _Ready(Exception):  # noqa: N818
    """The run is ready for its first step."""


class _Stop(Callback):
    """Looks at a run that is ready for its first step, and ends it there.

    Args:
        look: called with the Trainer and the module.
    """

    def __init__(self, look: Callable[[Trainer, AdaptedModule], None]) -> None:
        self.look = look

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, and end the run."""
        assert isinstance(pl_module, AdaptedModule)
        self.look(trainer, pl_module)
        raise _Ready


def build(args: Sequence[str]) -> Planned:
    """Return the configuration of `fit`, parsed and built.

    Args:
        args: the command line of `fit`, without the verb.
    """
    # Once more, now that the libraries that print are imported.
    with quiet():
        return Planned("fit", args)


def check_module(module: Any) -> AdaptedModule:
    """Return a module that `plan` can describe.

    Raises:
        ConfigError: if it is none of this library's.
    """
    if not isinstance(module, AdaptedModule):
        raise ConfigError(
            f"plan knows the library's own modules, such as CausalLM, "
            f"and not {type(module).__name__}."
        )
    return module


def count_adapters(args: Sequence[str]) -> int:
    """Return the parameters that train in the adapters of a configuration, without its data.

    Args:
        args: the command line of `fit`, without the verb.
    Raises:
        UserError: if the model cannot be adapted in this way.
    """
    with quiet():
        cli = _Counted("fit", args)
        module = check_module(cli.model)
        if getattr(module, "num_labels", 0) is None:
            # The head is no part of the count.
            module.__dict__["num_labels"] = getattr(cli.datamodule, "num_classes", None) or 2
        with without_weights():
            module.configure_model()
    return sum(by_layer(module.model).values())


class _Counted(Planned):
    """Parses and builds the model, and no Trainer."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


# ---- models without weights, data with few tokens


@contextmanager
def without_weights() -> Iterator[None]:
    """Within the block, let modules load models on the meta device, from configurations alone."""
    load_model = backbones.load_model
    backbones.load_model = _model_on_meta
    try:
        yield
    finally:
        backbones.load_model = load_model


def _model_on_meta(
    source: backbones.Source,
    auto_class: Any,
    dtype: torch.dtype,
    options: Any = None,
    **kwargs: Any,
) -> Any:
    """Build the model of a configuration without memory for its weights.

    The arguments are those of `backbones.load_model`.
    """
    from transformers import AutoConfig

    labels = {"num_labels": kwargs["num_labels"]} if kwargs.get("num_labels") else {}
    trusts = bool(getattr(options, "trust_remote_code", False))
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=trusts, **labels)
    attention = getattr(options, "attention", None)
    chosen = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        model = auto_class.from_config(config, trust_remote_code=trusts, **chosen)
    return model.to(dtype)


@contextmanager
def without_schedule() -> Iterator[None]:
    """Within the block, let optimizers have a constant learning rate.

    The import of transformers' schedules brings PEFT and bitsandbytes along where they are
    installed, which takes seconds. The warm-up is checked all the same.
    """
    import transformers

    def constant(
        name: str, optimizer: torch.optim.Optimizer, warmup: int, total: int
    ) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    names = vars(transformers)
    before = names.get("get_scheduler")
    names["get_scheduler"] = constant
    try:
        yield
    finally:
        del names["get_scheduler"]
        if before is not None:
            names["get_scheduler"] = before


@contextmanager
def few_rows(data: Any) -> Iterator[None]:
    """Within the block, tokenize no more than the first rows of a split.

    Further rows are taken to be like these, so that the number of steps is right.
    """
    if not isinstance(data, TaskData):
        yield
        return
    encode = data.encode

    def encode_first(rows: list[Any], split: Any) -> list[Any]:
        encoded = encode(rows[:MOST_ROWS], split)
        return list(itertools.islice(itertools.cycle(encoded), len(rows)))

    data.encode = encode_first  # type: ignore[method-assign]
    try:
        yield
    finally:
        del data.encode
