"""How several adapters lie to each other, layer by layer: what composition reports. Pure."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch

from adaptrank.composition.changes import Change, Product, inner

Layers = Mapping[str, Sequence[Change | None]]
"""Layer -> the change of each adapter, None where it has none."""


class Similarity:
    """Takes one layer after the other, so that no two of them need be in memory, and sums up.

    Of a pair of adapters and a layer that both change, with c = <D_1, D_2> / (|D_1| |D_2|):

    - rms_cos: sqrt(mean of c^2) over the layers, the headline (arXiv:2508.11985 does not state its formula where we could read
      it: this is ours); signed mean: mean of c, since squares hide that changes cancel;
    - global_cos: sum of <D_1, D_2> over sqrt(sum |D_1|^2 sum |D_2|^2);
    - null: sqrt(mean 1 / (m n)), what rms_cos is of independent random changes; null with one start: sqrt(mean 1 / (m r)), of two LoRAs
      that start from the same A and learn independent B, the larger of the two by far: adapters of one seed are never as orthogonal;
    - left and right overlap: |U_1^T U_2|^2 / min(r_1, r_2) of orthonormal bases of the outputs and of the inputs, 0 to 1, mean over the
      layers. Changes may have cosine 0 and overlap 1. Right overlap near 1 tells of one start;
    - norm ratio: |D_1| / |D_2|; sign conflict: of the entries that are among the largest fifth of both, the share with opposite signs. It
      takes (m, n) matrices, and is left out unless asked for.

    Of a layer: |D_i|, |D_i| / |W|, and interference 1 - |sum D|^2 / sum |D|^2: 0 where changes are orthogonal, below where they add, 1 where they cancel.
    """

    def __init__(self, names: Sequence[str], signs: bool = False) -> None:
        self.names, self.signs = list(names), signs
        self.layers: dict[str, dict[str, Any]] = {}
        self._pairs: dict[tuple[int, int], list[dict[str, float]]] = {
            pair: [] for pair in combinations(range(len(names)), 2)
        }

    def add(
        self, key: str, changes: Sequence[Change | None], weight_norm: float | None = None
    ) -> None:
        """The changes of one layer, and |W|."""
        there = [(i, change) for i, change in enumerate(changes) if change is not None]
        squares = {i: inner(change, change) for i, change in there}
        norms = {i: math.sqrt(max(0.0, square)) for i, square in squares.items()}
        products = {(i, j): inner(a, b) for (i, a), (j, b) in combinations(there, 2)}
        whole = sum(squares.values())
        together = whole + 2 * sum(products.values())
        self.layers[key] = {
            "norm": [norms.get(i) for i in range(len(changes))],
            "relative": [
                norms[i] / weight_norm if i in norms and weight_norm else None
                for i in range(len(changes))
            ],
            "interference": 1 - together / whole if whole else 0.0,
        }
        found = dict(there)
        cosines = self.layers[key]["cos"] = {}
        for (i, j), product in products.items():
            length = norms[i] * norms[j]
            if not length:
                continue  # a change of nothing has no direction
            cosines[f"{self.names[i]} + {self.names[j]}"] = product / length
            self._pairs[i, j].append(
                _pair(
                    found[i],
                    found[j],
                    product / length,
                    product,
                    squares[i],
                    squares[j],
                    self.signs,
                )
            )

    def report(self) -> dict[str, Any]:
        """All of it, as JSON-able data."""
        pairs = []
        for (i, j), layers in self._pairs.items():
            mean = (
                {name: sum(one[name] for one in layers) / len(layers) for name in layers[0]}
                if layers
                else {}
            )
            squares = [sum(one[name] for one in layers) for name in ("square_1", "square_2")]
            entry: dict[str, Any] = {
                "adapters": [self.names[i], self.names[j]],
                "layers": len(layers),
            }
            if layers:
                entry |= {
                    "rms_cos": math.sqrt(mean["cos2"]),
                    "signed_mean": mean["cos"],
                    "global_cos": sum(one["product"] for one in layers)
                    / math.sqrt(squares[0] * squares[1]),
                    "null": math.sqrt(mean["null"]),
                    "null_one_start": math.sqrt(mean["null_one_start"]),
                    "left_overlap": mean["left"],
                    "right_overlap": mean["right"],
                    "norm_ratio": math.sqrt(squares[0] / squares[1]),
                }
                if self.signs:
                    entry["sign_conflict"] = mean["conflict"]
            pairs.append(entry)
        means = [pair["rms_cos"] for pair in pairs if "rms_cos" in pair]
        return {
            "adapters": self.names,
            "rms_cos": sum(means) / len(means) if means else None,
            "pairs": pairs,
            "layers": self.layers,
        }


def _pair(
    a: Change, b: Change, cos: float, product: float, square_1: float, square_2: float, signs: bool
) -> dict[str, float]:
    m, n = a.shape
    left, right, rank = _overlap(a, b)
    found = {
        "cos": cos,
        "cos2": cos * cos,
        "product": product,
        "square_1": square_1,
        "square_2": square_2,
        "null": 1 / (m * n),
        "null_one_start": 1 / (m * rank),
        "left": left,
        "right": right,
    }
    if signs:
        found["conflict"] = sign_conflict(a, b)
    return found


def _overlap(a: Change, b: Change) -> tuple[float, float, int]:
    """Of the spaces that the changes reach and read, and the smaller of their dimensions."""
    (U1, V1), (U2, V2) = (_bases(change) for change in (a, b))
    rank = max(1, min(U1.shape[1], U2.shape[1]))
    return float((U1.T @ U2).square().sum()) / rank, float((V1 @ V2.T).square().sum()) / rank, rank


def _bases(change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases of the column space (m, r) and the row space (r, n), up to rounding."""
    s = change.spectrum
    like = change.U if isinstance(change, Product) else change.D
    tolerance = max(change.shape) * torch.finfo(like.dtype).eps
    kept = int((tolerance * s.S[:1].clamp_min(1e-300) < s.S).sum()) if len(s.S) else 0
    return s.U[:, :kept], s.Vh[:kept]


def sign_conflict(a: Change, b: Change, share: float = 0.2) -> float:
    """Of the entries among the largest `share` of both, the fraction with opposite signs; 0 where there is none."""
    D1, D2 = a.dense(), b.dense()
    count = max(1, round(share * D1.numel()))
    large = [D.abs().flatten().topk(count).indices for D in (D1, D2)]
    both = torch.zeros(D1.numel(), dtype=torch.int8)
    for index in large:
        both[index.cpu()] += 1
    at = (both == 2).nonzero().flatten().to(D1.device)
    opposite = D1.flatten()[at].sign() != D2.flatten()[at].sign()
    return float(opposite.double().mean()) if len(at) else 0.0


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report of the pairs as a table for the terminal."""
    head = ["pair", "layers", "rms cos", "null", "one start", "mean cos", "left", "right", "norms"]
    rows = [head]
    for pair in report["pairs"]:
        name = " + ".join(pair["adapters"])
        if "rms_cos" not in pair:
            rows.append([name, "0", *["-"] * (len(head) - 2)])
            continue
        rows.append(
            [
                name,
                str(pair["layers"]),
                *(
                    f"{pair[k]:.4f}"
                    for k in (
                        "rms_cos",
                        "null",
                        "null_one_start",
                        "signed_mean",
                        "left_overlap",
                        "right_overlap",
                    )
                ),
                f"{pair['norm_ratio']:.2f}",
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    for row in rows:
        yield "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
