"""KnOTS' basis that the changes of one layer share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adaptrank.composition.changes import Change, Product, with_fixed_signs


def shared_blocks(changes: Sequence[Change], cut: float) -> tuple[Tensor, list[Tensor]]:
    """Return U (m, R) and the blocks X_i = S V_i^T (R, n), with D_i = U X_i.

    They come from [D_1 | D_2 | ...] = U S [V_1^T | V_2^T | ...], the changes side by side along
    their inputs, in float64. U and the blocks have the dtype of the changes.

    Args:
        changes: of one layer.
        cut: singular values below this fraction of the largest are dropped.
    """
    U, S, parts = _decomposed(changes)
    # A vote by frequency depends on the signs of the basis.
    basis = with_fixed_signs(U, S, torch.cat(list(parts), 1))
    U, parts = basis.U, torch.split(basis.Vh, [part.shape[1] for part in parts], 1)
    kept = cut * S[0] < S if len(S) else S.new_zeros(0, dtype=torch.bool)
    like = changes[0].like
    blocks = [(S[kept, None] * part[kept]).to(like) for part in parts]
    return U[:, kept].to(like), blocks


def _decomposed(changes: Sequence[Change]) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Return U (m, R), S (R,), and V_i^T (R, n) of each change, in float64."""
    products = [change for change in changes if isinstance(change, Product)]
    if len(products) == len(changes):
        return _decomposed_products(products)
    matrices = [change.dense().double() for change in changes]
    U, S, Vh = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    return U, S, Vh.split([D.shape[1] for D in matrices], 1)


def _decomposed_products(
    products: Sequence[Product],
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Decompose products through the (R, R) core that is left of QR of all factors."""
    Q, R = torch.linalg.qr(torch.cat([product.U.double() for product in products], 1))
    bases, cores = [], []
    for product in products:
        basis, core = torch.linalg.qr(product.V.double().T)
        bases.append(basis)
        cores.append(core.T)
    block: Tensor = torch.block_diag(*cores)  # type: ignore[no-untyped-call]
    u, S, vh = torch.linalg.svd(R @ block, full_matrices=False)
    parts = vh.split([basis.shape[1] for basis in bases], 1)
    return Q @ u, S, [part @ basis.T for part, basis in zip(parts, bases, strict=True)]
