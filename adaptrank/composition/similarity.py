"""Pairwise similarity and interference of adapters, layer by layer."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from adaptrank.composition.changes import Change, inner


@dataclass(frozen=True)
class PairMeasures:
    """Measures of two adapters' changes of one layer.

    Args:
        cos: <D_1, D_2> / (|D_1| |D_2|).
        product: <D_1, D_2>.
        square_1: |D_1|^2.
        square_2: |D_2|^2.
        entries: m n.
        one_start: m r, with the smaller rank r.
        left: overlap of the column spaces.
        right: overlap of the row spaces.
        conflict: share of conflicting signs, or None if it was not counted.
    """

    cos: float
    product: float
    square_1: float
    square_2: float
    entries: int
    one_start: int
    left: float
    right: float
    conflict: float | None


class Similarity:
    """Take the changes of one layer after the other, and sum up.

    No two layers need be in memory together. For a pair of adapters, over the layers that both
    change, with c = <D_1, D_2> / (|D_1| |D_2|):

    - rms_cos: sqrt(mean of c^2), the main figure. (We could not read a formula in arXiv:2508.11985.
      This one is ours.)
    - signed_mean: mean of c. Squares hide that changes cancel.
    - global_cos: sum of <D_1, D_2> over sqrt(sum |D_1|^2 sum |D_2|^2).
    - null: sqrt(mean 1 / (m n)), the rms_cos of independent random changes.
    - null_one_start: sqrt(mean 1 / (m r)), the rms_cos of two LoRAs that start from the same A and
      learn independent B. It is the larger of the two by far, so that adapters of one seed are
      never as orthogonal as random changes.
    - left_overlap, right_overlap: |U_1^T U_2|^2 / min(r_1, r_2) of orthonormal bases of the column
      spaces and of the row spaces, from 0 to 1, mean over layers. Changes may have cosine 0 and
      overlap 1. A right overlap near 1 comes from one start.
    - norm_ratio: |D_1| / |D_2| over all layers.
    - sign_conflict: fraction with opposite signs of the entries that are among the largest fifth of
      both changes. It takes (m, n) matrices, and is left out unless asked for.

    For a layer: |D_i|, |D_i| / |W|, and the interference 1 - |sum D|^2 / sum |D|^2. It is 0 where
    changes are orthogonal, negative where they add up, and 1 where they cancel.

    Args:
        names: names of the adapters.
        signs: whether to count conflicts of signs.
    """

    def __init__(self, names: Sequence[str], signs: bool = False) -> None:
        self.names, self.signs = list(names), signs
        self.layers: dict[str, dict[str, Any]] = {}
        self._pairs: dict[tuple[int, int], list[PairMeasures]] = {
            pair: [] for pair in combinations(range(len(names)), 2)
        }

    def add(
        self, key: str, changes: Sequence[Change | None], weight_norm: float | None = None
    ) -> None:
        """Take the changes of one layer.

        Args:
            key: path of the layer.
            changes: one for each adapter, None for an adapter that does not change the layer.
            weight_norm: |W|.
        """
        present = {i: change for i, change in enumerate(changes) if change is not None}
        squares = {i: inner(change, change) for i, change in present.items()}
        norms = {i: math.sqrt(max(0.0, square)) for i, square in squares.items()}
        products = {(i, j): inner(present[i], present[j]) for i, j in combinations(present, 2)}
        all_norms = [norms.get(i) for i in range(len(changes))]
        cosines: dict[str, float] = {}
        self.layers[key] = {
            "norm": all_norms,
            "relative": [_ratio(norm, weight_norm) for norm in all_norms],
            "interference": _interference(squares.values(), products.values()),
            "cos": cosines,
        }
        for (i, j), product in products.items():
            length = norms[i] * norms[j]
            if not length:
                # A zero change has no direction.
                continue
            cosines[f"{self.names[i]} + {self.names[j]}"] = product / length
            measures = _measure_pair(
                present[i], present[j], product, squares[i], squares[j], length, self.signs
            )
            self._pairs[i, j].append(measures)

    def report(self) -> dict[str, Any]:
        """Return all figures as JSON-able data."""
        pairs: list[dict[str, Any]] = []
        for (i, j), layers in self._pairs.items():
            names = [self.names[i], self.names[j]]
            pairs.append({"adapters": names, "layers": len(layers), **_sum_up(layers)})
        figures = [pair["rms_cos"] for pair in pairs if "rms_cos" in pair]
        return {
            "adapters": self.names,
            "rms_cos": _mean(figures) if figures else None,
            "pairs": pairs,
            "layers": self.layers,
        }


def _ratio(norm: float | None, weight_norm: float | None) -> float | None:
    return norm / weight_norm if norm is not None and weight_norm else None


def _interference(squares: Iterable[float], products: Iterable[float]) -> float:
    """Return 1 - |sum D|^2 / sum |D|^2, from the squares |D_i|^2 and the products <D_i, D_j>."""
    sum_of_squares = sum(squares)
    square_of_sum = sum_of_squares + 2 * sum(products)
    return 1 - square_of_sum / sum_of_squares if sum_of_squares else 0.0


def _measure_pair(
    a: Change,
    b: Change,
    product: float,
    square_1: float,
    square_2: float,
    length: float,
    signs: bool,
) -> PairMeasures:
    m, n = a.shape
    left, right, rank = _overlap(a, b)
    return PairMeasures(
        cos=product / length,
        product=product,
        square_1=square_1,
        square_2=square_2,
        entries=m * n,
        one_start=m * rank,
        left=left,
        right=right,
        conflict=sign_conflict(a, b) if signs else None,
    )


def _sum_up(layers: Sequence[PairMeasures]) -> dict[str, float]:
    """Return the figures of one pair over its layers."""
    if not layers:
        return {}
    square_1 = sum(layer.square_1 for layer in layers)
    square_2 = sum(layer.square_2 for layer in layers)
    product = sum(layer.product for layer in layers)
    figures = {
        "rms_cos": math.sqrt(_mean([layer.cos * layer.cos for layer in layers])),
        "signed_mean": _mean([layer.cos for layer in layers]),
        "global_cos": product / math.sqrt(square_1 * square_2),
        "null": math.sqrt(_mean([1 / layer.entries for layer in layers])),
        "null_one_start": math.sqrt(_mean([1 / layer.one_start for layer in layers])),
        "left_overlap": _mean([layer.left for layer in layers]),
        "right_overlap": _mean([layer.right for layer in layers]),
        "norm_ratio": math.sqrt(square_1 / square_2),
    }
    conflicts = [layer.conflict for layer in layers if layer.conflict is not None]
    if conflicts:
        figures["sign_conflict"] = _mean(conflicts)
    return figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _overlap(a: Change, b: Change) -> tuple[float, float, int]:
    """Return the overlaps of column spaces and of row spaces, and the smaller rank."""
    (U1, V1), (U2, V2) = _bases(a), _bases(b)
    rank = max(1, min(U1.shape[1], U2.shape[1]))
    left = float((U1.T @ U2).square().sum()) / rank
    right = float((V1 @ V2.T).square().sum()) / rank
    return left, right, rank


def _bases(change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """Return orthonormal bases of the column space (m, r) and the row space (r, n).

    The rank r is counted down to machine precision.
    """
    spectrum = change.spectrum
    S = spectrum.S
    tolerance = max(change.shape) * torch.finfo(change.like.dtype).eps
    rank = int((tolerance * S[:1].clamp_min(1e-300) < S).sum()) if len(S) else 0
    return spectrum.U[:, :rank], spectrum.Vh[:rank]


def sign_conflict(a: Change, b: Change, share: float = 0.2) -> float:
    """Return the fraction with opposite signs of the entries that are large in both changes.

    Args:
        a: (m, n).
        b: (m, n).
        share: an entry is large if it is among this fraction of the largest entries.
    Returns:
        The fraction, or 0 if no entry is large in both.
    """
    D1, D2 = a.dense(), b.dense()
    count = max(1, round(share * D1.numel()))
    votes = torch.zeros(D1.numel(), dtype=torch.int8)
    for D in (D1, D2):
        largest = D.abs().flatten().topk(count).indices
        votes[largest.cpu()] += 1
    in_both = (votes == 2).nonzero().flatten().to(D1.device)
    opposite = D1.flatten()[in_both].sign() != D2.flatten()[in_both].sign()
    return float(opposite.double().mean()) if len(in_both) else 0.0


_COLUMNS = {
    "rms_cos": "rms cos",
    "null": "null",
    "null_one_start": "one start",
    "signed_mean": "mean cos",
    "left_overlap": "left",
    "right_overlap": "right",
}
"""Figure of a pair -> head of its column."""


def pair_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures of all pairs as a table for the terminal."""
    head = ["pair", "layers", *_COLUMNS.values(), "norms"]
    rows = [head]
    for pair in report["pairs"]:
        name = " + ".join(pair["adapters"])
        if "rms_cos" in pair:
            figures = [f"{pair[figure]:.4f}" for figure in _COLUMNS]
            rows.append([name, str(pair["layers"]), *figures, f"{pair['norm_ratio']:.2f}"])
        else:
            rows.append([name, "0", *["-"] * (len(head) - 2)])
    yield from align(rows)


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines: the first column aligned left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *others]))
    return lines
