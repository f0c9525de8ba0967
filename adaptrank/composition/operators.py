"""Operators: several changes of one weight and their weights -> one change.

Operators are pure and deterministic, and work in delta space. Working on factors entry by entry
would depend on how a product is factored. Operators that look at entries form the (m, n) matrices
of one layer at a time.

Some trim: of the entries of a change only the largest stay. They do so over the `whole` task
vector, which is all layers of one task together, or `layer` by layer. In the first case `whole`
holds the part of the layer, from `whole_trims`. Without it the layer is the whole task vector.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.composition.changes import Change, Dense, Product, total
from adaptrank.composition.election import balance, elected_signs, mean_of_elected
from adaptrank.composition.shared_basis import shared_blocks
from adaptrank.composition.trimming import LayerTrim, kept_of, largest

Operator = Callable[..., Change]
"""(changes, weights, key, **options) -> change. `key` names the layer, for random numbers."""

Trim = Literal["whole", "layer"]
"""Over which entries a change is trimmed: those of all layers of the task, or of each layer."""


def add(changes: Sequence[Change], weights: Sequence[float], key: str = "") -> Change:
    """Return sum_i w_i D_i, exactly (task arithmetic, arXiv:2212.04089; LoRAs: arXiv:2508.11985).

    Factors of products are put side by side.
    """
    return total(changes, weights)


def magnitude_prune(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    density: float = 0.2,
    trim: Trim = "layer",
    whole: LayerTrim | None = None,
) -> Change:
    """Return sum_i w_i trim(D_i), where trim keeps the largest entries.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        density: fraction of the entries of each change that stays, in (0, 1].
        trim: "layer" or "whole".
        whole: the layer's part of a trim over all layers.
    """
    _check(density=density, trim=trim)
    return _weighted_sum(_trimmed([change.dense() for change in changes], density, whole), weights)


def ties(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    density: float = 0.2,
    trim: Trim = "whole",
    scale: float = 1.0,
    elect: Literal["total", "frequency"] = "total",
    normalize: Literal["count", "weights"] = "count",
    whole: LayerTrim | None = None,
) -> Change:
    """TIES (arXiv:2306.01708): trim, elect a sign for each entry, average the entries that agree.

    With weights of 1 the result is a mean, not a sum. For two changes that share no entry it equals
    the sum, and for two equal changes it equals one of them. An entry
    whose weighted sum is zero takes the sign that most entries of the whole vector have. If both
    signs are equally frequent, it is negative. (The released code keeps one entry more where
    density times the size is a whole number, and all entries equal to the smallest that stays.)

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        density: fraction of the entries of each change that stays, in (0, 1].
        trim: "whole", as released, or "layer".
        scale: lambda, a factor of the result.
        elect: the sign of the weighted sum, or of most changes, + in a draw (as in HF PEFT).
        normalize: divide by the number of changes that agree, or by the sum of their |weights|.
        whole: the layer's part of a trim over all layers.
    """
    _check(density=density, trim=trim, elect=elect, normalize=normalize)
    trimmed = _trimmed([change.dense() for change in changes], density, whole)
    return _elected(trimmed, weights, scale, elect, normalize, whole)


def dare(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    drop: float = 0.5,
    seed: int = 0,
) -> Change:
    """DARE (arXiv:2311.03099): sum_i w_i M_i D_i / (1 - drop), with a random mask M_i.

    The mean over seeds is the sum.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        drop: probability that an entry is dropped, in [0, 1).
        seed: seed of the masks. Each change and each layer has a mask of its own.
    """
    _check(drop=drop)
    return _weighted_sum(_dropped(changes, key, drop, seed), weights)


def dare_ties(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    drop: float = 0.5,
    seed: int = 0,
    density: float = 1.0,
    trim: Trim = "whole",
    scale: float = 1.0,
    elect: Literal["total", "frequency"] = "total",
    normalize: Literal["count", "weights"] = "count",
    whole: LayerTrim | None = None,
) -> Change:
    """DARE, then TIES. Nothing is trimmed by default, as in KnOTS' DARE-TIES.

    DARE's own release trims as well: density=0.2.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        drop: as in `dare`.
        seed: as in `dare`.
        density: fraction of the entries, dropped ones included, that stays, in (0, 1].
        trim: as in `ties`.
        scale: as in `ties`.
        elect: as in `ties`.
        normalize: as in `ties`.
        whole: the layer's part of a trim over all layers.
    """
    _check(drop=drop, density=density, trim=trim, elect=elect, normalize=normalize)
    trimmed = _trimmed(_dropped(changes, key, drop, seed), density, whole)
    return _elected(trimmed, weights, scale, elect, normalize, whole)


def knots(
    changes: Sequence[Change],
    weights: Sequence[float],
    key: str = "",
    within: Literal["ties", "dare_ties", "magnitude_prune", "dare", "sum"] = "ties",
    cut: float = 1e-9,
    whole: LayerTrim | None = None,
    **options: Any,
) -> Change:
    """KnOTS (arXiv:2410.19735): apply another operator in the basis that all changes share.

    [D_1 ... D_N] = U S [V_1 ... V_N]^T gives blocks X_i = S V_i^T. The result is U X, where X is
    the other operator's result for the blocks. With the sum, the result is the sum. Products form
    no (m, n) matrix, only the blocks, (R, n) each, where R is the sum of the ranks. A whole task
    vector has the blocks of all layers.

    Args:
        changes: of one layer.
        weights: one for each change.
        key: path of the layer.
        within: operator on the blocks.
        cut: singular values below this fraction of the largest are dropped. (The released code
            drops those below 1e-5 absolute.)
        whole: the layer's part of a trim over all layers.
        options: of that operator.
    """
    _check_within(within)
    U, blocks = shared_blocks(changes, cut)
    if not U.shape[1]:
        return total(changes, weights)
    if whole is not None:
        options["whole"] = whole
    merged = OPERATORS[within]([Dense(X) for X in blocks], weights, key, **options)
    return Product(U, merged.dense())


OPERATORS: Mapping[str, Operator] = {
    "sum": add,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "magnitude_prune": magnitude_prune,
    "knots": knots,
}
"""Operators by name."""


def options_of(operator: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of an operator: the given ones, and the defaults of the others.

    Raises:
        ValueError: for an option that the operator does not have, or a value out of range.
    """
    defaults = _defaults(operator)
    if operator == "knots":
        defaults |= _defaults(_check_within(values.get("within", defaults["within"])))
    for name in values:
        if name not in defaults:
            raise UserError(
                f"{operator} has no option {name!r}; it has {', '.join(defaults) or 'none'}."
            )
    options = {**defaults, **values}
    _check(**options)
    return options


def _defaults(operator: str) -> dict[str, Any]:
    """Return an operator's options with their defaults."""
    parameters = inspect.signature(OPERATORS[operator]).parameters
    return {
        name: parameter.default
        for name, parameter in parameters.items()
        if name not in ("changes", "weights", "key", "whole", "options")
    }


def task_matrices(
    operator: str, changes: Sequence[Change], key: str, options: Mapping[str, Any]
) -> list[Tensor]:
    """Return the matrices that an operator trims, one for each change of a layer.

    They are the changes, the entries that DARE leaves of them, or their blocks in KnOTS' basis.
    """
    if operator == "knots":
        _, blocks = shared_blocks(changes, options["cut"])
        return task_matrices(options["within"], [Dense(X) for X in blocks], key, options)
    if "drop" in options:
        return _dropped(changes, key, options["drop"], options["seed"])
    return [change.dense() for change in changes]


def _weighted_sum(matrices: Sequence[Tensor], weights: Sequence[float]) -> Dense:
    result = torch.zeros_like(matrices[0])
    for matrix, weight in zip(matrices, weights, strict=True):
        result.add_(matrix, alpha=weight)
    return Dense(result)


def _trimmed(matrices: Sequence[Tensor], density: float, whole: LayerTrim | None) -> list[Tensor]:
    """Zero all but the largest entries of each matrix."""
    if whole is None:
        kept = [kept_of(D.numel(), density) for D in matrices]
    else:
        kept = list(whole.kept)
    return [largest(D, count) for D, count in zip(matrices, kept, strict=True)]


def _elected(
    matrices: Sequence[Tensor],
    weights: Sequence[float],
    scale: float,
    how: str,
    normalize: str,
    whole: LayerTrim | None,
) -> Dense:
    """Elect a sign for each entry, and average the weighted entries that have it."""
    signs = elected_signs(matrices, weights, how)
    undecided = balance(signs) if whole is None else whole.balance
    return Dense(mean_of_elected(matrices, weights, signs, undecided, scale, normalize))


def _dropped(changes: Sequence[Change], key: str, drop: float, seed: int) -> list[Tensor]:
    """Zero random entries of each change, and scale the others by 1 / (1 - drop)."""
    dropped = []
    for position, change in enumerate(changes):
        D = change.dense()
        digest = hashlib.blake2b(f"{seed}/{position}/{key}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        kept = torch.rand(D.shape, generator=generator).to(D.device) >= drop
        dropped.append(D * kept / (1 - drop))
    return dropped


CHOICES = {
    "trim": ("whole", "layer"),
    "elect": ("total", "frequency"),
    "normalize": ("count", "weights"),
}
"""Option -> its values."""


def _check(**options: Any) -> None:
    """Refuse values out of range."""
    for name, allowed in CHOICES.items():
        if name in options:
            _one_of(name, options[name], allowed)
    density, drop = options.get("density", 1.0), options.get("drop", 0.0)
    if not 0 < density <= 1:
        raise UserError(f"density={density}: above 0, and at most 1.")
    if not 0 <= drop < 1:
        raise UserError(f"drop={drop}: a probability of at least 0 and below 1.")


def _check_within(within: str) -> str:
    _one_of("within", within, tuple(name for name in OPERATORS if name != "knots"))
    return within


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name}={value!r}: one of {', '.join(allowed)}.")
