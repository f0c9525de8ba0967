"""A run as it stands just before its first step, on a model without weights.

The run is Lightning's own: the Trainer is built, the data are read, the model is adapted on the
meta device, and the optimizer is made. So whatever `fit` refuses until then is refused here, with
the same sentence.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
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
from adaptrank.layers import LINEAR
from adaptrank.modules import AdaptedModule, check_devices
from adaptrank.strategies import TrainingStrategy
from adaptrank.training.distributed import check_launcher, keep_apart

MOST_ROWS = 1024
"""Rows of a split that are tokenized for a plan. The others stand for rows like these."""


class Planned(AdaptrankCLI):
    """Parses and builds the configuration of `fit`, and runs nothing."""

    probe: Trainer
    """Trainer of one process that prepares the run, in place of one that starts others."""
    unloaded: "Unloaded"
    """The model without weights, once the run is prepared."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer as `fit` does, without the files of a run."""
        configured = self._configured_callbacks()
        callbacks = participants(*self._chosen(), configured)
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
        module = check_module(self.model)
        self._check_strategy(module)
        # Compiled blocks would be compiled for tensors without numbers.
        module.compile_options = None

        def check_and_look(trainer: Trainer, module: AdaptedModule) -> None:
            configured = self._configured_callbacks()
            self.metric_names.check(module, configured, module.metrics_logged())
            look(trainer, module)

        stop = _Stop(check_and_look)
        callbacks: list[Callback] = self.probe.callbacks  # type: ignore[attr-defined]
        callbacks.insert(0, stop)
        # A model without weights moves nowhere, before training and after it.
        self.probe.strategy.model_to_device = _noop  # type: ignore[method-assign]
        self.probe.strategy.teardown = _noop  # type: ignore[method-assign]
        try:
            with without_weights() as unloaded, few_rows(self.datamodule):
                self.unloaded = unloaded
                self.probe.fit(module, datamodule=self.datamodule)
        except _Ready:
            return
        raise AssertionError("the run was not stopped before its first step")

    def _check_strategy(self, module: AdaptedModule) -> None:
        """Refuse a strategy that the model does not go with, or beside which no ranks move.

        The trainer of one process has another strategy, which says nothing about it.
        """
        if self.probe is self.trainer:
            return
        check_devices(module.loading, self.trainer, fits=True)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Participant | TrainingStrategy) for callback in callbacks):
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
def without_weights() -> Iterator["Unloaded"]:
    """Within the block, let modules load models on the meta device, from configurations alone."""
    unloaded = Unloaded()
    load_model = backbones.load_model
    backbones.load_model = unloaded.load_model
    try:
        yield unloaded
    finally:
        backbones.load_model = load_model


class Unloaded:
    """Models without memory for their weights.

    Attributes:
        saved: bytes by which quantized weights are smaller than weights of the frozen dtype.
    """

    def __init__(self) -> None:
        self.saved = 0

    def load_model(
        self,
        source: backbones.Source,
        auto_class: Any,
        dtype: torch.dtype,
        options: backbones.LoadingOptions | None = None,
        kept: Callable[[Any], tuple[Collection[str], Collection[str]]] | None = None,
        device: torch.device | None = None,
        fresh_head: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Build a model from its configuration.

        The arguments are those of `backbones.load_model`. A quantization is counted in `saved`, and
        the weights have the frozen dtype.

        Raises:
            UserError: if a quantization does not go with the model.
        """
        kwargs.pop("ignore_mismatched_sizes", None)
        config = backbones.load_config(source, options, **kwargs)
        model = backbones.model_on_meta(source, auto_class, config, options).to(dtype)
        if options is not None and options.quantization is not None:
            backbones.check_unquantized(source, config)
            heads, trained = ((), ()) if kept is None else kept(model)
            skipped = backbones.layers_to_keep(model, options.quantization, heads, trained)
            self.saved += _saved_bytes(model, options.quantization, skipped)
        return model


def _saved_bytes(
    model: torch.nn.Module, quantization: backbones.Quantization, skipped: Collection[str]
) -> int:
    """Return how much smaller the weights of a model are once its layers are quantized."""
    saved = 0.0
    for path, module in model.named_modules():
        is_kept = path in skipped or not isinstance(module, LINEAR)
        if not is_kept and quantization.is_quantizable(module):
            weight: torch.Tensor = module.weight
            saved += weight.numel() * (weight.element_size() - quantization.bytes_per_weight)
    return round(saved)


@contextmanager
def few_rows(data: Any) -> Iterator[None]:
    """Within the block, tokenize no more than the first rows of a split.

    Further rows are taken to be like these, so that the number of steps is right. A row may give
    several examples, or none.
    """
    if not isinstance(data, TaskData):
        yield
        return
    encode = data.encode

    def encode_first(rows: list[Any], split: Any) -> list[Any]:
        first = rows[:MOST_ROWS]
        encoded = encode(first, split)
        if len(first) == len(rows):
            return encoded
        count = round(len(encoded) * len(rows) / len(first))
        return list(itertools.islice(itertools.cycle(encoded), count))

    data.encode = encode_first  # type: ignore[method-assign]
    try:
        yield
    finally:
        del data.encode
