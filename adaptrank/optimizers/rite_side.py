"""One side of LoRA-RITE's step: a factor of several pairs of equal shapes, stacked.

g counts pairs, k their blocks, d rows of the factor, e rows of its dual, and r units. The basis has
w = min(e, r) directions now and w_old at the last step.
"""

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank.optimizers.factor_pairs import Factor, stack
from adaptrank.optimizers.small_matrices import core_dtype

FORMAT = 1
"""Form of the state: keys, shapes and their meaning."""
KEYS = ("M", "V", "basis", "rho", "t", "skipped", "master", "changed")
"""Keys of a parameter's state.

M (k, d, w) is the momentum and V (k, w, w) the second moment in the basis U (k, e, w) of the dual.
rho (k,) is the escaped mass, t the number of steps and skipped that of skipped steps. master is a
copy of a parameter with less than 32 bits. changed is there only if units were removed (1) or grown
(2) since the last step, or grown before it (4), or several of these.
"""
REMOVED, GROWN, GROWN_BEFORE = 1, 2, 4
States = MutableMapping[Any, dict[str, Any]]


class Side:
    """A factor of g pairs and its state, within one step.

    Args:
        factors: the factor of each pair. Shapes, settings and state are alike.
        group: their parameter group.
        states: state of the optimizer.
    """

    U: Tensor
    R: Tensor
    K: Tensor
    E: Tensor
    h: Tensor
    S: Tensor
    P: Tensor
    V: Tensor
    V_transported: Tensor
    b1: Tensor
    b2: Tensor
    rho_old: Tensor
    rho: Tensor
    t: Tensor
    c: Tensor | None
    finite: Tensor
    ok: Tensor

    def __init__(self, factors: Sequence[Factor], group: dict[str, Any], states: States) -> None:
        self.factors, self.group = factors, group
        parameter = factors[0].tensor
        self.dtype = torch.promote_types(torch.float32, parameter.dtype)
        self.core = core_dtype(parameter)
        self.dual = stack(
            [factor.dual.blocks(factor.dual.tensor) for factor in factors], self.dtype
        )
        self.states = [self._state(factor, states) for factor in factors]
        changed = self.states[0].get("changed", 0)
        self.removed, self.grown = bool(changed & REMOVED), bool(changed & GROWN)
        # The dual of a fresh unit may be zero, and has its direction one step later.
        self.fills = self.grown or bool(changed & GROWN_BEFORE)
        self.V_old = self._stored("V").to(self.core)
        self.precision = torch.finfo(self.dtype).eps

    def _state(self, factor: Factor, states: States) -> dict[str, Any]:
        """Return the state of a factor, which is zero before its first step."""
        state = states[factor.tensor]
        if "M" in state:
            return state
        own = factor.blocks(factor.tensor)  # (k, d, r)
        k, d, r = own.shape
        e = self.dual.shape[-2]
        w = min(e, r)
        state["M"] = own.new_zeros(k, d, w, dtype=self.dtype)
        state["V"] = own.new_zeros(k, w, w, dtype=self.dtype)
        state["basis"] = own.new_zeros(k, e, w, dtype=self.dtype)
        state["rho"] = own.new_zeros(k, dtype=self.dtype)
        state["t"] = own.new_zeros((), dtype=self.dtype)
        state["skipped"] = own.new_zeros((), dtype=self.dtype)
        if own.dtype != self.dtype:
            state["master"] = factor.tensor.detach().to(self.dtype, copy=True)
        return state

    def _stored(self, key: str) -> Tensor:
        return torch.stack([state[key] for state in self.states])

    # ---- gradients in the basis of the dual

    def factorize(self) -> None:
        """Set dual = U R with orthonormal U (g, k, e, w) and R (g, k, w, r)."""
        U, R = torch.linalg.qr(self.dual)
        # A decomposition of values that are not finite would raise. Such pairs are skipped.
        self.finite = torch.isfinite(R).all((-1, -2), keepdim=True)
        self.U = torch.where(self.finite, U, 0)
        self.R = torch.where(self.finite, R, 0).to(self.core)
        del self.dual

    def invert(self, K: Tensor) -> None:
        """Set K = R^+ / s, and leave directions out of U that the dual does not have.

        E = R R^+ projects to its directions. A dual with units that are zero, or with padding, has
        fewer than w, and QR fills U up with directions that mean nothing.
        """
        self.E = self.R @ K
        self.U = self.U @ self.E.to(self.dtype)
        self.K = K.to(self.dtype) / self._scale()

    def unmagnify(self) -> None:
        """Set h = g K (g, k, d, w) and S = h^T h / d (g, k, w, w)."""
        gradients = [factor.blocks(_gradient(factor)) for factor in self.factors]
        h = stack(gradients, self.dtype) @ self.K
        self.S = (h.mT @ h).to(self.core) / h.shape[-2]
        self.finite = self.finite & torch.isfinite(self.S).all((-1, -2), keepdim=True)
        self.h = h

    def _scale(self) -> float | Tensor:
        """Return s, which leaves the step, for each pair and block, or 1."""
        scale = self.factors[0].pair.scale
        if not self.group["scale_invariant"]:
            return 1.0
        if not isinstance(scale, Tensor):
            return scale
        scales = [factor.pair.scale for factor in self.factors]
        return stack([s for s in scales if isinstance(s, Tensor)], self.dtype)[..., None, None]

    def squared_norm(self) -> Tensor:
        """Return ||h||^2 over the pairs that are not skipped, ()."""
        traces: Tensor = self.S.diagonal(dim1=-2, dim2=-1).sum(-1) * self.h.shape[-2]
        return torch.where(self.ok[..., 0, 0], traces, 0).sum()

    def clip(self, norm: Tensor) -> None:
        """Set c = min(1, clip / norm), the factor of h."""
        limit = self.group["clip"]
        self.c = None if limit is None else (limit / norm).clamp_max(1).to(self.h.device)

    # ---- transport and moments

    def transport(self) -> None:
        """Set P = U^T U_old (g, k, w, w_old), V~ = P V P^T, and the decays of the step."""
        self.P = (self.U.mT @ self._stored("basis")).to(self.core)
        self.V = _symmetric(self.P @ self.V_old @ self.P.mT)
        self.t = self._stored("t") + 1
        steps = self.t.to(self.core)[:, None, None, None]
        self.b1, self.b2 = (_corrected(beta, steps) for beta in self.group["betas"])
        self.rho_old = self._stored("rho").to(self.core)
        self.rho = self.b2[..., 0, 0] * self.rho_old

    def add_escaped(self, old: Tensor, new: Tensor) -> None:
        """Set rho = b2 (rho + d_lam), unless units were removed, with their mass, on purpose.

        Args:
            old: eigenvalues of V (g, k, N), ascending.
            new: those of V~.
        """
        if not self.removed:
            largest = (old - new).clamp_min(0).amax(-1)
            escaped = torch.minimum(largest, (old.sum(-1) - new.sum(-1)).clamp_min(0))
            self.rho = self.b2[..., 0, 0] * (self.rho_old + escaped)

    def update_second_moment(self) -> None:
        """Set V = b2 V~ + (1 - b2) c^2 S, with the mean second moment in fresh directions of V~."""
        self.V_transported = self._filled() if self.fills else self.V
        S = torch.where(self.ok, self.S, 0)
        S = S if self.c is None else S * self.c.to(self.core) ** 2
        self.V = _symmetric(self.b2 * self.V_transported + (1 - self.b2) * S)

    def _filled(self) -> Tensor:
        """Return V~ + (tr V / w_old) N N^T, with N the directions that the old basis has not."""
        eye = torch.eye(self.E.shape[-1], device=self.E.device, dtype=self.core)
        lam, Q = torch.linalg.eigh(_symmetric(self.P @ self.P.mT + eye - self.E))
        # Eigenvalues are 0 in fresh directions, and near 1 in those that were there.
        fresh = torch.where(lam < 0.5, Q.new_ones(()), 0)
        fill = (Q * fresh[..., None, :]) @ Q.mT
        w_old = self._stored("basis").square().sum((-1, -2)).to(self.core).clamp_min(1)
        mean = self.V_old.diagonal(dim1=-2, dim2=-1).sum(-1) / w_old
        filled: Tensor = self.V + mean[..., None, None] * fill
        return filled

    def inverse_root(self, lam: Tensor) -> Tensor:
        """Return 1 / (sqrt(lam + rho) + eps) of eigenvalues (g, k, w)."""
        root: Tensor = (lam.clamp_min(0) + self.rho[..., None]).sqrt()
        return (root + float(self.group["eps"])).reciprocal()

    # ---- the move

    def move(self, Y: Tensor) -> None:
        """Set M = b1 M~ + (1 - b1) c h Y, move the factors, and store the state.

        Args:
            Y: preconditioner (g, k, w, w).
        """
        u = torch.where(self.ok, self.h, 0) @ Y.to(self.dtype)
        u = u if self.c is None else u * self.c.to(self.dtype)
        M_old = self._stored("M")
        M_transported = M_old @ self.P.mT.to(self.dtype)
        b1 = self.b1.to(self.dtype)
        M = b1 * M_transported + (1 - b1) * u

        present = [_weights(factor, state) for factor, state in self._members()]
        own = stack(
            [factor.blocks(x) for factor, x in zip(self.factors, present, strict=True)], self.dtype
        )
        lr, decay = self.group["lr"], self.group["weight_decay"]
        moved = own - lr * (M @ self.K.mT + decay * own)
        moved = torch.where(self.ok, moved, own)
        self._write(moved)
        self._store(M, M_old, M_transported)

    def _members(self) -> Iterator[tuple[Factor, dict[str, Any]]]:
        return zip(self.factors, self.states, strict=True)

    def _write(self, moved: Tensor) -> None:
        values = [f.unblock(value) for f, value in zip(self.factors, moved.unbind(), strict=True)]
        masters = [state["master"] for state in self.states if "master" in state]
        if masters:
            torch._foreach_copy_(masters, values)
        torch._foreach_copy_([factor.tensor for factor in self.factors], values)

    def _store(self, M: Tensor, M_old: Tensor, M_transported: Tensor) -> None:
        """Store the state. A pair that is skipped keeps its own, or only follows its units."""
        followed = self.removed or self.grown
        kept = {
            "M": M_transported if followed else M_old,
            "V": (self.V_transported if followed else self.V_old).to(self.dtype),
            "basis": self.U if followed else self._stored("basis"),
            "rho": self._stored("rho"),
            "t": self.t - 1,
        }
        rho = self.rho.to(self.dtype)
        new = {"M": M, "V": self.V.to(self.dtype), "basis": self.U, "rho": rho, "t": self.t}
        for key, values in new.items():
            ok = self.ok.view(-1, *[1] * (values.dim() - 1))
            self._replace(key, torch.where(ok, values, kept[key]))
        skipped = self._stored("skipped") + self.ok.logical_not().view(-1)
        self._replace("skipped", skipped)
        for state in self.states:
            state.pop("changed", None)
            if self.grown:
                state["changed"] = GROWN_BEFORE

    def _replace(self, key: str, values: Tensor) -> None:
        if values.shape[1:] == self.states[0][key].shape:
            torch._foreach_copy_([state[key] for state in self.states], list(values.unbind()))
            return
        for state, value in zip(self.states, values.unbind(), strict=True):
            state[key] = value.clone()

    # ---- closed units

    def close(self, K: Tensor, units: Sequence[int]) -> None:
        """Transport the state now, and set the momentum of these units to zero.

        The momentum of the factor itself is M K^T. Its columns are set to zero, and it is brought
        back by R^T. What escapes in the transport is counted, so that the next step finds P = I.
        """
        factor, state = self.factors[0], self.states[0]
        self.invert(K)
        self.transport()
        open_units = torch.ones_like(factor.tensor, dtype=self.dtype)
        _, dim = factor.name_and_dim
        index = torch.tensor(units, dtype=torch.long, device=open_units.device)
        open_units.index_fill_(dim, index, 0)
        momentum = (self._stored("M") @ self.P.mT.to(self.dtype)) @ K.mT.to(self.dtype)
        momentum = momentum * factor.blocks(open_units)[None]
        old, new = (torch.linalg.eigvalsh(V) for V in (self.V_old, self.V))
        if self.group["escape"]:
            # The next step multiplies by b2.
            self.b2, self.rho = torch.ones_like(self.b2), self.rho_old
            self.add_escaped(*_equally_long(old, new))
            state["rho"].copy_(self.rho[0])
        V = self._filled() if self.fills else self.V
        self._replace("M", momentum @ self.R.mT.to(self.dtype))
        self._replace("V", V.to(self.dtype))
        self._replace("basis", self.U)
        state.pop("changed", None)
        if self.grown:
            state["changed"] = GROWN_BEFORE


class PairStack:
    """Pairs of equal shapes, with the one or two sides that move.

    Args:
        sides: side A, side B, or both, of the same pairs.
    """

    def __init__(self, sides: Sequence[Side]) -> None:
        self.sides = sides

    def guard(self) -> None:
        """Set `ok` (g, 1, 1, 1) of the sides: whether all values of a pair are finite."""
        finite = [side.finite.all(1, keepdim=True) for side in self.sides]
        ok = finite[0] & finite[-1]
        for side in self.sides:
            side.ok = ok


def stack_pairs(
    pairs: Sequence[tuple[Factor, ...]], groups: Mapping[int, dict[str, Any]], states: States
) -> list[PairStack]:
    """Gather pairs of equal shapes, settings and kinds of state."""
    alike: dict[Any, list[tuple[Factor, ...]]] = {}
    for factors in pairs:
        key = tuple(_key(factor, groups[id(factor.tensor)], states) for factor in factors)
        alike.setdefault(key, []).append(factors)
    stacks = []
    for members in alike.values():
        sides = []
        for factors in zip(*members, strict=True):
            sides.append(Side(factors, groups[id(factors[0].tensor)], states))
        stacks.append(PairStack(sides))
    return stacks


def _key(factor: Factor, group: Mapping[str, Any], states: States) -> Any:
    """Return a key that is equal for factors that can be stacked."""
    tensor, pair, state = factor.tensor, factor.pair, states.get(factor.tensor, {})
    scale = None if isinstance(pair.scale, Tensor) else pair.scale
    blocks = None if pair.blocks is None else pair.blocks.shape
    old = (state["M"].shape, state.get("changed", 0)) if "M" in state else None
    shapes = (factor.side, tensor.shape, factor.dual.tensor.shape, blocks)
    return (*shapes, tensor.dtype, tensor.device, id(group), scale, old)


def _gradient(factor: Factor) -> Tensor:
    gradient = factor.tensor.grad
    assert gradient is not None, "factors without a gradient do not move"
    return gradient


def _weights(factor: Factor, state: Mapping[str, Any]) -> Tensor:
    """Return a factor's values, in 32 bits where there is a copy. A change from outside counts."""
    present = factor.tensor.detach()
    if "master" not in state:
        return present
    master: Tensor = state["master"]
    is_rounded = master.to(present.dtype) == present
    return torch.where(is_rounded, master, present.to(master.dtype))


def _corrected(beta: float, t: Tensor) -> Tensor:
    """Return b (1 - b^(t-1)) / (1 - b^t), Adam's bias correction as a decay. It is 0 at t = 1."""
    if not beta:
        return torch.zeros_like(t)
    log = math.log(beta)
    return beta * torch.expm1((t - 1) * log) / torch.expm1(t * log)


def _symmetric(V: Tensor) -> Tensor:
    return (V + V.mT) / 2


def _equally_long(old: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues of two sizes with zeros in front of the fewer ones."""
    width = max(old.shape[-1], new.shape[-1])
    return tuple(F.pad(values, (width - values.shape[-1], 0)) for values in (old, new))  # type: ignore[return-value]
