"""EVA: ranks where the inputs of a layer have variance left, and a start along their leading directions."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adaptrank._collectives import from_all
from adaptrank._errors import UserError
from adaptrank.allocation.allocator import Allocator
from adaptrank.allocation.initial.layer_inputs import watch
from adaptrank.allocation.plans import Resize, keep_best
from adaptrank.axes import RankAxis, natural


class EVA(Allocator):
    """Before training, take the leading right singular vectors of every layer's inputs, and give ranks to those that explain most.

    The singular values of the inputs that have come so far are kept as a sketch of round(rho r) components, updated batch by batch,
    [S V; new rows] = U S' V'. A component's share is S'^2 over the sum of squares of all inputs; the shares of all layers are pooled, and
    the largest win, at least `floor` a layer, rho r at most; the total is that of the start. A batch after which every assigned
    component turned by a cosine of at least tau ends it. Then A takes the leading vectors as its rows, and B stays zero: the function does not
    change. Layers that read the same tensor (query, key, value) share one sketch.

    The scale of a layer stays what it was, alpha over the rank at construction, so gradients do not depend on the new rank: what
    HF PEFT's `adjust_scaling_factors` is for. Inputs are not centred (HF PEFT centres them). Padding and tokens without a label are left out.
    Where units read parts of the input, each part has a sketch of its own.

    Source: arXiv:2410.07170; rules from HF PEFT's code, the paper was not read: rho 2, tau 0.99.
    Args:
        rho: most components of a layer over its rank at the start.
        tau: cosine at which a component has settled.
        init: whether the leading directions become the start; without it only the ranks are chosen.
        whiten: divide each direction by its singular value.
        max_batches: most training batches to read.
        budget: total to share out; None is that of the start.
        unit: of the total, "ranks" or "parameters".
        floor: least number of units of an axis.
    Raises:
        ValueError: for arguments out of range; at the start, if there are no batches, or a layer reads something else than vectors.
    """

    source = "arXiv:2410.07170"
    requires = frozenset({"input_directions"})
    options = {"init": frozenset({"input_init"})}
    moves = False

    def __init__(
        self,
        rho: float = 2.0,
        tau: float = 0.99,
        init: bool = True,
        whiten: bool = False,
        max_batches: int = 32,
        budget: int | None = None,
        unit: Literal["ranks", "parameters"] = "ranks",
        floor: int = 1,
    ) -> None:
        super().__init__(budget, unit, warmup=0, final=0, floor=floor)
        if rho < 1 or not 0 < tau <= 1 or max_batches < 1:
            raise UserError(
                f"rho={rho}, tau={tau}, max_batches={max_batches}: rho and batches are at least 1, 0 < tau <= 1."
            )
        self.rho, self.tau, self.init, self.whiten, self.max_batches = (
            rho,
            tau,
            init,
            whiten,
            max_batches,
        )
        self._sketches: dict[str, list[Sketch]] = {}

    def initial_ranks(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, int]:
        columns = {key: read_columns(axis) for key, axis in self.run.axes.items()}
        most = {key: self._most(key, axis) for key, axis in self.run.axes.items()}
        total = self.cost().total(self.sizes()) if self.budget is None else self.budget
        sketches: dict[str, list[Sketch]] = {}
        owner: dict[str, str] = {}  # axis -> the first that reads the same tensors
        sizes, read = self.sizes(), 0
        for batch in batches:
            if read == self.max_batches:
                break
            seen: dict[str, list[tuple[int, Tensor]]] = {}

            def see(
                key: str, rows: Tensor, of: int, seen: dict[str, list[tuple[int, Tensor]]] = seen
            ) -> None:
                seen.setdefault(key, []).append((of, rows))

            handles = watch(self.model, self.run.axes, see)
            try:
                with torch.no_grad():
                    self.loss(batch)
            finally:
                for handle in handles:
                    handle.remove()
            read += 1
            if not owner:
                first: dict[tuple[tuple[int, ...], Any], str] = {}
                for key in sorted(seen, key=natural):
                    inputs = (
                        tuple(of for of, _ in seen[key]),
                        tuple(map(tuple, columns[key].tolist())),
                    )
                    owner[key] = first.setdefault(inputs, key)
                wide = {
                    key: max(most[k] for k in owner if owner[k] == key)
                    for key in set(owner.values())
                }
                sketches = {key: [Sketch(wide[key]) for _ in columns[key]] for key in wide}
            for key in sketches:
                rows = (
                    _wide(torch.cat([one for _, one in seen.get(key, [])])) if key in seen else None
                )
                if rows is not None:
                    for sketch, part in zip(
                        sketches[key], columns[key].to(rows.device), strict=True
                    ):
                        sketch.add(rows[:, part])
            sizes = self._assign(sketches, owner, most, total)
            settled = all(
                s.settled(-(-sizes[k] // len(sketches[o])), self.tau)
                for k, o in owner.items()
                for s in sketches[o]
            )
            if float(self.reduce(torch.tensor(float(settled)))) == 1.0:
                break
        if not read:
            raise UserError(
                "EVA looks at training batches, and got none; give `start` batches and a loss."
            )
        for key in sorted(sketches, key=natural):
            for sketch in sketches[key]:
                sketch.merge(from_all((sketch.SV.cpu(), sketch.total)))
        self._sketches = {key: sketches[owner[key]] for key in owner}
        return self._assign(sketches, owner, most, total)

    def _most(self, key: str, axis: RankAxis) -> int:
        """Components of a sketch: rho times the units of a part, within what the axis takes."""
        cap = self.caps()[key]
        parts = len(read_columns(axis))
        units = max(1, round(self.rho * len(axis) / parts))
        return units if cap is None else min(units, max(1, cap // parts))

    def _assign(
        self,
        sketches: Mapping[str, list["Sketch"]],
        owner: Mapping[str, str],
        most: Mapping[str, int],
        total: int,
    ) -> dict[str, int]:
        shares = {}
        for key, of in owner.items():
            columns = [sketch.shares()[: most[key]] for sketch in sketches[of]]
            shares[key] = torch.stack(
                columns, 1
            ).flatten()  # the first of each part, then the second: as units are ordered
        plan = keep_best(shares, self.cost(), total, self.floor)
        sizes = {key: len(values) for key, values in shares.items()}
        kept = {key: len(change.keep) for key, change in plan.items() if isinstance(change, Resize)}
        return {**self.sizes(), **sizes, **kept}

    def begin(self, sizes: Mapping[str, int]) -> None:
        if not self.init:
            return
        for key, axis in self.run.axes.items():
            if key not in self._sketches:
                continue  # it took no part in the forward passes
            for layer, name in axis.members:
                factor = getattr(layer, layer.input_factor[name])
                which, parts = unit_columns(axis), read_columns(axis)
                place = {tuple(part): i for i, part in enumerate(parts.tolist())}
                count = [0] * len(parts)
                for unit, columns in enumerate(which.tolist()):
                    part = place[tuple(columns)]
                    direction = self._sketches[key][part].direction(count[part], self.whiten)
                    count[part] += 1
                    if direction is not None:
                        factor.data[unit] = direction.to(factor)
        self._sketches = {}


class Sketch:
    """The leading right singular vectors of all rows so far, times their singular values: (k, n)."""

    def __init__(self, components: int) -> None:
        self.components = components
        self.SV = torch.zeros(0, 0)
        self.total = 0.0  # sum of squares of all rows
        self.cosines = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Take in further rows (tokens, n)."""
        before = self.SV
        stacked = rows if not len(before) else torch.cat([before.to(rows), rows])
        self.SV = _leading(stacked, self.components)
        self.total += float(rows.double().square().sum())
        shared = min(len(before), len(self.SV))
        turned = (
            torch.cosine_similarity(before[i].to(self.SV), self.SV[i], dim=0).abs()
            for i in range(shared)
        )
        self.cosines = torch.tensor([float(cosine) for cosine in turned])

    def merge(self, others: list[tuple[Tensor, float]]) -> None:
        """Become the sketch of what all processes saw."""
        if len(others) > 1:
            self.SV = _leading(torch.cat([SV for SV, _ in others if len(SV)]), self.components)
            self.total = sum(total for _, total in others)

    def shares(self) -> Tensor:
        """Explained variance of each component over that of all rows, (components,)."""
        squares = self.SV.double().square().sum(1).cpu()
        padded = torch.cat([squares, squares.new_zeros(self.components - len(squares))])
        return padded / self.total if self.total else padded

    def settled(self, count: int, tau: float) -> bool:
        """Whether the first components have not turned since the last batch."""
        return len(self.cosines) >= min(count, len(self.SV)) > 0 and bool(
            (self.cosines[:count] >= tau).all()
        )

    def direction(self, index: int, whiten: bool) -> Tensor | None:
        """Unit vector of a component; None where the rows had no such direction."""
        if index >= len(self.SV) or not bool(self.SV[index].any()):
            return None
        size = float(self.SV[index].norm())
        return self.SV[index] / (size * size if whiten else size)


def _leading(rows: Tensor, components: int) -> Tensor:
    S, Vh = torch.linalg.svd(rows, full_matrices=False)[1:]
    kept = int((S[:components] > 1e-6 * S[0].clamp_min(1e-30)).sum())
    leading: Tensor = S[:kept, None] * Vh[:kept]
    largest = leading.gather(1, leading.abs().argmax(1, keepdim=True))
    return (
        leading * largest.sign()
    )  # a singular vector has no sign of its own: its largest entry is positive


def unit_columns(axis: RankAxis) -> Tensor:
    """The inputs that each unit reads: (units, width)."""
    layer, name = axis.members[0]
    n = layer.shape[1]
    columns = (
        layer.of_inputs(name, torch.arange(n)) if name in layer.input_factor else torch.arange(n)
    )
    return columns.cpu().expand(len(axis), -1) if columns.dim() == 1 else columns.cpu()


def read_columns(axis: RankAxis) -> Tensor:
    """The different parts of the input that units read, in their order: (parts, width)."""
    rows = unit_columns(axis).tolist()
    return torch.tensor(list(dict.fromkeys(map(tuple, rows))))


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
