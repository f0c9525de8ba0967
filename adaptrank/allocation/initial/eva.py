"""EVA: ranks where a layer's inputs have variance left, and a start along their directions."""

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation.context import Axes
from adaptrank.allocation.initial.initializer import Choice, RankInitializer
from adaptrank.allocation.initial.input_parts import part_of_units, read_columns
from adaptrank.allocation.initial.input_sketches import InputSketches, LayerRows
from adaptrank.allocation.initial.layer_inputs import watch
from adaptrank.allocation.initial.sketch import Sketch
from adaptrank.allocation.plans import keep_best, kept_units
from adaptrank.axes import RankAxis


class EVA(RankInitializer):
    """Give ranks to the layers whose inputs have most variance, and start along their directions.

    Before training, an incremental principal component analysis reads the inputs X (tokens, n) of
    every layer batch by batch: a sketch of round(rho r) components of the centred inputs,
    X - mean = U S V^T. The explained variance ratio of component i is S_i^2 / sum |x - mean|^2,
    over the variance of its own layer. The ratios of all layers are pooled, and the largest win:
    at least `floor` units for each layer, which may be none, and at most rho r, with the total of
    the start. Ties fall to the first layer in natural order. The search ends after a batch in
    which every assigned component kept its direction, with a cosine of at least tau. Then A takes
    the leading v_i as its rows. B stays zero, so the function does not change.

    Layers that read the same tensor (query, key, value) share one sketch. If units read parts of
    the input, each part has its own sketch. The sketches of several processes are merged at the
    end. Memory is (round(rho r) + 1) n numbers for each different input. Padding and tokens
    without a label are left out. The model is in evaluation mode.

    The scale of a layer stays alpha over the rank at construction, so that gradients do not depend
    on the new rank, as with `adjust_scaling_factors` of HF PEFT.

    Source: arXiv:2410.07170. The rules are from HF PEFT's code: centred, rho 2, tau 0.99, whitening
    by 1 / sqrt(S). The paper was not read. Departures: the release cycles through the data until
    all components settle, and here `max_batches` ends the search. It approximates each
    decomposition by random projections, drops a batch with fewer rows than components, and lets a
    settled layer skip batches. Here each decomposition is exact, and every row counts.

    Args:
        rho: most components of a layer over its rank at the start.
        tau: cosine at which a component has settled.
        init: whether the leading directions become the start. Otherwise only the ranks are chosen.
        whiten: divide each direction by the square root of its singular value S_i.
        center: subtract the mean of the inputs, as published. Without it the first direction is
            often that of the mean.
        max_batches: most training batches to read.
        budget: total to share out. None is the total at the start.
        unit: unit of the total, "ranks" or "parameters".
        floor: least number of units of an axis. With 0, as published, a layer may lose all.
    Raises:
        UserError: for arguments out of range. At the start of a run: if there are no batches.
    """

    source = "arXiv:2410.07170"
    requires = frozenset({"input_directions"})
    options = {"init": frozenset({"input_init"})}

    def __init__(
        self,
        rho: float = 2.0,
        tau: float = 0.99,
        init: bool = True,
        whiten: bool = False,
        max_batches: int = 32,
        budget: int | None = None,
        unit: Literal["ranks", "parameters"] = "ranks",
        floor: int = 0,
        center: bool = True,
    ) -> None:
        super().__init__(budget, unit, floor)
        if rho < 1 or not 0 < tau <= 1 or max_batches < 1:
            raise UserError(
                f"rho={rho}, tau={tau}, max_batches={max_batches}: rho and batches are at least 1, "
                f"0 < tau <= 1."
            )
        self.rho, self.tau, self.max_batches = rho, tau, max_batches
        self.init, self.whiten, self.center = init, whiten, center

    @property
    def sets_tensors(self) -> bool:
        return self.init

    def choose(self, axes: Axes, batches: Iterable[Any]) -> Choice:
        components = {key: self.components(key, axis) for key, axis in axes.items()}
        sketches = InputSketches(axes, components, self.center)
        batches_read = 0
        for batch in islice(batches, self.max_batches):
            sketches.add(self._inputs_of(batch, axes))
            batches_read += 1
            settled = sketches.settled(self._ranks(sketches), self.tau)
            if self._all_processes(settled):
                break
        if batches_read == 0:
            raise UserError(
                "EVA looks at training batches, and got none. Give `start` batches and a loss."
            )
        sketches.merge_processes()
        return Choice(self._ranks(sketches), evidence=sketches)

    def initialize(self, axes: Axes, evidence: InputSketches) -> None:
        """Set the input-side factors to the leading directions of the inputs."""
        if not self.init:
            return
        for key, axis in axes.items():
            if key not in evidence:
                # The layer took no part in the forward passes.
                continue
            for layer, name in axis.members:
                factor = getattr(layer, layer.input_factor[name])
                self._set_directions(factor, part_of_units(axis), evidence[key])

    def components(self, key: str, axis: RankAxis) -> int:
        """Return the components of a sketch: rho times the units of a part, within the cap."""
        cap = self.caps()[key]
        parts = len(read_columns(axis))
        components = max(1, round(self.rho * len(axis) / parts))
        if cap is None:
            return components
        return min(components, max(1, cap // parts))

    def _inputs_of(self, batch: Any, axes: Axes) -> dict[str, list[LayerRows]]:
        """Return axis -> rows that enter its layers in a forward pass."""
        inputs: dict[str, list[LayerRows]] = {}

        def see(key: str, rows: Tensor, tensor: int) -> None:
            inputs.setdefault(key, []).append(LayerRows(tensor, rows))

        handles = watch(self.run.model, axes, see)
        try:
            with torch.no_grad():
                self.run.loss(batch)
        finally:
            for handle in handles:
                handle.remove()
        return inputs

    def _ranks(self, sketches: InputSketches) -> dict[str, int]:
        """Return the ranks that win the pooled shares. Axes that were not seen keep theirs."""
        cost, start = self.run.cost(), self.run.sizes()
        total = cost.total(start) if self.budget is None else self.budget
        shares = sketches.shares()
        unseen = {key: size for key, size in start.items() if key not in shares}
        cost_of_seen = cost.in_steps(dict.fromkeys(shares, 1), unseen)
        plan = keep_best(shares, cost_of_seen, total, self.floors())
        most = {key: len(values) for key, values in shares.items()}
        return {**unseen, **most, **kept_units(plan)}

    def _all_processes(self, settled: bool) -> bool:
        return float(self.run.reduce(torch.tensor(float(settled)))) == 1.0

    def _set_directions(self, factor: Tensor, parts: list[int], sketches: list[Sketch]) -> None:
        """Set the row of each unit to the next direction of the part that it reads."""
        used = [0] * len(sketches)
        for unit, part in enumerate(parts):
            direction = sketches[part].direction(used[part], self.whiten)
            used[part] += 1
            if direction is not None:
                factor.data[unit] = direction.to(factor)
