"""What the spectrum of a change says: ranks of every kind, size beside the frozen weight, intruder dimensions. Pure.

Every rank measure is scale-free: an update of the form (p q^T - 1) * W has full rank after one step, however small it is. So no rank is
given without |D| / |W|.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrank.composition.changes import Change, Product

TOLERANCES = (1e-2, 1e-3, 1e-5)
"""Relative to the largest singular value, at which ranks are counted."""
COSINES = tuple(round(0.1 * i, 1) for i in range(1, 10))
"""Thresholds of the curve of intruders."""


def numerical_rank(S: Tensor, tolerance: float) -> int:
    """Number of singular values above `tolerance` times the largest."""
    return int((tolerance * S[:1] < S).sum()) if len(S) and float(S[0]) > 0 else 0


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of p_i = s_i / sum s (Roy and Vetterli, 2007); 0 of a zero matrix."""
    p = S[S > 0].double()
    p = p / p.sum()
    return float(torch.exp(-(p * p.log()).sum())) if len(p) else 0.0


def stable_rank(S: Tensor) -> float:
    """sum s^2 / s_1^2."""
    return (
        float(S.double().square().sum() / S[0].double().square())
        if len(S) and float(S[0]) > 0
        else 0.0
    )


def participation_ratio(S: Tensor) -> float:
    """(sum s^2)^2 / sum s^4: at least the stable rank, at most the rank."""
    squares = S.double().square()
    return (
        float(squares.sum().square() / squares.square().sum())
        if len(S) and float(S[0]) > 0
        else 0.0
    )


def energy_rank(S: Tensor, energy: float) -> int:
    """The least k whose k largest singular values have this share of the sum of squares."""
    squares = S.double().square().cumsum(0)
    if not len(S) or float(squares[-1]) == 0:
        return 0
    return int((squares < energy * squares[-1] * (1 - 1e-12)).sum()) + 1


def amplification(change: Change, W: Tensor, rank: int | None = None) -> float:
    """|D| / |U^T W V| over the leading singular vectors of D (LoRA, arXiv:2106.09685, section 7.3)."""
    s = change.spectrum
    k = numerical_rank(s.S, 1e-6) if rank is None else rank
    seen = s.U[:, :k].T @ W.double() @ s.Vh[:k].T
    norm = float(seen.norm())
    return float(s.S[:k].norm()) / norm if norm else math.inf


def intruders(W: Tensor, merged: Tensor, count: int | None = 10) -> Tensor:
    """For each leading left singular vector y_j of W', max_i |<y_j, u_i>| over all left ones of W (arXiv:2410.21228).

    An intruder dimension is one with a low cosine, below 0.5 in the released code. Vectors outside of the span of W's are intruders.

    Args:
        W: frozen weight (m, n).
        merged: W' (m, n).
        count: of leading vectors; None is all.
    Returns:
        (count,) cosines.
    """
    U = torch.linalg.svd(W, full_matrices=False).U
    return _cosines(U, torch.linalg.svd(merged, full_matrices=False).U, count)


def _cosines(U: Tensor, Y: Tensor, count: int | None) -> Tensor:
    found: Tensor = (U.T @ Y[:, :count]).abs().amax(0)
    return found


def captured_energy(change: Change, V: Tensor) -> float:
    """Share of |D|^2 in a space of inputs: |D V|^2 / |D|^2, with orthonormal columns V (n, r); r / n of a random space.

    With the leading right singular vectors of W it is what PiCa's claim is about (arXiv:2505.20211).
    """
    projected = (
        change.U @ (change.V @ V.to(change.V))
        if isinstance(change, Product)
        else change.D @ V.to(change.D)
    )
    whole = change.norm() ** 2
    return float(projected.double().square().sum()) / whole if whole else 0.0


def diagnose(
    change: Change, W: Tensor, find_intruders: bool = True, count: int = 10, cosine: float = 0.5
) -> dict[str, Any]:
    """All of them for one layer, as JSON-able data.

    Args:
        change: D = W' - W, (m, n).
        W: frozen weight (m, n), in float32 or better.
        find_intruders: takes two singular value decompositions of (m, n) matrices, most of the time.
        count: leading vectors that are looked at.
        cosine: below it a vector is an intruder.
    """
    S = change.spectrum.S
    m, n = change.shape
    least = min(m, n)
    machine = max(m, n) * torch.finfo(torch.float32).eps
    found: dict[str, Any] = {
        "shape": [m, n],
        "norm": change.norm(),
        "relative": change.norm() / float(W.norm()) if float(W.norm()) else None,
        "tolerance": machine,
        "rank": numerical_rank(S, machine),
        "rank_share": {f"{t:g}": numerical_rank(S, t) / least for t in TOLERANCES},
        "effective_rank": effective_rank(S),
        "stable_rank": stable_rank(S),
        "participation": participation_ratio(S),
        "energy_rank": {str(e): energy_rank(S, e) for e in (0.9, 0.99)},
        "spectrum": S[:64].tolist(),
    }
    if not float(S[:1].sum()):
        return found
    found["amplification"] = amplification(change, W)
    if find_intruders:
        U, values, Vh = torch.linalg.svd(W, full_matrices=False)
        Y, after, _ = torch.linalg.svd(W + change.dense().to(W), full_matrices=False)
        cosines = _cosines(U, Y, None)
        largest = float(values[0])
        r = min(found["rank"], len(Vh))
        best = float(S[:r].square().sum() / S.square().sum())
        found |= {
            "relative_spectral": float(S[0]) / largest if largest else None,
            "intruders": int((cosines[:count] < cosine).sum()),
            "intruder_curve": {
                "count": {f"{c}": int((cosines[:count] < c).sum()) for c in COSINES},
                "all": {f"{c}": int((cosines < c).sum()) for c in COSINES},
            },
            "spectrum_moved": float((after - values).abs().max()) / largest if largest else None,
            # Of as many leading directions of W as the change has rank, against a random space and the best one.
            "captured": {
                "leading": captured_energy(change, Vh[:r].T),
                "random": r / n,
                "best": best,
            },
        }
    return found


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
"""What a table shows: name, head, format. "energy" is the rank of 99 % of the energy, "share" the rank at 1e-3 over min(m, n)."""


def summed_up(
    layers: Mapping[str, Mapping[str, Any]], kinds: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Kind of layer -> mean of each column over its layers, "all" the last."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for path, facts in layers.items():
        groups.setdefault(kinds[path], []).append(facts)
    groups["all"] = list(layers.values())
    return {
        kind: {name: _mean(name, group) for name, _, _ in COLUMNS} | {"layers": len(group)}
        for kind, group in groups.items()
    }


def _mean(name: str, group: Iterable[Mapping[str, Any]]) -> float:
    values = [_value(name, facts) for facts in group]
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else math.nan


def _value(name: str, facts: Mapping[str, Any]) -> float | None:
    if name == "energy":
        return float(facts["energy_rank"]["0.99"])
    if name == "share":
        return float(facts["rank_share"]["0.001"])
    value = facts.get(name)
    return None if value is None else float(value)


def lines(summary: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table for the terminal."""
    rows = [["", "layers", *(head for _, head, _ in COLUMNS)]]
    for kind, means in summary.items():
        cells = [
            format(means[name], spec) if means[name] == means[name] else "-"
            for name, _, spec in COLUMNS
        ]
        rows.append([kind, f"{means['layers']:.0f}", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
