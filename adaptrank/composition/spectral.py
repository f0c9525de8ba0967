"""Spectral measures of a change: ranks, size beside the frozen weight, intruder dimensions.

Every rank measure is scale-free. An update of the form (p q^T - 1) * W has full rank after one
step, however small it is. So no rank is given without |D| / |W|.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank.composition.changes import Change, Product
from adaptrank.composition.similarity import align

TOLERANCES = (1e-2, 1e-3, 1e-5)
"""Fractions of the largest singular value at which ranks are counted."""

COSINES = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Thresholds of the curve of intruders."""

MOST_VALUES = 64
"""Number of leading singular values that a report lists."""


def numerical_rank(S: Tensor, tolerance: float) -> int:
    """Return the number of singular values above `tolerance` times the largest."""
    return int((tolerance * S[:1] < S).sum()) if _is_nonzero(S) else 0


def effective_rank(S: Tensor) -> float:
    """Return exp of the entropy of p_i = s_i / sum s (Roy and Vetterli, 2007).

    It is 0 for a zero matrix.
    """
    p = S[S > 0].double()
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def stable_rank(S: Tensor) -> float:
    """Return sum s^2 / s_1^2."""
    if not _is_nonzero(S):
        return 0.0
    return float(S.double().square().sum() / S[0].double().square())


def participation_ratio(S: Tensor) -> float:
    """Return (sum s^2)^2 / sum s^4. It is at least the stable rank, and at most the rank."""
    if not _is_nonzero(S):
        return 0.0
    squares = S.double().square()
    return float(squares.sum().square() / squares.square().sum())


def energy_rank(S: Tensor, energy: float) -> int:
    """Return the least k whose k largest singular values have this share of the sum of squares."""
    cumulative = S.double().square().cumsum(0)
    if not len(S) or float(cumulative[-1]) == 0:
        return 0
    return int((cumulative < energy * cumulative[-1] * (1 - 1e-12)).sum()) + 1


def _is_nonzero(S: Tensor) -> bool:
    return len(S) > 0 and float(S[0]) > 0


def amplification(change: Change, W: Tensor, rank: int | None = None) -> float:
    """Return |D| / |U^T W V| over the leading singular vectors of D.

    Source: LoRA, arXiv:2106.09685, section 7.3.

    Args:
        change: D, (m, n).
        W: frozen weight, (m, n).
        rank: number of leading singular vectors. None means the numerical rank of D.
    """
    spectrum = change.spectrum
    k = numerical_rank(spectrum.S, 1e-6) if rank is None else rank
    projected = spectrum.U[:, :k].T @ W.double() @ spectrum.Vh[:k].T
    norm = float(projected.norm())
    return float(spectrum.S[:k].norm()) / norm if norm else math.inf


def intruders(W: Tensor, merged: Tensor, count: int | None = 10) -> Tensor:
    """Return max_i |<y_j, u_i>| for the leading left singular vectors y_j of W' (arXiv:2410.21228).

    The u_i are all left singular vectors of W. An intruder dimension is a y_j with a low cosine,
    below 0.5 in the released code. Vectors outside of the column space of W are intruders.

    Args:
        W: frozen weight, (m, n).
        merged: W', (m, n).
        count: number of leading vectors. None means all.
    Returns:
        (count,) cosines.
    """
    U = torch.linalg.svd(W, full_matrices=False).U
    return _largest_cosines(U, torch.linalg.svd(merged, full_matrices=False).U, count)


def _largest_cosines(U: Tensor, Y: Tensor, count: int | None) -> Tensor:
    cosines: Tensor = (U.T @ Y[:, :count]).abs().amax(0)
    return cosines


def captured_energy(change: Change, V: Tensor) -> float:
    """Return |D V|^2 / |D|^2, the share of a change in a space of inputs.

    In a random space it is r / n. With the leading right singular vectors of W it is the figure of
    PiCa's claim (arXiv:2505.20211).

    Args:
        change: D, (m, n).
        V: orthonormal columns, (n, r).
    """
    if isinstance(change, Product):
        projected = change.U @ (change.V @ V.to(change.V))
    else:
        projected = change.D @ V.to(change.D)
    energy = change.norm() ** 2
    return float(projected.double().square().sum()) / energy if energy else 0.0


def diagnose(
    change: Change, W: Tensor, find_intruders: bool = True, count: int = 10, cosine: float = 0.5
) -> dict[str, Any]:
    """Return all measures of one layer as JSON-able data.

    Args:
        change: D = W' - W, (m, n).
        W: frozen weight (m, n), in float32 or better.
        find_intruders: compare the singular vectors of W and W'. This takes two singular value
            decompositions of (m, n) matrices, which is most of the time.
        count: number of leading vectors that may be intruders.
        cosine: a vector is an intruder below this cosine.
    """
    S = change.spectrum.S
    m, n = change.shape
    smaller = min(m, n)
    machine = max(m, n) * torch.finfo(torch.float32).eps
    weight_norm = float(W.norm())
    measures: dict[str, Any] = {
        "shape": [m, n],
        "norm": change.norm(),
        "relative": change.norm() / weight_norm if weight_norm else None,
        "tolerance": machine,
        "rank": numerical_rank(S, machine),
        "rank_share": {f"{t:g}": numerical_rank(S, t) / smaller for t in TOLERANCES},
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        "participation": participation_ratio(S),
        "energy_rank": {str(energy): energy_rank(S, energy) for energy in (0.9, 0.99)},
        "spectrum": S[:MOST_VALUES].tolist(),
    }
    if not float(S[:1].sum()):
        return measures
    measures["amplification"] = amplification(change, W)
    if find_intruders:
        measures |= _compare_spectra(change, W, measures["rank"], count, cosine)
    return measures


def _compare_spectra(
    change: Change, W: Tensor, rank: int, count: int, cosine: float
) -> dict[str, Any]:
    """Return the measures that take the singular value decompositions of W and W'."""
    S = change.spectrum.S
    n = change.shape[1]
    U, values, Vh = torch.linalg.svd(W, full_matrices=False)
    Y, merged_values, _ = torch.linalg.svd(W + change.dense().to(W), full_matrices=False)
    cosines = _largest_cosines(U, Y, None)
    leading_cosines = cosines[:count]
    largest = float(values[0])
    moved = float((merged_values - values).abs().max())
    # As many leading directions of W as the change has rank, beside a random and the best space.
    r = min(rank, len(Vh))
    return {
        "relative_spectral": float(S[0]) / largest if largest else None,
        "intruders": int((leading_cosines < cosine).sum()),
        "intruder_curve": {
            "count": {f"{c}": int((leading_cosines < c).sum()) for c in COSINES},
            "all": {f"{c}": int((cosines < c).sum()) for c in COSINES},
        },
        "spectrum_moved": moved / largest if largest else None,
        "captured": {
            "leading": captured_energy(change, Vh[:r].T),
            "random": r / n,
            "best": float(S[:r].square().sum() / S.square().sum()),
        },
    }


COLUMNS: Sequence[tuple[str, str, str]] = (
    ("relative", "|D|/|W|", ".1e"),
    ("rank", "rank", ".1f"),
    ("effective_rank", "effective", ".1f"),
    ("stable_rank", "stable", ".1f"),
    ("participation", "particip.", ".1f"),
    ("energy", "99 %", ".1f"),
    ("share", "of full", ".2f"),
    ("intruders", "intruders", ".2f"),
)
"""Columns of a table: measure, head, format.

"energy" is the rank of 99 % of the energy. "share" is the rank at 1e-3 over min(m, n).
"""


def mean_by_kind(
    layers: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Return kind of layer -> the mean of each column over its layers. "all" comes last.

    Args:
        layers: path -> measures of a layer, see `diagnose`.
        kinds: path -> kind of the layer.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for path, measures in layers.items():
        groups.setdefault(kinds[path], []).append(measures)
    groups["all"] = list(layers.values())
    means = {}
    for kind, group in groups.items():
        means[kind] = {name: _mean(name, group) for name, _, _ in COLUMNS}
        means[kind]["layers"] = len(group)
    return means


def _mean(name: str, group: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean of a column over the layers that have it, or NaN if none has."""
    values = [_value(name, measures) for measures in group]
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else math.nan


def _value(name: str, measures: Mapping[str, Any]) -> float | None:
    if name == "energy":
        return float(measures["energy_rank"]["0.99"])
    if name == "share":
        return float(measures["rank_share"]["0.001"])
    value = measures.get(name)
    return None if value is None else float(value)


def spectral_lines(means: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the means of `mean_by_kind` as a table for the terminal."""
    rows = [["", "layers", *(head for _, head, _ in COLUMNS)]]
    for kind, columns in means.items():
        cells = []
        for name, _, form in COLUMNS:
            value = columns[name]
            cells.append("-" if math.isnan(value) else format(value, form))
        rows.append([kind, f"{columns['layers']:.0f}", *cells])
    return align(rows)
