"""A study file, read and checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from adaptrank._errors import UserError, did_you_mean, some
from adaptrank.studies.choices import check_grid, check_search, check_selection, check_sums
from adaptrank.studies.overlays import Config, contains, map_texts, merge
from adaptrank.studies.references import check_replays

KEYS = (
    "title",
    "limits",
    "config",
    "overlay",
    "methods",
    "allocators",
    "budgets",
    "lrs",
    "grid",
    "search",
    "sums",
    "spectra",
    "seeds",
    "lr_key",
    "seed_keys",
    "selection",
    "metric",
    "mode",
    "baseline",
    "reported_on",
)
"""Keys of a study file."""

REQUIRED_KEYS = ("config", "methods", "metric")

BUDGET = "$budget"
"""Word that stands for the integer that is solved for a budget."""

DATA = "$data"
"""Word that stands for the folder of the data."""

SEED = "$seed"
"""Word that stands for the seed of a run, such as that of an allocator."""

LR_KEY = "model.init_args.optimizer.init_args.lr"
SEED_KEYS = ("seed_everything", "data.init_args.seed")


@dataclass(frozen=True)
class Study:
    """Content of a study file.

    Args:
        name: name of the file.
        title: title of the report.
        limits: sentence of the report about what the study was sized to.
        config: configuration of `fit` that all points start from, with the overlay laid over it.
        methods: name -> overlay of the configuration.
        allocators: name -> overlay with the key `allocator`. {"none": {}} for studies without one.
        budgets: largest numbers of trainable parameters. Empty to take configurations as they are.
        lrs: learning rates to select from, by equal trials for every method. Empty to take the
            configuration's own.
        grid: key of a configuration -> values. Each combination is a row of the report.
        search: learning rates that Optuna proposes: `trials` for every method, between `low` and
            `high`, with a `seed` (0). Empty without a search.
        spectra: whether rank, effective rank and size of the change of each layer are collected,
            for a table of the report.
        sums: name -> adapters that are composed: `of` methods, by `method` ("sum") with `weights`
            and further `options` of `compose`. The result is evaluated on the data of `like`.
        seeds: seeds of the reported runs.
        lr_key: dotted path of the learning rate.
        seed_keys: dotted paths of the seed.
        selection: how trials select a learning rate. `overlay` is laid over a configuration, and
            names data that is not reported on. `metric` and `mode` ("min" by default) select, by
            the mean over the `seeds` of the trials, which are the first seed by default. `name`
            describes the data, "a slice of train" by default.
        metric: reported metric.
        mode: "max" if more of the metric is better, "min" if less is.
        baseline: name of the method that others are tested against.
        reported_on: name of the data split of the metric.
    """

    name: str
    title: str
    limits: str
    config: Config
    methods: Mapping[str, Config]
    allocators: Mapping[str, Config]
    budgets: Sequence[int]
    lrs: Sequence[float]
    grid: Mapping[str, Sequence[Any]]
    search: Mapping[str, Any]
    sums: Mapping[str, Mapping[str, Any]]
    spectra: bool
    seeds: Sequence[int]
    lr_key: str
    seed_keys: Sequence[str]
    selection: Mapping[str, Any]
    metric: str
    mode: str
    baseline: str | None
    reported_on: str

    @property
    def trial_seeds(self) -> Sequence[int]:
        """Seeds of the runs that try a learning rate."""
        seeds: Sequence[int] = self.selection.get("seeds") or self.seeds[:1]
        return seeds

    @property
    def selection_sign(self) -> int:
        """-1 if more of the metric of the selection is better, 1 if less is."""
        return -1 if self.selection.get("mode", "min") == "max" else 1


def read_study(
    file: Path, data: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Study:
    """Read a study from its file.

    Args:
        file: YAML file. Its `config` is a path from there, or a whole configuration.
        data: folder that replaces `$data` in any text of the study.
        overrides: keys of the study to replace, such as {"seeds": [0]}.

    Raises:
        FileNotFoundError: if there is no such file.
        UserError: if a key is unknown, missing, or of another type.
    """
    return make_study(_read_table(file) | dict(overrides or {}), file, data)


def make_study(stated: Mapping[str, Any], file: Path, data: str | None = None) -> Study:
    """Return the study that a table of keys describes.

    Args:
        stated: keys of a study and their values.
        file: file that is named in errors, and from which `config` is a path.
        data: folder that replaces `$data` in any text of the study.

    Raises:
        FileNotFoundError: if there is no such configuration.
        UserError: if a key is unknown, missing, or of another type.
    """
    _check_keys(stated, file)
    study = Study(
        name=file.stem,
        title=stated.get("title") or file.stem,
        limits=stated.get("limits") or "",
        config=merge(_base_config(stated["config"], file), stated.get("overlay") or {}),
        methods=_named_overlays(stated["methods"]),
        allocators=_named_overlays(stated.get("allocators") or {"none": {}}),
        budgets=stated.get("budgets") or [],
        lrs=stated.get("lrs") or [],
        grid=stated.get("grid") or {},
        search=stated.get("search") or {},
        sums=stated.get("sums") or {},
        spectra=stated.get("spectra", False),
        seeds=stated.get("seeds") or [0],
        lr_key=stated.get("lr_key") or LR_KEY,
        seed_keys=stated.get("seed_keys") or list(SEED_KEYS),
        selection=stated.get("selection") or {},
        metric=stated["metric"],
        mode=stated.get("mode") or "max",
        baseline=stated.get("baseline"),
        reported_on=stated.get("reported_on") or "validation",
    )
    _check_study(study, file)
    return _with_data(study, data, file)


def _read_table(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"There is no study file {str(file)!r}.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is no study: it has to be a table of keys.")
    return content


def _check_keys(stated: Mapping[str, Any], file: Path) -> None:
    for key in stated:
        if key not in KEYS:
            raise UserError(
                f"{file}: {key!r} is no key of a study.{did_you_mean(str(key), KEYS)} "
                f"There are {', '.join(KEYS)}."
            )
    for key in REQUIRED_KEYS:
        if key not in stated:
            raise UserError(f"{file}: a study needs the key {key!r}.")


def _base_config(config: str | Config, file: Path) -> Config:
    """Return the configuration that all points start from, which may stand in a file of its own."""
    if not isinstance(config, str):
        return config
    path = file.parent / config
    if not path.is_file():
        raise FileNotFoundError(f"{file}: there is no configuration {str(path)!r}.")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{path} is no configuration: it has to be a table of keys.")
    return content


def _named_overlays(overlays: Mapping[str, Config | None]) -> dict[str, Config]:
    return {str(name): overlay or {} for name, overlay in overlays.items()}


# ---- checks


def _check_study(study: Study, file: Path) -> None:
    _require(bool(study.methods), "methods names none", file)
    _require(study.mode in ("max", "min"), f"mode is 'max' or 'min', not {study.mode!r}", file)
    _require(_are_numbers(study.budgets, int), "budgets is a list of numbers", file)
    _require(
        _are_numbers(study.lrs, int, float),
        "lrs is a list of numbers. YAML reads 1e-3 as a text: write 1.0e-3 or 0.001",
        file,
    )
    _require(_are_numbers(study.seeds, int), "seeds is a list of numbers", file)
    _require(
        study.baseline is None or study.baseline in study.methods,
        f"baseline {study.baseline!r} is none of the methods, which are "
        f"{some(map(repr, study.methods))}",
        file,
    )
    check_selection(study.selection, lambda holds, mistake: _require(holds, mistake, file))
    _require(
        len(study.lrs) < 2 or _can_select(study.selection),
        "several lrs are selected by trials: selection needs an overlay, with data that is not "
        "reported on, and a metric",
        file,
    )
    _require(isinstance(study.spectra, bool), "spectra is true or false", file)
    _check_choices(study, file)
    for name, overlay in study.methods.items():
        _require(
            bool(study.budgets) or not _is_solved(overlay, study.allocators),
            f"{name} has {BUDGET}, and the study no budgets",
            file,
        )


def _check_choices(study: Study, file: Path) -> None:
    def require(condition: bool, mistake: str) -> None:
        _require(condition, mistake, file)

    check_grid(study.grid, require)
    check_search(study.search, study.lrs, _can_select(study.selection), require)
    check_sums(study.sums, study.methods, require)
    check_replays(study.config, study.methods, study.allocators, require)


def _require(condition: bool, mistake: str, file: Path) -> None:
    if not condition:
        raise UserError(f"{file}: {mistake}.")


def _are_numbers(values: Any, *types: type) -> bool:
    if not isinstance(values, list):
        return False
    return all(isinstance(value, types) and not isinstance(value, bool) for value in values)


def _can_select(selection: Any) -> bool:
    """Return whether trials have data of their own and a metric."""
    if not isinstance(selection, dict):
        return False
    return isinstance(selection.get("overlay"), dict) and "metric" in selection


def _is_solved(method: Config, allocators: Mapping[str, Config]) -> bool:
    """Return whether a method has an integer that is solved for a budget, with any allocator."""
    return any(contains(merge(method, allocator), BUDGET) for allocator in allocators.values())


# ---- data


def _with_data(study: Study, data: str | None, file: Path) -> Study:
    """Return the study with the folder of the data in place of `$data`."""

    def filled(config: Config) -> Config:
        if not contains(config, DATA):
            return config
        if data is None:
            raise UserError(
                f"{file} reads data from {DATA}. Say where they are with --data.root FOLDER."
            )
        with_folder: Config = map_texts(config, lambda text: text.replace(DATA, data))
        return with_folder

    return replace(
        study,
        config=filled(study.config),
        methods={name: filled(overlay) for name, overlay in study.methods.items()},
        allocators={name: filled(overlay) for name, overlay in study.allocators.items()},
        selection=filled(dict(study.selection)),
        grid=filled(dict(study.grid)),
    )
