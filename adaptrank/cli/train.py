"""`fit`, `validate`, `test`, `predict`: LightningCLI with allocators and a folder for each run."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

# Their classes are known by name once they are imported.
import adaptrank.data
import adaptrank.modules
import adaptrank.strategies  # noqa: F401
from adaptrank._files import write_text
from adaptrank.allocation import Participant
from adaptrank.artifacts.checkpoint_files import ensure_checkpoint_files
from adaptrank.artifacts.run import JsonlLogger, RunFiles, discard_unbegun, new_run_folder
from adaptrank.cli import errors
from adaptrank.cli.adapter_path import check_adapter_path
from adaptrank.cli.callbacks import Begins, DataReady, Interrupt, SaveConfig
from adaptrank.cli.checkpoint_path import check_checkpoint_path, find_checkpoint
from adaptrank.cli.early_check import PREFIX
from adaptrank.cli.ending import explain, finish, interrupted, leave, lost
from adaptrank.cli.loggers import keep_checkpoints_in, loggers_in, make_logger
from adaptrank.cli.mistakes import ParsingError
from adaptrank.cli.monitors import MetricNames
from adaptrank.cli.output import (
    class_names,
    metric_names,
    note,
    predictions,
    run_name,
    say,
    table,
)
from adaptrank.cli.parser import Parser
from adaptrank.cli.participants import checkpoints, participants, which_weights
from adaptrank.cli.progress import progress
from adaptrank.cli.quiet import quiet
from adaptrank.cli.scored import Scored, rows_scored, scored
from adaptrank.cli.unusual_rates import unusual_rates
from adaptrank.modules import AdaptedModule, check_devices
from adaptrank.strategies import TrainingStrategy
from adaptrank.training.distributed import check_launcher
from adaptrank.training.finite import FiniteWeights
from adaptrank.training.peers import PeerWatch

T = TypeVar("T")

log = logging.getLogger("adaptrank")

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    # The library's loaders share the data out by themselves, and resume in mid-epoch.
    "use_distributed_sampler": False,
}


class AdaptrankCLI(LightningCLI):
    """LightningCLI with the keys of allocators and training strategies, and a run folder.

    Args:
        verb: fit, validate, test or predict.
        args: the command line after the verb.
    """

    run_folder: Path | None = None
    began = False
    trainer: Trainer
    before: dict[str, float]
    evaluates = True

    def __init__(self, verb: str, args: Sequence[str]) -> None:
        self.verb, self.args = verb, list(args)
        self.metric_names = MetricNames()
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            # The module makes its optimizer, from its own argument `optimizer`.
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=[verb, *args],
            parser_kwargs={"default_env": True, "env_prefix": PREFIX},
        )

    # ---- parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the verb of this command alone. The parser of each takes time to build."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of the library."""
        moves = "Moves ranks while training. See `python -m adaptrank methods`."
        chooses = "Chooses the ranks to start from, beside an allocator that moves them."
        parser.add_subclass_arguments(Participant, "allocator", required=False, help=moves)
        parser.add_subclass_arguments(Participant, "initial_ranks", required=False, help=chooses)
        divides = "Divides training into rounds. See `python -m adaptrank methods`."
        parser.add_subclass_arguments(
            TrainingStrategy, "training_strategy", required=False, help=divides
        )
        runs = "Folder that holds the run folders."
        parser.add_argument("--runs", type=str, default="runs", help=runs)
        accept = "Whether to go on from a ckpt_path that belongs to a run with other settings."
        parser.add_argument("--accept_changes", type=bool, default=False, help=accept)
        evaluate = "Whether `fit` evaluates before and after."
        parser.add_argument("--evaluate", type=bool, default=True, help=evaluate)
        kinds = Literal["best", "last"] | None
        save = "Which weights `fit` saves: those of the best checkpoint, or of the last step."
        parser.add_argument("--save", type=kinds, default=None, help=save)

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # The library's checkpoints need no pickle.
        parser.set_defaults({"weights_only": True})
        if subcommand == "predict":
            out = "File for the predictions."
            parser.add_argument("--out", type=str | None, default=None, help=out)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line.

        Raises:
            ConfigError: at the first mistake, with its file and line, or its option.
        """
        try:
            self.config = parser.parse_args([self.verb, *self.args])
        except ParsingError as mistake:
            raise mistake.at_its_place(self.args) from mistake

    def _parse_ckpt_path(self) -> None:
        """Find the checkpoint's file, and check it before minutes of building."""
        options = self.config[self.verb]
        resumes = self.verb == "fit"
        path = find_checkpoint(options, self._config_file(), resumes)
        check_checkpoint_path(path, options.get("weights_only") is not False, resumes)
        options["ckpt_path"] = path

    def _config_file(self) -> str | None:
        """Return the last configuration file of the command line, or None."""
        # Lightning checks the checkpoint before it knows the subcommand, so `_get` fails there.
        configs = self.config[self.verb].get("config") or []
        return str(configs[-1]) if configs else None

    # ---- building

    def configured(self, key: str) -> Any:
        """Return the value of a key, or the object that was built from it."""
        return self._get(self.config_init, key)

    def before_instantiate_classes(self) -> None:
        """Look for the adapter to start from, before minutes of building."""
        adapter = self._get(self.config, "model.init_args.adapter")
        check_adapter_path(adapter, self._get(self.config, "model.class_path"))

    def instantiate_classes(self) -> None:
        """Build the model, the data and the trainer."""
        # What is built later, such as an optimizer, goes through the same check.
        self._parser(self.subcommand).add_instantiator(construct, object, subclasses=True)
        with errors.constructing("The configuration"):
            super().instantiate_classes()
        if self._get(self.config, "accept_changes"):
            self.model.accept_changes = True

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the trainer, with the callbacks and the loggers of a run."""
        configured = self._configured_callbacks()
        callbacks = participants(*self._chosen(), configured)
        if self.verb == "fit":
            self.metric_names.adopt(self.model, configured)
            weights = which_weights(self._get(self.config, "save"), configured)
            folder = self.run_folder = self._new_folder()
            loggers = loggers_in(folder, self.configured("trainer.logger"), self.verb)
            disabled = self.configured("trainer.enable_checkpointing") is False
            callbacks += [FiniteWeights(), PeerWatch(), RunFiles(folder, weights)]
            callbacks += [Interrupt(folder), Begins(self._begin)]
            callbacks += checkpoints(folder, disabled, configured)
            if self.configured("trainer.default_root_dir") is None:
                kwargs["default_root_dir"] = str(folder)
            keep_checkpoints_in(folder, configured)
            # The first logger is the one that a user's code finds as `self.logger`.
            kwargs["logger"] = [*loggers, JsonlLogger(folder)]
        else:
            loggers = loggers_in(None, self.configured("trainer.logger"), self.verb)
            kwargs["logger"] = loggers or False
            if self.verb != "predict":
                callbacks.append(DataReady(self._say_what_is_scored))
        has_bar = any(isinstance(callback, ProgressBar) for callback in configured)
        if self.configured("trainer.enable_progress_bar") is not False and not has_bar:
            callbacks.append(progress())
        config = {**(self.configured("trainer") or {}), **kwargs}
        trainer = self._instantiate_trainer(config, callbacks)
        # In front of the callbacks that read metrics.
        if self.verb == "fit":
            trainer.callbacks = [self.metric_names, *trainer.callbacks]  # type: ignore[attr-defined]
        check_launcher(trainer)
        ensure_checkpoint_files(trainer)
        return trainer

    def _chosen(self) -> tuple[Any, Any, Any]:
        """Return the allocator, the rank initializer and the strategy of the typed keys."""
        keys = ("allocator", "initial_ranks", "training_strategy")
        allocator, initial, strategy = (self.configured(key) for key in keys)
        return allocator, initial, strategy

    def _configured_callbacks(self) -> list[Callback]:
        configured = self.configured("trainer.callbacks") or []
        return configured if isinstance(configured, list) else [configured]

    def _new_folder(self) -> Path:
        runs = Path(self._get(self.config, "runs")) / run_name(self._config_file())
        # Only the first process writes.
        if getattr(rank_zero_only, "rank", 0):
            return runs / "of the first process"
        return new_run_folder(runs)

    def _begin(self) -> None:
        if not self.began and isinstance(self.model, AdaptedModule):
            model = self.model.model
            head = self.model.studied_head_rate(model)
            for sentence in unusual_rates(model, self.trainer.optimizers, head):
                log.warning("%s", sentence)
        self.began = True

    # ---- the verbs

    def fit(self, **kwargs: Any) -> None:
        """Evaluate, train, evaluate again, and write the summary."""
        self.before = {}
        if isinstance(self.model, AdaptedModule):
            # Else the evaluation before training would load the model first.
            check_devices(self.model.loading, self.trainer, fits=True)
        # A schedule that cannot work is refused before minutes of evaluation.
        self._check_schedules()
        self._say_backbone()
        self.evaluates = bool(self._get(self.config, "evaluate"))
        if self.evaluates and (missing := self._missing_for_evaluation()):
            self.evaluates = False
            say(f"No evaluation before and after: {missing}.")
        if self.evaluates and not self._get(self.config, "ckpt_path"):
            self.before = self.evaluate()
            self.metric_names.check(self.model, self._callbacks(), self.before)
        self.trainer.fit(**kwargs)
        if not self.trainer.interrupted:
            finish(self)

    def _check_schedules(self) -> None:
        check_trainer = getattr(self.datamodule, "check_trainer", None)
        if check_trainer is not None:
            check_trainer(self.trainer)
        if self.trainer.max_steps <= 0:
            return
        for callback in self._callbacks():
            if not isinstance(callback, Participant | TrainingStrategy):
                continue
            try:
                callback.engine.check_steps(self.trainer.max_steps)
            except ValueError as error:
                steps = int(self.trainer.fast_dev_run)  # type: ignore[attr-defined]
                if not steps:
                    raise
                is_strategy = isinstance(callback, TrainingStrategy)
                kind, key = ("strategy", "training_strategy") if is_strategy else ("allocator",) * 2
                raise errors.ConfigError(
                    f"trainer.fast_dev_run makes {steps} step(s), in which "
                    f"{type(callback).__name__} would never act: leave the {kind} out, or "
                    f"add --{key} null."
                ) from error

    def _missing_for_evaluation(self) -> str | None:
        """Return what a user's own module or data lack for `Trainer.validate`."""
        if not is_overridden("validation_step", self.model):
            return f"{type(self.model).__name__} has no validation_step"
        if not is_overridden("val_dataloader", self.datamodule):
            return f"{type(self.datamodule).__name__} has no val_dataloader"
        return None

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        """Evaluate on the validation set."""
        self._say_backbone()
        self._report(self.trainer.validate(**kwargs, verbose=False), verbose)

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        """Evaluate on the test set."""
        self._say_backbone()
        self._report(self.trainer.test(**kwargs, verbose=False), verbose)

    def predict(self, **kwargs: Any) -> None:
        """Predict, and print or write one line of JSON for each example."""
        model = self._scored()
        if not model.is_trained:
            # Standard output holds the predictions alone.
            log.warning("%s", model.sentence)
        batches = self.trainer.predict(**kwargs) or []
        names = class_names(self.model, self.datamodule)
        lines = [json.dumps(line, ensure_ascii=False) for line in predictions(batches, names)]
        out = self._get(self.config, "out")
        if not self.trainer.is_global_zero:
            return
        if out is None:
            say("\n".join(lines))
        else:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(out), "".join(f"{line}\n" for line in lines))
            say(f"{len(lines)} predictions in {out}")

    def _report(self, results: Sequence[Any], verbose: bool) -> None:
        values = _merged(results)
        if verbose and self.trainer.is_global_zero:
            say(table(values, metric_names(self.model, values)))

    def evaluate(self) -> dict[str, float]:
        """Return the metrics on the validation set."""
        results = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return _merged(results)

    def _say_backbone(self) -> None:
        if isinstance(self.model, AdaptedModule):
            note(f"Backbone {self.model.source.describe()}")

    def _scored(self, rows: str = "") -> Scored:
        checkpoint = self._get(self.config, "ckpt_path")
        runs = self._get(self.config, "runs")
        return scored(self.model, checkpoint, self._config_file(), runs, rows)

    def _say_what_is_scored(self) -> None:
        say(self._scored(rows_scored(self.datamodule, self.verb)).sentence)

    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _merged(results: Sequence[Any]) -> dict[str, float]:
    """Return the metrics of all dataloaders in one mapping."""
    return {name: float(value) for result in results for name, value in result.items()}


def in_full(arg: str) -> str:
    """Return an argument as LightningCLI knows it."""
    if arg == "--help_all":
        return "--help"
    name, equals, value = arg.partition("=")
    return f"--model.adapter{equals}{value}" if name == "--adapter" else arg


def construct(cls: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Build a class that the configuration names. A ValueError of it is the user's mistake."""
    kind: Any = cls
    if isinstance(kind, type) and issubclass(kind, Logger):
        return cast(T, make_logger(kind, *args, **kwargs))
    with errors.constructing(getattr(cls, "__name__", str(cls))):
        return cls(*args, **kwargs)


def run(verb: str, args: Sequence[str]) -> None:
    """Run one of LightningCLI's verbs.

    A mistake prints its sentence and exits with 2. A bug keeps its traceback.
    """
    debug = errors.debugging(args)
    args = [in_full(arg) for arg in args if arg != "--debug"]
    # LightningCLI runs the verb in its constructor. What failed in it is asked about afterwards.
    cli = object.__new__(AdaptrankCLI)
    torch.set_float32_matmul_precision("high")
    with quiet():
        try:
            cli.__init__(verb, args)  # type: ignore[misc]
        except (KeyboardInterrupt, SystemExit) as error:
            if not interrupted(cli, error):
                raise
            leave(cli)
        except Exception as error:
            if not cli.began:
                discard_unbegun(cli.run_folder)
            if lost(cli) and not debug:
                # It has been said which process is gone. The error is only what follows from it.
                raise SystemExit(2) from None
            text = explain(cli, error)
            if text is None or debug:
                raise
            errors.fail(text)
