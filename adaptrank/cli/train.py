"""`fit`, `validate`, `test`, `predict`: LightningCLI with a typed allocator and a folder for each run."""

import json
import shlex
import signal
import sys
import threading
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden

import adaptrank.data
import adaptrank.modules  # noqa: F401
from adaptrank.allocation import Participant
from adaptrank.artifacts.adapter import WEIGHTS
from adaptrank.artifacts.run import (
    JsonlLogger,
    RunFiles,
    discard_unbegun,
    new_run_folder,
    render,
    summarize,
    write_json,
)
from adaptrank.axes import rank_axes
from adaptrank.cli import errors
from adaptrank.cli.progress import StepProgress
from adaptrank.cli.quiet import quiet
from adaptrank.modules.adapted import AdaptedModule
from adaptrank.parameterizations import adapted_part, wrapped_layers
from adaptrank.reports.card import write_card

TRAINER_DEFAULTS = {
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "use_distributed_sampler": False,  # our loaders share the data out by themselves, and resume in mid-epoch
}
INTERRUPTED = "interrupted.ckpt"


class Parser(LightningArgumentParser):
    """Raises what is wrong, rather than to print all that would be right; no abbreviated keys."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if self.exit_on_error:
            raise errors.ConfigError(errors.condense(message)) from ex
        super().error(message, ex)


class AdaptrankCLI(LightningCLI):
    """LightningCLI, a key `allocator`, and a run folder."""

    run_folder: Path | None = None
    began = False
    trainer: Trainer
    before: dict[str, float]
    evaluates = True

    def __init__(self, verb: str, args: Sequence[str]) -> None:
        self.verb, self.args = verb, list(args)
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
            auto_configure_optimizers=False,  # the module's own argument `optimizer` does that
            load_from_checkpoint_support=False,
            args=[verb, *args],
        )

    # ---- parsing

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_subclass_arguments(
            Participant,
            "allocator",
            required=False,
            help="Moves ranks while training; see `python -m adaptrank methods`.",
        )
        parser.add_subclass_arguments(
            Participant,
            "initial_ranks",
            required=False,
            help="Chooses the ranks to start from, beside an allocator that moves them.",
        )
        parser.add_argument(
            "--runs", type=str, default="runs", help="Folder that holds the run folders."
        )
        parser.add_argument(
            "--evaluate", type=bool, default=True, help="Whether `fit` evaluates before and after."
        )

    def _prepare_subcommand_parser(
        self, klass: type, subcommand: str, **kwargs: Any
    ) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # a checkpoint of ours needs no pickle
        if subcommand == "predict":
            parser.add_argument(
                "--out", type=str | None, default=None, help="File for the predictions."
            )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        try:
            self.config = parser.parse_args([self.verb, *self.args])
        except errors.ConfigError as error:
            own = (
                parser._subcommands_action.choices[self.verb]
                if parser._subcommands_action
                else parser
            )
            diagnose(self.args, schema(own))
            raise error

    def _parse_ckpt_path(self) -> None:
        """Nothing is read from a checkpoint before the run: its file is only checked."""
        path = self.config[self.verb].get("ckpt_path")
        if path in (None, "best", "last", "hpc") or "://" in str(path):
            return
        if not Path(path).is_file():
            raise errors.ConfigError(f"ckpt_path: {errors.missing_file(path, 'checkpoint')}")
        if not zipfile.is_zipfile(path):
            raise errors.ConfigError(
                f"ckpt_path: {path} is no Lightning checkpoint, or is damaged."
            )

    # ---- building

    def before_instantiate_classes(self) -> None:
        """Look at the adapter's folder before minutes of building, for the mistake that is easily made."""
        adapter = self._get(self.config, "model.init_args.adapter")
        if isinstance(adapter, str) and Path(adapter).is_file():
            model = errors.find_class(self._get(self.config, "model.class_path"), LightningModule)
            if isinstance(model, type) and issubclass(model, AdaptedModule):
                inside = f", {str(Path(adapter).parent)!r}" if Path(adapter).name == WEIGHTS else ""
                raise errors.ConfigError(
                    f"model.adapter: {adapter!r} is a file; name the folder of an adapter{inside or ', such as runs/NAME/0/adapter'}."
                )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        allocator = self._get(self.config_init, "allocator")
        initial = self._get(self.config_init, "initial_ranks")
        if initial is not None and initial.moves:
            raise errors.ConfigError(
                f"initial_ranks: {type(initial).__name__} moves ranks while training; give it as `allocator`."
            )
        extra: list[Callback] = [
            one for one in (initial, allocator) if one is not None
        ]  # before any ModelCheckpoint
        configured = self._get(self.config_init, "trainer.callbacks") or []
        configured = configured if isinstance(configured, list) else [configured]
        listed = next(
            (
                c
                for c in configured
                if isinstance(c, Participant) and allocator and c.moves and allocator.moves
            ),
            None,
        )
        if allocator is not None and listed is not None:
            raise errors.ConfigError(
                f"`allocator` is {type(allocator).__name__}, and trainer.callbacks lists {type(listed).__name__}: two would move "
                f"the same ranks; keep one."
            )
        own_logger = self._get(self.config_init, "trainer.logger") in (None, True)
        if self.verb == "fit":
            folder = self._new_folder()
            self.run_folder = folder
            extra += [RunFiles(folder), Interrupt(folder), Begins(self)]
            if self._get(self.config_init, "trainer.enable_checkpointing") is not False and not any(
                isinstance(callback, ModelCheckpoint) for callback in configured
            ):
                extra.append(
                    StepCheckpoint(
                        folder / "checkpoints", filename="{step}", every_n_train_steps=50
                    )
                )
            if self._get(self.config_init, "trainer.default_root_dir") is None:
                kwargs["default_root_dir"] = str(folder)
            if own_logger:
                kwargs["logger"] = JsonlLogger(folder)
        elif own_logger:
            kwargs["logger"] = False
        bar = self._get(self.config_init, "trainer.enable_progress_bar")
        if bar is not False and not any(
            isinstance(callback, ProgressBar) for callback in configured
        ):
            extra.append(StepProgress())
        config = {**self._get(self.config_init, "trainer", default={}), **kwargs}
        return self._instantiate_trainer(config, extra)

    def _new_folder(self) -> Path:
        configs = self._get(self.config, "config") or []
        runs = Path(self._get(self.config, "runs")) / run_name(configs[-1] if configs else None)
        if getattr(rank_zero_only, "rank", 0):
            return runs / "of the first process"  # only that one writes
        return new_run_folder(runs)

    # ---- the verbs

    def fit(self, **kwargs: Any) -> None:
        self.before = {}
        self._check_schedules()  # before minutes of evaluation, not after them
        self._say_backbone()
        self.evaluates = bool(self._get(self.config, "evaluate"))
        if self.evaluates and (missing := self._missing_for_evaluation()):
            self.evaluates = False
            say(f"No evaluation before and after: {missing}.")
        if self.evaluates and not self._get(self.config, "ckpt_path"):
            self.before = self._evaluate()
        self.trainer.fit(**kwargs)
        if not self.trainer.interrupted:
            self._finish()

    def _check_schedules(self) -> None:
        for allocator in self._callbacks():
            if not isinstance(allocator, Participant) or self.trainer.max_steps <= 0:
                continue
            try:
                allocator.engine.check_steps(self.trainer.max_steps)
            except ValueError as error:
                fast: int = self.trainer.fast_dev_run  # type: ignore[attr-defined]
                if not fast:
                    raise
                raise errors.ConfigError(
                    f"trainer.fast_dev_run makes {int(fast)} step(s), in which {type(allocator).__name__} would never act: leave "
                    f"the allocator out, or add --allocator null."
                ) from error

    def _missing_for_evaluation(self) -> str | None:
        """What a module or data of another kind than ours lack for `Trainer.validate`."""
        if not is_overridden("validation_step", self.model):
            return f"{type(self.model).__name__} has no validation_step"
        if not is_overridden("val_dataloader", self.datamodule):
            return f"{type(self.datamodule).__name__} has no val_dataloader"
        return None

    def _finish(self) -> None:
        folder = self.run_folder
        assert folder is not None
        after = self._evaluate() if self.evaluates else numbers(self.trainer.callback_metrics)
        files = next(c for c in self._callbacks() if isinstance(c, RunFiles))
        summary = summarize(self.model, self.before, after, self.trainer.global_step, files.seconds)
        if self.trainer.is_global_zero:
            write_json(folder / "summary.json", summary)
            if (folder / "adapter").is_dir():
                ranks = {
                    key: len(axis) for key, axis in rank_axes(adapted_part(self.model)).items()
                }
                config = folder / "config.yaml"
                write_card(
                    folder / "adapter",
                    summary,
                    ranks,
                    config.read_text(encoding="utf-8") if config.is_file() else "",
                )
            say("\n" + render(summary, self._names(after)))
            say("\n" + next_commands(folder, self.model))

    def validate(self, verbose: bool = True, **kwargs: Any) -> None:
        self._say_backbone()
        self._report(self.trainer.validate(**kwargs, verbose=False), verbose)

    def test(self, verbose: bool = True, **kwargs: Any) -> None:
        self._say_backbone()
        self._report(self.trainer.test(**kwargs, verbose=False), verbose)

    def predict(self, **kwargs: Any) -> None:
        batches = self.trainer.predict(**kwargs) or []
        names = getattr(self.datamodule, "class_names", None)
        lines = [json.dumps(line, ensure_ascii=False) for line in predictions(batches, names)]
        out = self._get(self.config, "out")
        if not self.trainer.is_global_zero:
            return
        if out is None:
            say("\n".join(lines))
        else:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            Path(out).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            say(f"{len(lines)} predictions in {out}")

    def _report(self, results: Sequence[Any], verbose: bool) -> None:
        values = {name: float(value) for result in results for name, value in result.items()}
        if verbose and self.trainer.is_global_zero:
            say(table(values, self._names(values)))

    def _evaluate(self) -> dict[str, float]:
        results = self.trainer.validate(self.model, datamodule=self.datamodule, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}

    def _say_backbone(self) -> None:
        if isinstance(self.model, AdaptedModule):
            say(f"Backbone {self.model.source.describe()}")

    def _names(self, values: Iterable[str]) -> tuple[str, ...]:
        first = tuple(getattr(self.model, "metrics_shown", ()))
        return (*first, *(name for name in values if name not in first))

    def _callbacks(self) -> list[Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined, no-any-return]


class Begins(Callback):
    """Notes that training began: what fails later is no mistake in the configuration."""

    def __init__(self, cli: AdaptrankCLI) -> None:
        self._cli = cli

    def on_train_batch_start(self, *args: Any) -> None:
        self._cli.began = True


class Interrupt(Callback):
    """Ctrl-C ends the run after the step that is being made, and keeps a checkpoint that resumes from there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._asked = False
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            signal.signal(
                signal.SIGINT, self._ask
            )  # Lightning's teardown puts the old handler back

    def _ask(self, *_: Any) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print(
            "\nStopping after this step; Ctrl-C again stops at once.", file=sys.stderr, flush=True
        )

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        stepped = (
            trainer.global_step != self._step
        )  # not amid accumulated gradients, which no checkpoint holds
        self._step = trainer.global_step
        if self._asked and stepped:
            trainer.save_checkpoint(self._folder / "checkpoints" / INTERRUPTED)
            raise KeyboardInterrupt


class StepCheckpoint(ModelCheckpoint):
    """Keeps the latest of every so many steps, and the last step, wherever that falls."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        if trainer.global_step and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


class SaveConfig(SaveConfigCallback):
    """Writes the complete configuration into the run folder, where it starts the same run again.

    From its beginning, for a run that was resumed: its `ckpt_path` is left out.
    """

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = next((c.folder for c in trainer.callbacks if isinstance(c, RunFiles)), None)  # type: ignore[attr-defined]
        if folder is not None:
            config = self.config.clone()
            config["ckpt_path"] = None
            self.parser.save(
                config, folder / "config.yaml", skip_none=False, overwrite=True, multifile=False
            )


# ---- what a user reads


@rank_zero_only
def say(text: str) -> None:
    """Print from the first process only."""
    print(text, flush=True)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Logged metrics as plain numbers."""
    return {name: float(value) for name, value in metrics.items()}


def table(values: dict[str, float], names: Sequence[str]) -> str:
    """Metrics, one a line."""
    shown = [name for name in names if name in values]
    width = max(map(len, shown), default=0)
    return "\n".join(f"  {name:{width}} {values[name]:10.4f}" for name in shown)


def predictions(batches: Sequence[Any], names: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    """One JSON-able mapping an example, from the batches that `predict_step` returned."""
    for batch in batches:
        for value in batch if isinstance(batch, list | tuple) else [batch]:
            value = value.tolist() if isinstance(value, torch.Tensor) else value
            if isinstance(value, dict):
                yield value
            elif names and isinstance(value, int):
                yield {"label": value, "name": names[value]}
            else:
                yield {"prediction": value}


def run_name(config: Any) -> str:
    """What a configuration's runs are called: its file's name, or that of the run whose config.yaml it is."""
    if config is None:
        return "run"
    path = Path(str(config))
    name, folder = path.stem, path.absolute().parent
    return folder.parent.name if name == "config" and folder.name.isdigit() else name


def next_commands(folder: Path, module: LightningModule) -> str:
    """What one does next with a run, ready to paste, as far as it applies.

    The commands build a module of ours again; one of another kind gets its adapter, if it has one, by `load_adapter`.
    """
    layers = wrapped_layers(module)
    if not layers:
        return f"No adapter saved: {type(module).__name__} holds no adapted layer. Run folder: {shlex.quote(str(folder))}"
    adapter = shlex.quote(str(folder / "adapter"))
    lines = [f"Adapter saved: {adapter}"]
    if not isinstance(module, AdaptedModule):
        return f"{lines[0]}\n  load:     adaptrank.load_adapter(model, {str(folder / 'adapter')!r})"
    if hasattr(module, "complete"):
        prompt = r'"Question: Ann has 12 pears and buys 7 more. How many pears does Ann have now?\nAnswer:"'
        lines.append(f"  generate: python -m adaptrank generate {adapter} --prompt {prompt}")
    if all(wrapper.mergeable for layer in layers.values() for wrapper in layer.nest):
        lines.append(
            f"  merge:    python -m adaptrank merge {adapter} --out {shlex.quote(str(folder / 'merged'))}"
        )
    config = shlex.quote(str(folder / "config.yaml"))
    # A pattern would be applied to what is loaded, and undo what an allocator has moved.
    pattern = " --model.rank_pattern null" if module.rank_pattern else ""
    if (folder / "config.yaml").is_file():  # fast_dev_run leaves none
        lines.append(
            f"  go on:    python -m adaptrank fit --config {config} --model.adapter {adapter}{pattern}"
        )
    return "\n".join(lines)


def resume_command(folder: Path, step: int) -> str:
    """How an interrupted run is taken up again, as far as there is a checkpoint."""
    lines = [f"\nInterrupted at step {step}."]
    if (folder / "adapter").is_dir():
        lines[0] += f" Adapter saved: {shlex.quote(str(folder / 'adapter'))}"
    checkpoints = sorted(
        (folder / "checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime
    )
    if checkpoints:
        config, checkpoint = (
            shlex.quote(str(folder / "config.yaml")),
            shlex.quote(str(checkpoints[-1])),
        )
        lines.append(
            f"  resume:   python -m adaptrank fit --config {config} --ckpt_path {checkpoint}"
        )
    return "\n".join(lines)


# ---- mistakes


def schema(parser: Any) -> dict[str, Any]:
    """Top-level key -> type, of a verb's parser."""
    keys = {key.split(".")[0]: Any for key in vars(parser.get_defaults())} | {
        "config": Any,
        "model": Any,
        "data": Any,
    }
    classes = {
        "model": LightningModule,
        "data": LightningDataModule,
        "allocator": Participant | None,
        "initial_ranks": Participant | None,
    }
    scalars = {
        "runs": str,
        "evaluate": bool,
        "ckpt_path": str | None,
        "seed_everything": bool | int,
    }
    return {**keys, **classes, **scalars, "trainer": errors.Arguments(Trainer)}


def diagnose(args: Sequence[str], known: dict[str, Any]) -> None:
    """Find what is wrong with a command line that did not parse.

    Raises:
        ConfigError: with the file and the line, where that can be told; nothing is raised if nothing is found.
    """
    tree, files, options = errors.collect(
        [arg for arg in args if not arg.startswith("--print_config")]
    )
    try:
        errors.check(tree, known)
        for key in ("model", "data"):
            if key not in tree:
                raise errors.ConfigError(
                    f"There is no {key!r} in {' and '.join(files) or 'the command line'}; give --config FILE, such as one of "
                    f"configs/, or --{key} CLASS."
                )
    except errors.ConfigError as error:
        where = place(error.key, files, options)
        raise errors.ConfigError(f"{where}{error}") from None


def place(key: errors.Key, files: Sequence[str], options: dict[errors.Key, str]) -> str:
    """`file, line n: ` or `--option: ` in front of a message; nothing where that cannot be told.

    An option that set the key, or something around it, comes first: what a file says there does not count any more. An
    option further in comes after a file that has the key itself.
    """
    prefixes = [key[:length] for length in range(len(key), 0, -1)]
    for prefix in prefixes:
        if prefix in options:
            return f"{options[prefix]}: "
    for prefix in prefixes:
        for file in reversed(files):
            line = errors.line_of(file, prefix)
            if line is not None:
                return f"{file}, line {line}: "
        if prefix == key:
            for given, option in options.items():
                if given[: len(key)] == key:
                    return f"{option}: "
    return ""


# ---- the run


def run(verb: str, args: Sequence[str]) -> None:
    """One of LightningCLI's verbs; a mistake prints its sentence and exits with 2, a bug keeps its traceback."""
    debug = errors.debugging(args)
    args = ["--help" if arg == "--help_all" else arg for arg in args if arg != "--debug"]
    cli = object.__new__(AdaptrankCLI)
    torch.set_float32_matmul_precision("high")
    with quiet():
        try:
            cli.__init__(verb, args)  # type: ignore[misc]  # two steps: what failed is asked about afterwards
        except (KeyboardInterrupt, SystemExit) as error:
            if not interrupted(cli, error):
                raise
            leave(cli)
        except Exception as error:
            if not cli.began:
                discard_unbegun(cli.run_folder)
            text = None if cli.began else errors.explain(error)
            if text is None or debug:
                raise
            errors.fail(text)


def interrupted(cli: AdaptrankCLI, error: BaseException) -> bool:
    """Whether this is Ctrl-C, which Lightning turns into an exit."""
    trainer = getattr(cli, "trainer", None)
    return isinstance(error, KeyboardInterrupt) or (
        trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
    )


def leave(cli: AdaptrankCLI) -> NoReturn:
    """Say what an interrupted run leaves, and exit with 1."""
    if cli.began and cli.run_folder is not None:
        say(resume_command(cli.run_folder, cli.trainer.global_step))
    else:
        discard_unbegun(cli.run_folder)
        print("\nInterrupted.", file=sys.stderr)
    raise SystemExit(1)
