"""Several trained adapters and the base they were trained on -> one adapter on that base, and a report."""

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.artifacts import WEIGHTS, frozen_weights, load_adapter, read_adapter
from adaptrank.backbones import fingerprint
from adaptrank.composition.changes import (
    Change,
    Product,
    change_of,
    inner,
    rank_for,
    shared_ranks,
    total,
    truncated,
)
from adaptrank.composition.operators import OPERATORS, options_of
from adaptrank.composition.similarity import Similarity
from adaptrank.injection import join_fused, undone_on_error
from adaptrank.parameterizations import Parameterization, replace_layer, wrapped_layers
from adaptrank.parameterizations.lora import LoRA

Model = TypeVar("Model", bound=nn.Module)
Others = Literal["error", "first", "average", "drop"]

log = logging.getLogger("adaptrank")


@dataclass(frozen=True)
class Compression:
    """How a result is made low-rank; with none of them a product stays as it is, and a matrix is refused.

    Args:
        rank: of every layer.
        energy: of every layer the least rank that keeps this fraction of the sum of squares.
        error: of every layer the least rank with at most this relative error.
        parameters: of all layers together, spent where most energy is.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    parameters: int | None = None

    def __post_init__(self) -> None:
        given = [name for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise UserError(
                f"{' and '.join(given)} were given; a result is compressed by one of them."
            )
        if self.rank is not None and self.rank < 1:
            raise UserError(f"rank={self.rank}: 1 or more.")
        for name in ("energy", "error"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise UserError(f"{name}={value}: above 0, and at most 1.")

    def __bool__(self) -> bool:
        return any(value is not None for value in vars(self).values())


@torch.no_grad()
def compose(
    model: Model,
    adapters: Sequence[str | os.PathLike[str]],
    weights: Sequence[float] | None = None,
    operator: str = "sum",
    *,
    mode: Literal["delta", "sequential"] = "delta",
    order: Sequence[int] | None = None,
    compression: Compression | None = None,
    merged: bool = False,
    others: Others = "error",
    signs: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Put several adapters on their base as one; the model is changed in place, and the report is returned.

    In mode "delta" each adapter's change is taken at the original base, D_i = f_i(W) - W, and W' = W + operator(w_i, D_i). That does not
    depend on an order. Where all changes are products and the operator is the sum, the result is a LoRA of the sum of their ranks,
    exactly; no change is formed as an (m, n) matrix. Layers that an adapter does not change count as zero there.

    In mode "sequential" W' = f_k(... f_1(W)), the adapters stay what they are, and weights make no sense. Where one of them reads the
    weight that it changes, the order matters, and has to be said: a LoRA D in a HyperAdapt p, q is diag(p) (W + D) diag(q), a
    HyperAdapt in a LoRA is diag(p) W diag(q) + D, which is the sum in delta space.

    Args:
        model: the base, without adapters.
        adapters: folders that `save_adapter` wrote; of one base, by its fingerprint.
        weights: one for each adapter, negative to take one away; None is 1 for all.
        operator: any of `OPERATORS`.
        mode: "delta" or "sequential".
        order: positions in `adapters`, innermost first, in mode "sequential".
        compression: how the result is made low-rank.
        merged: put the result into the base's weights instead of a LoRA beside them, which any change fits.
        others: what happens to modules that were trained whole, such as a classifier: refuse, take the first adapter's, average, or
            leave out.
        signs: count conflicts of signs for the report, which forms (m, n) matrices.
        options: of the operator.
    Returns:
        The report, JSON-able: `similarity.Similarity.report`, and of each layer its rank, `error` of the compression, and
        `from_sum`, the relative distance of the result to the weighted sum of the changes.
    Raises:
        ValueError: if adapters and model do not fit together, or an option is out of range; the model is unchanged then.
    """
    folders = [Path(folder) for folder in adapters]
    weights = [1.0] * len(folders) if weights is None else [float(w) for w in weights]
    compression = compression or Compression()
    _check(model, folders, weights, operator, mode, order, compression, merged)
    options = options_of(operator, options)
    described = [read_adapter(folder) for folder in folders]
    _check_described(model, folders, described, others)
    names = _names(folders)
    sequence = list(order) if order is not None else list(range(len(folders)))
    similarity = Similarity(names, signs)
    with undone_on_error(model, {}), _restored(model, described, others):
        for position in sequence:
            load_adapter(model, folders[position], name=_own(position))
        _check_layers(model, folders, mode, order)
        if mode == "sequential":
            _compare(model, len(folders), similarity)
            for layer in wrapped_layers(model).values():
                for wrapper in layer.nest:
                    wrapper.name = "default"
            done: dict[str, dict[str, Any]] = {}
        else:
            combine = _combiner(weights, operator, options)
            done = _in_delta_space(model, len(folders), similarity, combine, compression, merged)
        if others != "drop":
            _put_others(model, folders, described, weights, others)
    report = {
        "mode": mode,
        "operator": operator if mode == "delta" else None,
        "options": options,
        "weights": weights if mode == "delta" else None,
        "order": [names[i] for i in sequence] if mode == "sequential" else None,
        "folders": [str(folder) for folder in folders],
        **similarity.report(),
    }
    for key, facts in done.items():
        report["layers"][key] |= facts
    return report


def _check(
    model: nn.Module,
    folders: Sequence[Path],
    weights: Sequence[float],
    operator: str,
    mode: str,
    order: Sequence[int] | None,
    compression: Compression,
    merged: bool,
) -> None:
    if wrapped_layers(model):
        raise UserError(
            "compose starts from the base alone, and this model holds adapters already."
        )
    if not folders:
        raise UserError("There is no adapter to compose; name their folders.")
    if len(weights) != len(folders):
        raise UserError(f"{len(weights)} weights for {len(folders)} adapters; give one for each.")
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"weights={list(weights)}: finite numbers.")
    if operator not in OPERATORS:
        import difflib

        close = difflib.get_close_matches(operator, OPERATORS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"operator={operator!r} is unknown.{hint} There are {', '.join(OPERATORS)}."
        )
    if mode not in ("delta", "sequential"):
        raise UserError(f"mode={mode!r} is unknown; use 'delta' or 'sequential'.")
    if mode == "sequential" and (
        any(w != 1 for w in weights) or operator != "sum" or compression or merged
    ):
        raise UserError(
            "mode='sequential' nests the adapters as they are: weights, operators, compression and merging are for mode='delta'."
        )
    if order is not None and mode == "delta":
        raise UserError("order is for mode='sequential'; a sum in delta space has none.")
    if order is not None and sorted(order) != list(range(len(folders))):
        raise UserError(
            f"order={list(order)}: each of 0 to {len(folders) - 1} once, innermost first."
        )


def _check_described(
    model: nn.Module, folders: Sequence[Path], described: Sequence[Mapping[str, Any]], others: str
) -> None:
    # A fingerprint leaves out what its adapter trained whole. Where that differs, only the model can tell.
    alike = len({tuple(one["trained_modules"]) for one in described}) == 1
    for folder, one in zip(folders, described, strict=True):
        base = (
            described[0]["base"]
            if alike
            else {"name": "this model", "fingerprint": _fingerprint(model, one)}
        )
        if one["base"]["fingerprint"] != base["fingerprint"]:
            raise UserError(
                f"{folder} was trained on {_base_name(one['base'])}, and {f'{folders[0]} on' if alike else 'the base is'} "
                f"{_base_name(base)}; adapters add up on one base only."
            )
        if "pruned" in one:
            raise UserError(
                f"{folder} cuts heads or channels out of its base, and adds up with nothing."
            )
        if one["trained_modules"] and others == "error":
            raise UserError(
                f"{folder} trained {one['trained_modules'][0]} whole, and there is no sum of such modules; say which to take with "
                f"others: 'first', 'average' or 'drop'."
            )
    if others not in ("error", "first", "average", "drop"):
        raise UserError(f"others={others!r} is unknown; use 'error', 'first', 'average' or 'drop'.")


def _fingerprint(model: nn.Module, description: Mapping[str, Any]) -> str:
    return fingerprint(frozen_weights(model, description["trained_modules"]))


def _base_name(base: Mapping[str, Any]) -> str:
    return f"{base.get('name') or 'an unnamed base'} (fingerprint {base['fingerprint']})"


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: the last parts of their paths in which they differ."""
    parts = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({p[-depth:] for p in parts}) < len({*parts}) and depth < max(map(len, parts)):
        depth += 1
    names = ["/".join(p[-depth:]) for p in parts]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def _own(position: int) -> str:
    return f"composed-{position}"


def _check_layers(
    model: nn.Module, folders: Sequence[Path], mode: str, order: Sequence[int] | None
) -> None:
    for path, layer in wrapped_layers(model).items():
        for wrapper in layer.nest:
            folder = folders[int(wrapper.name.rpartition("-")[2])]
            if mode == "delta" and (
                not isinstance(layer.innermost, kinds.MATRICES) or not wrapper.mergeable
            ):
                raise UserError(
                    f"{folder}: {type(wrapper).__name__} at {path} changes no single matrix, and has no sum; use mode='sequential'."
                )
            if (
                mode == "sequential"
                and order is None
                and len(folders) > 1
                and wrapper.product() is None
            ):
                raise UserError(
                    f"{folder}: {type(wrapper).__name__} may read the weight that it changes, so that the order matters; say it, "
                    f"innermost first: order={list(range(len(folders)))}."
                )


@torch.no_grad()
def changes(layer: Parameterization, count: int) -> list[Change | None]:
    """What each of the adapters called composed-0, composed-1, ... changes by itself at the original weight; None where it has none here."""
    nest = layer.nest
    before = [wrapper.enabled for wrapper in nest]
    found: list[Change | None] = []
    try:
        for position in range(count):
            own = [wrapper for wrapper in nest if wrapper.name == _own(position)]
            for wrapper in nest:
                wrapper.enabled = wrapper in own
            found.append(change_of(layer) if own else None)
    finally:
        for wrapper, flag in zip(nest, before, strict=True):
            wrapper.enabled = flag
    return found


def _compare(model: nn.Module, count: int, similarity: Similarity) -> None:
    for path, layer in wrapped_layers(model).items():
        if isinstance(layer.innermost, kinds.MATRICES) and all(
            wrapper.mergeable for wrapper in layer.nest
        ):
            similarity.add(path, changes(layer, count), _weight_norm(layer))


def _weight_norm(layer: Parameterization) -> float:
    return float(kinds.dense(layer.innermost, layer.adapter_dtype).norm())


Combine = Callable[[Sequence[Change | None], str], tuple[Change, float]]


def _combiner(weights: Sequence[float], operator: str, options: Mapping[str, Any]) -> Combine:
    """(changes of a layer, its key) -> the operator's result, and its relative distance from the weighted sum."""

    def combine(found: Sequence[Change | None], key: str) -> tuple[Change, float]:
        there = [change for change in found if change is not None]
        own = [weight for change, weight in zip(found, weights, strict=True) if change is not None]
        exact = total(there, own)
        if operator == "sum":
            return exact, 0.0
        result = OPERATORS[operator](there, own, key, **options)
        return result, _distance(result, exact)

    return combine


def _distance(a: Change, b: Change) -> float:
    """|A - B| / |B|."""
    whole = b.norm()
    if isinstance(a, Product) and isinstance(b, Product):
        off = math.sqrt(max(0.0, inner(a, a) - 2 * inner(a, b) + inner(b, b)))
    else:
        off = float((a.dense() - b.dense()).double().norm())
    return off / whole if whole else 0.0


def _in_delta_space(
    model: nn.Module,
    count: int,
    similarity: Similarity,
    combine: Combine,
    compression: Compression,
    merged: bool,
) -> dict[str, dict[str, Any]]:
    layers = wrapped_layers(model)
    result = _Result(model, merged)
    waiting: dict[str, Change] = {}  # where ranks are chosen over all layers
    with result:
        for path in list(layers):
            layer = layers.pop(path)
            found = changes(layer, count)
            similarity.add(path, found, _weight_norm(layer))
            change, distance = combine(found, path)
            result.facts[path] = {"from_sum": distance}
            replace_layer(
                model, layer, layer.innermost
            )  # its factors are free as soon as they are used
            del found, layer
            if compression.parameters is not None:
                waiting[path] = change
            elif compression:
                result.put(
                    path,
                    change,
                    compression.rank or rank_for(change, compression.energy, compression.error),
                )
            else:
                result.put(path, change)
        if waiting:
            ranks = shared_ranks(list(waiting.values()), int(compression.parameters or 0))
            for (path, change), rank in zip(waiting.items(), ranks, strict=True):
                result.put(path, change, rank)
    return result.facts


class _Result:
    """Where the changes go: a LoRA beside each layer, or into its weight. After an error the weights are what they were."""

    def __init__(self, model: nn.Module, merged: bool) -> None:
        self.model, self.merged = model, merged
        self.facts: dict[str, dict[str, Any]] = {}
        self._written: list[tuple[nn.Module, Mapping[str, Tensor | None]]] = []
        self._lost = self._changed = 0.0

    def __enter__(self) -> "_Result":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None:
            for plain, values in reversed(self._written):
                kinds.write(plain, values)
            return
        if self.merged:
            join_fused(self.model)
        if self._lost > 0.04 * self._changed > 0:
            log.warning(
                "Merging lost %.0f %% of the change to rounding; compose on a float32 base to keep it.",
                100 * (self._lost / self._changed) ** 0.5,
            )

    def put(self, path: str, change: Change, rank: int | None = None) -> None:
        """One layer's; of this rank, if one is given."""
        plain = self.model.get_submodule(path)
        if rank is not None:
            change = _compressed(change, rank, self.facts[path])
        if not self.merged:
            _put(self.model, path, plain, change, self.facts[path])
            return
        values, lost, changed = _folded(plain, change, path)
        self._lost, self._changed = self._lost + lost, self._changed + changed
        self._written.append((plain, values))


def _compressed(result: Change, rank: int, facts: dict[str, Any]) -> Product:
    s = result.spectrum.S
    small = truncated(result, rank)
    whole = float(s.norm())
    facts["error"] = float(s[rank:].norm()) / whole if whole else 0.0
    return small


@torch.no_grad()
def _folded(
    plain: nn.Module, result: Change, path: str
) -> tuple[Mapping[str, Tensor | None], float, float]:
    """Write W + D; returns what was there, and the squares of what rounding took and of the whole change."""
    dtype = kinds.dtype(plain)
    before = kinds.dense(plain, torch.promote_types(torch.float32, dtype))
    exact = before + result.dense()
    rounded = exact.to(dtype)
    if not torch.isfinite(rounded).all():
        raise UserError(
            f"{path}: the merged weight is not finite in {dtype}; compose on a float32 base."
        )
    lost = float((rounded.to(exact.dtype) - exact).double().square().sum())
    return (
        kinds.write(plain, {"weight": kinds.stored(plain, exact)}),
        lost,
        float((exact - before).double().square().sum()),
    )


@torch.no_grad()
def _put(
    model: nn.Module, path: str, plain: nn.Module, result: Change, facts: dict[str, Any]
) -> None:
    """A LoRA with these factors, of scale 1."""
    if not isinstance(result, Product):
        raise UserError(
            f"The result at {path} is no product of small factors; make it one with a rank, an energy or an error, or merge it into "
            f"the base."
        )
    if not result.rank:
        return
    if not (torch.isfinite(result.U).all() and torch.isfinite(result.V).all()):
        raise UserError(f"The result at {path} is not finite; look at the adapters.")
    with torch.random.fork_rng(devices=[]):
        layer = LoRA(
            plain, rank=1, alpha=1.0
        )  # the file states the rank of each layer, and alpha / rank is 1
    layer.A.data, layer.B.data = (
        result.V.to(layer.A).contiguous(),
        result.U.to(layer.B).contiguous(),
    )
    layer.requires_grad_(False)
    replace_layer(model, plain, layer)
    facts["rank"] = result.rank


@contextmanager
def _restored(
    model: nn.Module, described: Sequence[Mapping[str, Any]], others: str
) -> Iterator[None]:
    """Modules trained whole have the base's values again after an error, or if they are to be left out."""
    names = {name for one in described for name in one["trained_modules"]}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {tensors[name]: tensors[name].detach().clone() for name in names & tensors.keys()}
    dropped = others == "drop"
    try:
        yield
    except BaseException:
        dropped = True
        raise
    finally:
        if dropped:
            with torch.no_grad():
                for tensor, value in before.items():
                    tensor.copy_(value)
                    tensor.requires_grad_(False)


def _put_others(
    model: nn.Module,
    folders: Sequence[Path],
    described: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    others: Others,
) -> None:
    """Modules that were trained whole: loading wrote the last adapter's over the base's, whoever is asked for."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = dict.fromkeys(name for one in described for name in one["trained_modules"])
    if not names:
        return
    found: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in names}
    for folder, one, weight in zip(folders, described, weights, strict=True):
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            for name in one["trained_modules"]:
                found[name].append((abs(weight), stored.get_tensor(one["tied"].get(name, name))))
    with torch.no_grad():
        for name, values in found.items():
            if others == "average" and values[0][1].is_floating_point():
                whole = sum(weight for weight, _ in values) or 1.0
                value = sum(
                    (weight / whole * v.double() for weight, v in values),
                    torch.zeros((), dtype=torch.float64),
                )
            else:
                value = values[0][1]
            tensors[name].copy_(value)


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """What happened to the layers, in a line or two for the terminal."""
    layers = report["layers"]
    relative = [[r for r in facts["relative"] if r is not None] for facts in layers.values()]
    flat = [r for some in relative for r in some]
    if flat:
        yield f"|D| / |W| of the adapters: {min(flat):.1e} to {max(flat):.1e}"
    interference = [facts["interference"] for facts in layers.values()]
    if interference:
        yield f"interference: mean {sum(interference) / len(interference):+.4f}, {min(interference):+.4f} to {max(interference):+.4f}"
    for name, words in (
        ("from_sum", "distance from the weighted sum"),
        ("error", "error of the compression"),
    ):
        values = [facts[name] for facts in layers.values() if name in facts]
        if any(values):
            yield f"{words}, relative: mean {sum(values) / len(values):.4f}, largest {max(values):.4f}"
    ranks = [facts["rank"] for facts in layers.values() if "rank" in facts]
    if ranks:
        yield f"ranks: {min(ranks)} to {max(ranks)} on {len(ranks)} layers"


def to_json(report: Mapping[str, Any]) -> str:
    """The report as text."""
    return json.dumps(report, indent=2) + "\n"
