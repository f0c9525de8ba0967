"""A study file -> the points that it asks for, each a whole configuration of `fit`. Nothing is run, and no weight is loaded.

Budgets are matched, not guessed: the integer that stands where a configuration says `$budget` is the largest whose trainable
parameters, counted on the meta device, are not above the budget.
"""

import copy
import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from adaptrank._errors import UserError

Config = dict[str, Any]
Count = Callable[[Config], int]
"""Configuration -> numbers that train, adapters alone."""

KEYS = (
    "title", "limits", "config", "overlay", "methods", "allocators", "budgets", "lrs", "seeds", "lr_key", "seed_keys", "selection",
    "metric", "mode", "baseline", "reported_on",
)  # fmt: skip
BUDGET, DATA = "$budget", "$data"
LARGEST = 1 << 14


@dataclass(frozen=True)
class Study:
    """What a study file says.

    Args:
        name: of the file.
        title, limits: for the report; limits say what the study was sized to.
        config: that of `fit` which all points start from, the overlay laid over it.
        methods: name -> what is laid over the configuration.
        allocators: name -> an entry for the key `allocator`, and further keys; {"none": {}} where there is no such axis.
        budgets: largest numbers of trainable parameters; empty for the configurations as they are.
        lrs: learning rates to select from, by equal trials for every method; empty for the configuration's own.
        seeds: of the reported runs.
        lr_key, seed_keys: where these go, as dotted paths.
        selection: `overlay`, what is laid over a configuration for a trial, data of which nothing is reported on; `metric` and `mode`; `name`
            of those data, by default "a slice of train".
        metric, mode: what is reported, "max" or "min".
        baseline: name of the method that others are tested against.
        reported_on: name of the split that the metric is of.
    """

    name: str
    title: str
    limits: str
    config: Config
    methods: Mapping[str, Config]
    allocators: Mapping[str, Config]
    budgets: Sequence[int]
    lrs: Sequence[float]
    seeds: Sequence[int]
    lr_key: str
    seed_keys: Sequence[str]
    selection: Mapping[str, Any]
    metric: str
    mode: str
    baseline: str | None
    reported_on: str


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        method, allocator, budget, lr, seed: where it stands; budget is None where there is none.
        units: the integer that was solved for the budget, None where nothing was.
        parameters: numbers that train in adapters at the start.
        trial: whether it only helps to select a learning rate.
        config: the whole configuration.
    """

    method: str
    allocator: str
    budget: int | None
    lr: float | None
    seed: int
    units: int | None
    parameters: int
    trial: bool
    config: Config = field(hash=False, compare=False)

    @property
    def key(self) -> str:
        """Name of its folder: the same for the same configuration."""
        digest = hashlib.blake2b(
            json.dumps(self.config, sort_keys=True).encode(), digest_size=5
        ).hexdigest()
        parts = [self.method, *([] if self.allocator == "none" else [self.allocator])]
        parts += [] if self.budget is None else [f"b{self.budget}"]
        parts += [] if self.lr is None else [f"lr{self.lr:g}"]
        parts += [f"s{self.seed}", *(["trial"] if self.trial else []), digest]
        return "-".join(part.replace("/", "_").replace(" ", "_") for part in parts)


def read_study(
    file: Path, data: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Study:
    """A study from its file.

    Args:
        file: YAML; `config` in it is a path from there, or a whole configuration.
        data: what stands for `$data` in any text of it.
        overrides: keys of the study to replace, such as {"seeds": [0]}.
    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key, or one that is missing or of another kind.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no study file {str(file)!r}.")
    try:
        said = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{file} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(said, dict):
        raise UserError(f"{file} is no study: it has to be a table of keys.")
    said |= overrides or {}
    for key in said:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"{file}: {key!r} is no key of a study.{hint} There are {', '.join(KEYS)}."
            )
    for key in ("config", "methods", "metric"):
        if key not in said:
            raise UserError(f"{file}: a study needs the key {key!r}.")
    base = said["config"]
    if isinstance(base, str):
        path = file.parent / base
        if not path.is_file():
            raise FileNotFoundError(f"{file}: there is no configuration {str(path)!r}.")
        base = yaml.safe_load(path.read_text(encoding="utf-8"))
    config = merged(base, said.get("overlay") or {})
    methods = {str(name): overlay or {} for name, overlay in said["methods"].items()}
    allocators = {
        str(name): overlay or {}
        for name, overlay in (said.get("allocators") or {"none": {}}).items()
    }
    selection = said.get("selection") or {}
    study = Study(
        name=file.stem,
        title=said.get("title") or file.stem,
        limits=said.get("limits") or "",
        config=config,
        methods=methods,
        allocators=allocators,
        budgets=said.get("budgets") or [],
        lrs=said.get("lrs") or [],
        seeds=said.get("seeds") or [0],
        lr_key=said.get("lr_key") or "model.init_args.optimizer.init_args.lr",
        seed_keys=said.get("seed_keys") or ["seed_everything", "data.init_args.seed"],
        selection=selection,
        metric=said["metric"],
        mode=said.get("mode") or "max",
        baseline=said.get("baseline"),
        reported_on=said.get("reported_on") or "validation",
    )
    _check(study, file)
    return replace(
        study,
        config=_with_data(study.config, data, file),
        methods={name: _with_data(one, data, file) for name, one in methods.items()},
        allocators={name: _with_data(one, data, file) for name, one in allocators.items()},
        selection=_with_data(dict(selection), data, file),
    )


def _check(study: Study, file: Path) -> None:
    def need(true: bool, what: str) -> None:
        if not true:
            raise UserError(f"{file}: {what}.")

    need(bool(study.methods), "methods names none")
    need(study.mode in ("max", "min"), f"mode is 'max' or 'min', not {study.mode!r}")
    for name, kind in (("budgets", int), ("lrs", (int, float)), ("seeds", int)):
        values = getattr(study, name)
        fits = isinstance(values, list) and all(
            isinstance(v, kind) and not isinstance(v, bool) for v in values
        )
        need(
            fits,
            f"{name} is a list of numbers"
            + ("; YAML reads 1e-3 as a text, write 1.0e-3 or 0.001" if name == "lrs" else ""),
        )
    need(
        study.baseline is None or study.baseline in study.methods,
        f"baseline {study.baseline!r} is none of the methods",
    )
    if len(study.lrs) > 1:
        need(
            isinstance(study.selection, dict)
            and isinstance(study.selection.get("overlay"), dict)
            and "metric" in study.selection,
            "several lrs are selected by trials: selection needs an overlay, with data that is not reported on, and a metric",
        )
    for name, overlay in study.methods.items():
        solved = any(_holds(merged(overlay, a), BUDGET) for a in study.allocators.values())
        need(not solved or bool(study.budgets), f"{name} has {BUDGET}, and the study no budgets")


def _with_data(config: Config, data: str | None, file: Path) -> Config:
    if not _holds(config, DATA):
        return config
    if data is None:
        raise UserError(
            f"{file} reads data from {DATA}; say where they are with --data.root FOLDER."
        )
    found: Config = replaced(config, lambda text: text.replace(DATA, data))
    return found


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> Config:
    """Keys of the second laid over the first, tables into tables; lists and all else are replaced. Another class drops the arguments
    of the one before."""
    result = copy.deepcopy(dict(base))
    for key, value in over.items():
        have = result.get(key)
        if isinstance(have, dict) and isinstance(value, dict):
            other = "class_path" in value and value["class_path"] != have.get("class_path")
            result[key] = copy.deepcopy(value) if other else merged(have, value)
        else:
            result[key] = copy.deepcopy(value)
    return result


def replaced(value: Any, change: Callable[[str], Any]) -> Any:
    """Every text in plain data, changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: replaced(one, change) for key, one in value.items()}
    return [replaced(one, change) for one in value] if isinstance(value, list) else value


def set_at(config: Config, key: str, value: Any) -> Config:
    """The configuration with a value at a dotted path, tables made on the way."""
    result = copy.deepcopy(config)
    *way, last = key.split(".")
    at: Any = result
    for name in way:
        at = at.setdefault(name, {})
        if not isinstance(at, dict):
            raise UserError(
                f"{key!r} leads through {name!r}, which is no table in this configuration."
            )
    at[last] = value
    return result


def _holds(value: Any, word: str) -> bool:
    if isinstance(value, str):
        return word in value
    if isinstance(value, Mapping):
        return any(_holds(one, word) for one in value.values())
    return any(_holds(one, word) for one in value) if isinstance(value, list) else False


@dataclass(frozen=True)
class Place:
    """A method with an allocator at a budget, solved; what is left are learning rates and seeds."""

    method: str
    allocator: str
    budget: int | None
    units: int | None
    parameters: int
    config: Config


def places(study: Study, count: Count) -> Iterator[Place | str]:
    """Every method with every allocator at every budget; a sentence in place of what no integer fits."""
    for method, overlay in study.methods.items():
        for allocator, more in study.allocators.items():
            config = merged(merged(study.config, overlay), more)
            if not _holds(config, BUDGET):
                parameters = count(config)
                fits = [b for b in study.budgets if parameters <= b]
                if study.budgets and not fits:
                    yield f"{method} has {parameters:,} parameters at any budget, above all of them"
                    continue
                # It costs what it costs: one place, at the smallest budget that it fits.
                yield Place(
                    method, allocator, min(fits) if fits else None, None, parameters, config
                )
                continue
            for budget in study.budgets:
                solved = solve(config, budget, count)
                if isinstance(solved, str):
                    yield f"{method}, {allocator}, {budget:,}: {solved}"
                else:
                    units, parameters, found = solved
                    yield Place(method, allocator, budget, units, parameters, found)


def solve(config: Config, budget: int, count: Count) -> tuple[int, int, Config] | str:
    """(integer, parameters, configuration) of the largest integer in place of `$budget` that is not above the budget; else why not."""

    def at(units: int) -> tuple[int | None, str]:
        try:
            return count(_filled(config, units)), ""
        except ValueError as error:
            return None, str(error).split("\n", 1)[0]

    least, why = at(1)
    if least is None or least > budget:
        return why or f"already 1 takes {least:,} parameters"
    low, high = 1, 2
    while high < LARGEST and (found := at(high)[0]) is not None and found <= budget:
        low, high = high, 2 * high
    while high - low > 1:  # counts grow with the integer; one that a method refuses is too large
        middle = (low + high) // 2
        found = at(middle)[0]
        low, high = (middle, high) if found is not None and found <= budget else (low, middle)
    parameters, _ = at(low)
    assert parameters is not None
    return low, parameters, _filled(config, low)


def _filled(config: Config, units: int) -> Config:
    found: Config = replaced(
        config, lambda text: units if text == BUDGET else text.replace(BUDGET, str(units))
    )
    return found


def trials(study: Study, place: Place) -> list[Point]:
    """Runs that select the learning rate of a place: one for each, with the first seed; none where there is nothing to select."""
    if len(study.lrs) < 2:
        return []
    config = merged(place.config, study.selection["overlay"])
    return [_point(study, place, config, lr, study.seeds[0], True) for lr in study.lrs]


def reported(study: Study, place: Place, lr: float | None) -> list[Point]:
    """The runs of a place that are reported, one a seed."""
    return [_point(study, place, place.config, lr, seed, False) for seed in study.seeds]


def _point(
    study: Study, place: Place, config: Config, lr: float | None, seed: int, trial: bool
) -> Point:
    if lr is not None:
        config = set_at(config, study.lr_key, lr)
    for key in study.seed_keys:
        config = set_at(config, key, seed)
    return Point(
        place.method,
        place.allocator,
        place.budget,
        lr,
        seed,
        place.units,
        place.parameters,
        trial,
        config,
    )
