"""LoRA-RITE: a step that does not depend on how a product is split into its two factors."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes import Role, UnitChange
from adaptrank.optimizers.factor_pairs import Factor, left_factor
from adaptrank.optimizers.model_optimizer import Parameters
from adaptrank.optimizers.pair_optimizer import PairOptimizer
from adaptrank.optimizers.rite_side import (
    FORMAT,
    GROWN,
    KEYS,
    REMOVED,
    PairStack,
    Side,
    stack_pairs,
)
from adaptrank.optimizers.small_matrices import eigenvalues, functions, pseudo_inverses


class LoRARITE(PairOptimizer):
    """Adam whose moments live in the basis of the other factor, so that the split is irrelevant.

    For dW = s B A, each side is stepped in the orthonormal basis U_B of the columns of B, and U_A
    of the rows of A, with B = U_B R_B and A^T = U_A R_A, and K = R^+ the pseudo-inverse:

        h_A = gA^T K_B / s (= G^T U_B),  h_B = gB K_A / s (= G U_A)  unmagnified gradients
        c = min(1, clip / norm of all h),  S = c^2 h^T h / rows
        P = U^T U_old,  V~ = P V P^T,  M~ = M P^T  transport
        d_lam = min(max_i [lam_i(V) - lam_i(V~)]_+, [tr V - tr V~]_+)  escaped mass
        rho = b2 (rho + d_lam),  V = b2 V~ + (1 - b2) S = Q diag(lam) Q^T
        M = b1 M~ + (1 - b1) c h Q diag(1 / (sqrt(lam + rho) + eps)) Q^T
        A^T -= lr (M_A K_B^T / s + wd A^T),  B -= lr (M_B K_A^T / s + wd B)

    b1 and b2 are the betas with Adam's bias correction, b (1 - b^(t-1)) / (1 - b^t). Both sides use
    the factors from before the step. (B T, T^-1 A) gives the same path of B A for every invertible
    T, with decay, with the clip, and through every change of units that keeps the same subspace.
    One side may be frozen.

    Where B starts at zero, A does not move in the first step, and B moves by a matrix with equal
    singular values. The second step moves A by a large part of itself. Both are expected: warm up,
    and choose the learning rate anew.

    State follows changes of ranks by P, which then is rectangular. Removed units take their second
    moments with them, and nothing escapes. A fresh unit gets the mean second moment. Steps count
    on. Gradients that are not finite skip their pair, and are counted (`skipped_steps`). Nothing is
    read from the device for it.

    Source: arXiv:2410.20625 (paper) and the authors' release, with which a step agrees. The release
        has `escape` off. Its rule that drops gradients above a size, its pairing by the order of
        parameters and its replacement of values that are not finite are left out.
    Shapes: A (r, n), B (m, r), M (n, r) and (m, r), U (m, r) and (n, r), V (r, r). The state has
        2 r (m + n) + 2 r^2 numbers, and six more.
    Args:
        params: a model, or parameters or groups of them, see `ModelOptimizer`.
        lr: learning rate.
        betas: decay of the momentum and of the second moment.
        eps: added to the root of an eigenvalue.
        weight_decay: decay of both factors. B A decays about twice as fast.
        clip: largest norm of all unmagnified gradients together, or None. Clipping the gradients of
            the factors themselves breaks the invariance.
        escape: count the second moment that is lost when the basis turns.
        scale_invariant: leave s = alpha / r out of the step, so that it does not move dW s times as
            far.
        adamw_lr: learning rate of everything that belongs to no pair; None is lr.
    Raises:
        UserError: for a number out of range, or a model without such a pair.
    """

    source = "arXiv:2410.20625"
    roles: ClassVar[Mapping[str, Role]] = dict.fromkeys(KEYS, Role.OWN)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip: float | None = 1.0,
        escape: bool = True,
        scale_invariant: bool = True,
        adamw_lr: float | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip": clip,
            "escape": escape,
            "scale_invariant": scale_invariant,
        }
        super().__init__(params, defaults, adamw_lr)

    @property
    def clips(self) -> bool:  # type: ignore[override]
        """Whether the optimizer clips by itself, so that a trainer must not."""
        return any(group["clip"] is not None for group in self.param_groups)

    @property
    def skipped_steps(self) -> int:
        """Number of steps of pairs that were skipped. Reading it waits for the device."""
        counts = [state["skipped"] for state in self.state.values() if "skipped" in state]
        return sum(int(count) for count in counts)

    # ---- the step

    def step_pairs(
        self, pairs: Sequence[tuple[Factor, ...]], groups: Mapping[int, dict[str, Any]]
    ) -> None:
        stacks = stack_pairs(pairs, groups, self.state)
        sides = [side for stack in stacks for side in stack.sides]
        self._unmagnify(stacks, sides)
        norm = _global_norm(sides)
        for side in sides:
            side.clip(norm)
        _count_escaped([side for side in sides if side.group["escape"]])
        for side in sides:
            side.update_second_moment()
        preconditioners = functions(
            [side.V for side in sides], [side.inverse_root for side in sides]
        )
        for side, Y in zip(sides, preconditioners, strict=True):
            side.move(Y)

    @staticmethod
    def _unmagnify(stacks: Sequence[PairStack], sides: Sequence[Side]) -> None:
        """Set U, K, h, S and P of each side, and which pairs are skipped."""
        for side in sides:
            side.factorize()
        inverses = pseudo_inverses([side.R for side in sides], [side.precision for side in sides])
        for side, K in zip(sides, inverses, strict=True):
            side.invert(K)
            side.unmagnify()
        for stack in stacks:
            stack.guard()
        for side in sides:
            side.transport()

    # ---- changes of units

    def follow(self, tensor: Tensor, change: UnitChange) -> None:
        """Note what happened to the units of a factor, for the transport at the next step.

        The momentum of closed units becomes zero at once. To the dual they are removed, and come
        back as fresh ones with the next steps.
        """
        factor = self._factor(tensor) if change.closed else None
        if factor is not None and tensor.numel():
            self._note(factor.dual.tensor, REMOVED | GROWN)
            if "M" in self.state.get(tensor, {}):
                self.close(factor, change.closed)
        self._note(tensor, REMOVED * change.removed | GROWN * (change.grown > 0))

    def _note(self, tensor: Tensor, changed: int) -> None:
        state = self.state.get(tensor, {})
        if changed and "M" in state:
            state["changed"] = state.get("changed", 0) | changed

    @torch.no_grad()
    def close(self, factor: Factor, units: Sequence[int]) -> None:
        """Take closed units out of the momentum of their factor, whose slices are zero now."""
        group = next(g for g in self.param_groups if any(p is factor.tensor for p in g["params"]))
        side = Side([factor], group, self.state)
        side.factorize()
        (K,) = pseudo_inverses([side.R], [side.precision])
        side.close(K, units)

    def _factor(self, tensor: Tensor) -> Factor | None:
        """Return the factor of a pair that a tensor is, or None."""
        for wrapper in self._wrappers:
            left = left_factor(wrapper)
            for factor in (left, left.dual):
                if factor.tensor is tensor:
                    return factor
        return None

    # ---- files and forecasts

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain tensors under each parameter, with the number of its form."""
        return {**super().state_dict(), "format": FORMAT}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Its tensors keep their dtype, also where a parameter has fewer bits.

        Raises:
            UserError: for a state of a later version.
        """
        if state_dict.get("format", FORMAT) > FORMAT:
            raise UserError(
                f"The state of LoRARITE has form {state_dict['format']}; this version reads up to "
                f"{FORMAT}: pip install --upgrade adaptrank."
            )
        super().load_state_dict(state_dict)
        labels = [label for group in state_dict["param_groups"] for label in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for label, parameter in zip(labels, parameters, strict=True):
            stored = state_dict["state"].get(label, {})
            for key in KEYS:
                if isinstance(stored.get(key), Tensor):
                    self.state[parameter][key] = stored[key].to(parameter.device, copy=True)

    def state_numbers(self, model: nn.Module) -> int:
        numbers = super().state_numbers(model)
        for left in self.pairs_of(model):
            for factor in (left, left.dual):
                if factor.tensor.requires_grad:
                    numbers += _numbers_beside(factor)
        return numbers


def _numbers_beside(factor: Factor) -> int:
    """Return the numbers of a factor's state above two for each of its elements."""
    (k, d, r), (_, e, _) = (f.blocks(f.tensor).shape for f in (factor, factor.dual))
    w = min(e, r)
    own = k * (d * w + e * w + w * w) + k + 2  # M, basis, V, rho, t and skipped
    return own - 2 * factor.tensor.numel()


def _global_norm(sides: Sequence[Side]) -> Tensor:
    """Return the norm of all unmagnified gradients together, (), without those of skipped pairs."""
    squares = [side.squared_norm() for side in sides]
    device = squares[0].device
    return torch.stack([square.to(device) for square in squares]).sum().sqrt()


def _count_escaped(sides: Sequence[Side]) -> None:
    """Add the second moment that escaped in the transport to rho of each side."""
    if not sides:
        return
    present = eigenvalues([matrix for side in sides for matrix in (side.V_old, side.V)])
    for side, old, new in zip(sides, present[::2], present[1::2], strict=True):
        side.add_escaped(old, new)
