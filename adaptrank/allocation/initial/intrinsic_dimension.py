"""Pure: points -> their intrinsic dimension.

`scikit-dimension` 0.5.0 has the same estimator, and was tried first. It agrees on clean data, but it takes distances from the matrix
product of uncentred points, in which copies of a point are 1e-8 apart rather than 0: with 300 of 1000 points of dimension 5 given twice
it answers 0.11. Activations of quantized models, and of data with repeated rows, are such points. It also brings numba, llvmlite and
matplotlib, some 280 MB, for a sort and a slope.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError


def two_nn(points: Tensor, method: Literal["slope", "mle"] = "slope") -> float:
    """TwoNN: the dimension d of points (N, D), from the distances r1 <= r2 of each to its two nearest neighbours.

    mu = r2 / r1 has the distribution F(mu) = 1 - mu^-d, whatever the density, as long as that is constant up to the second neighbour. The
    slope is that of -log(1 - F) against log mu, a line through the origin, with F = k / N at the k-th smallest mu and the largest tenth
    of them left out; the maximum-likelihood estimate is N / sum log mu over all. Copies of a point, those nearer than a millionth of the
    points' spread, count once: rounding makes copies of one example differ in their last bits. Everything is computed in float64,
    in O(N^2 D) time and O(N^2) memory.

    High dimensions come out too low: 20 of N = 2000 Gaussian points as 17, of N = 300 as 16.

    Source: Facco, d'Errico, Rodriguez and Laio, Estimating the intrinsic dimension of datasets by a minimal neighborhood information,
    Scientific Reports 2017, doi:10.1038/s41598-017-11873-y (abstract read, and the estimator as scikit-dimension has it).
    Raises:
        ValueError: if fewer than three points differ, or all are equally far apart.
    """
    x = points.detach().double()
    x = x - x.mean(0)  # or the products below would lose what the points differ by
    norms = x.square().sum(1)
    squares = (norms[:, None] + norms - 2 * x @ x.T).clamp_(min=0)
    copies = squares <= 1e-12 * norms.mean()
    again = copies.tril_(-1).any(1)  # of an earlier point
    squares = squares[~again][:, ~again]
    if len(squares) < 3:
        raise UserError(
            f"An intrinsic dimension needs three points that differ; {len(squares)} of these {len(x)} do. Give more, or other, data."
        )
    squares.fill_diagonal_(math.inf)
    nearest = squares.topk(2, largest=False).values
    logs = (nearest[:, 1] / nearest[:, 0]).log().sort().values / 2
    total = len(logs)
    if method == "mle":
        over, under = float(total), float(logs.sum())
    else:
        kept = max(2, int(0.9 * total))
        logs = logs[:kept]
        heights = -(1 - torch.arange(1, kept + 1, dtype=x.dtype, device=x.device) / total).log()
        over, under = float(logs @ heights), float(logs @ logs)
    if under == 0:
        raise UserError(
            "All points are equally far from their two nearest neighbours, so they tell no dimension."
        )
    return over / under
