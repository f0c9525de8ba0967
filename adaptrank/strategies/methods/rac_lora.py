"""RAC-LoRA: a chain of low-rank updates, each with one factor frozen at a fresh random draw."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank._options import COUNT
from adaptrank.allocation import Participant
from adaptrank.axes import generator
from adaptrank.parameterizations import LowRankUpdate, Parameterization, wrapped_layers
from adaptrank.strategies.first_round import merge_present_changes
from adaptrank.strategies.ledger import live_wrappers
from adaptrank.strategies.merge_and_restart import MergeAndRestart
from adaptrank.strategies.rounds import Rounds

Side = Literal["A", "B"]
"""The factor that trains: A (r, n), which reads the input, or B (m, r), which makes the output."""

ORTHONORMAL = 1e-4
"""Largest error of an inner product of two columns of a frame in float32."""


class RACLoRA(MergeAndRestart):
    """W_t = W_{t-1} + s B A: a chain of links, each with a fresh random factor that is frozen.

    A link has `every` optimizer steps. At its start one factor becomes a random frame and is
    frozen, and the other one becomes zero and is trained. With `train: A` the frame is B (m, r),
    with orthonormal columns, and with `train: B` it is A (r, n), with orthonormal rows. At the
    border the update is merged, and the optimizer state of the trained factor is deleted. LoRA with
    both factors trained has no such guarantee as follows, and with one frame for good it converges
    to a wrong point.

    With orthonormal frames one step of gradient descent with rate eta is
    W' = W - gamma H G, with gamma = eta s^2 and the projector H = B B^T (or G H with H = A^T A).
    E[H] = (r / m) I, so in the bound a step is worth r / m of a full step. With the
    Polyak-Lojasiewicz inequality, constant mu, and gamma at most 1 / L,
    E f(W_T) - f* <= (1 - gamma mu r / m)^T (f(W_0) - f*), with n in the place of m for `train: B`.
    The theory is that of gradient descent and its stochastic forms, and not of Adam.

    Each frame is drawn from (seed, round, layer), so all processes and a resumed run have the same.
    Half the numbers of a LoRA of this rank train. The ledger holds both factors of merged links:
    the frames by their values, not by their seeds.

    An allocator may prune: a unit leaves both factors. It may grow: new columns of a frame are
    orthogonal to the present ones, and the trained factor is zero there, so that the function stays
    the same. LoRA+ is refused, because one side trains.

    Source: arXiv:2410.08305. A coin for each link is the side of Bernoulli-LoRA, arXiv:2508.03820.
        The formulas above are tested. Read in reviews only, and not verified, are GLUE averages of
        77.0 for RAC-LoRA, 78.5 for LoRA and 77.6 for Chain of LoRA. What the method offers is its
        guarantee, and not a better score. The orthonormal frames are a decision of this library:
        with Gaussian ones, plain gradient descent would step by B B^T, which is no projector.
    Args:
        every: optimizer steps of a link. The last link may be shorter.
        train: "A", "B", or "coin", which draws one of them for each link, for all layers together.
        sketch: "orthonormal", or "gaussian" with entries from N(0, 1 / m), or N(0, 1 / n) for A.
        seed: seed of the frames and of the coin.
    Raises:
        UserError: if a method is no product of two trained factors, if a frame would have more
            columns than rows, or if an argument is unknown.
    """

    source = "arXiv:2410.08305"
    ranges = {"every": COUNT}
    trains_one_factor = True

    def __init__(
        self,
        *,
        every: int = 500,
        train: Literal["A", "B", "coin"] = "A",
        sketch: Literal["orthonormal", "gaussian"] = "orthonormal",
        seed: int = 0,
    ) -> None:
        super().__init__(seed)
        if train not in ("A", "B", "coin"):
            raise UserError(f"train={train!r} is unknown; use 'A', 'B' or 'coin'.")
        if sketch not in ("orthonormal", "gaussian"):
            raise UserError(f"sketch={sketch!r} is unknown; use 'orthonormal' or 'gaussian'.")
        self.every, self.train, self.sketch = every, train, sketch

    def rounds(self, total_steps: int) -> Rounds:
        return Rounds.of_length(self.every, total_steps)

    def prepare(self, model: nn.Module) -> None:
        pairs = []
        for path, outermost in wrapped_layers(model).items():
            for wrapper in live_wrappers(outermost):
                pairs.append(trained_factors(path, wrapper))
        super().prepare(model)
        # An optimizer of both factors is needed if the side changes.
        if self.train != "coin":
            for pair in pairs:
                pair.train(self.train)

    def enter(self, number: int) -> None:
        if number == 0:
            merge_present_changes(self.layers)
        side = self.side(number)
        for place, pair in self._pairs():
            pair.check_room(side, self.sketch)
            frame, trained = pair.frame(side), pair.trained(side)
            random = generator(self.seed, f"{place}/frame", number)
            size, units = frame.shape
            frame.copy_(random_frame(size, units, self.sketch, random))
            trained.zero_()
        self.forget(self.live_tensors())
        self.run.forget_scores()

    def arrange(self, number: int) -> None:
        side = self.side(number)
        for _, pair in self._pairs():
            pair.train(side)

    def follow(self, number: int) -> None:
        """Make the new columns of frames orthogonal to the others, after an allocator's event."""
        if self.sketch != "orthonormal":
            return
        side = self.side(number)
        for _, pair in self._pairs():
            pair.check_room(side, self.sketch)
            complete_frame(pair.frame(side), pair.trained(side))

    def refuses_allocator(self, allocator: Participant) -> str:
        if self.train == "coin":
            return (
                "it scores the trained factor, and with train='coin' that changes from link to "
                "link; use train='A' or train='B'"
            )
        if getattr(allocator, "init", False):
            return (
                "it sets the factors at the start, and a random frame would take their place; set "
                "its init to false, or leave it out"
            )
        return super().refuses_allocator(allocator)

    def describe_border(self, number: int) -> dict[str, Any]:
        return {"trains": self.side(number), **super().describe_border(number)}

    # ---- sides and factors

    def side(self, number: int) -> Side:
        """Return the factor that trains in a round. It depends on (seed, round) alone."""
        if self.train != "coin":
            return self.train
        heads = torch.rand((), generator=generator(self.seed, "side", number)) < 0.5
        return "A" if heads else "B"

    def _pairs(self) -> Iterator[tuple[str, "TrainedFactors"]]:
        """Yield the place of each live wrapper, and its factors."""
        for path, outermost in self.layers.items():
            for position, wrapper in enumerate(live_wrappers(outermost)):
                yield f"{path}.{position}", trained_factors(path, wrapper)


@dataclass(frozen=True)
class TrainedFactors:
    """The two trained factors of a wrapper whose change is s B A.

    Args:
        path: path of the layer, for errors.
        wrapper: has the factors as its own tensors.
        axis: name of the axis that counts columns of B and rows of A.
        names: side -> name of its tensor in the wrapper.
    """

    path: str
    wrapper: Parameterization
    axis: str
    names: dict[Side, str]

    def tensor(self, side: Side) -> Tensor:
        """Return a factor."""
        return cast(Tensor, getattr(self.wrapper, self.names[side]))

    def trained(self, side: Side) -> Tensor:
        """Return the data of the factor that trains on a side, as columns, (size, units)."""
        A_or_B = self.tensor(side).data
        return A_or_B.T if side == "A" else A_or_B

    def frame(self, side: Side) -> Tensor:
        """Return the data of the factor that is frozen on a side, as columns, (size, units)."""
        return self.trained(_other(side))

    def train(self, side: Side) -> None:
        """Train one factor, and freeze the other one.

        The trained factor is zero at the start, and so it closes a unit.
        """
        frozen = self.tensor(_other(side))
        frozen.requires_grad_(False)
        frozen.grad = None
        self.tensor(side).requires_grad_(True)
        dims = self.wrapper.axes[self.axis]
        in_order = (self.names[_other(side)], self.names[side])
        self.wrapper.axes = {self.axis: {name: dims[name] for name in in_order}}

    def check_room(self, side: Side, sketch: str) -> None:
        """Refuse a frame with more columns than rows, which cannot be orthonormal.

        Raises:
            UserError: names the layer.
        """
        size, units = self.frame(side).shape
        if sketch == "orthonormal" and units > size:
            raise UserError(
                f"{self.path} has {units} units, and a frame of RACLoRA there has at most {size} "
                f"orthonormal columns; lower the rank or the cap, or use sketch='gaussian'."
            )


def trained_factors(path: str, wrapper: Parameterization) -> TrainedFactors:
    """Return the factors of a wrapper.

    Raises:
        UserError: if its change is no product of two trained tensors with one axis between them.
    """
    trained = {id(parameter): name for name, parameter in wrapper.own_parameters()}
    product = wrapper.scaled_factors() if isinstance(wrapper, LowRankUpdate) else None
    names = [trained.get(id(factor)) for factor in product[:2]] if product else []
    units = next(iter(wrapper.axes.values())) if len(wrapper.axes) == 1 else {}
    if len(trained) != 2 or len(names) != 2 or set(units) != set(names):
        raise UserError(
            f"{path}: RACLoRA freezes one of the two trained factors of a product, and "
            f"{type(wrapper).__name__} has no such two; use LoRA, or another strategy such as "
            f"ChainOfLoRA."
        )
    B, A = cast(list[str], names)
    return TrainedFactors(path, wrapper, next(iter(wrapper.axes)), {"A": A, "B": B})


def random_frame(size: int, units: int, sketch: str, random: torch.Generator) -> Tensor:
    """Draw the columns of a frame, (size, units), in float64.

    Args:
        size: length of a column.
        units: number of columns.
        sketch: "orthonormal", which is uniform over all frames, or "gaussian", N(0, 1 / size).
        random: CPU generator.
    """
    gaussian = torch.randn(size, units, generator=random, dtype=torch.float64)
    if sketch == "gaussian" or not units:
        return gaussian / math.sqrt(size)
    Q, R = torch.linalg.qr(gaussian)
    # With a positive diagonal of R the factorization is unique, and Q is uniform.
    return cast(Tensor, Q * R.diagonal().sign())


@torch.no_grad()
def complete_frame(frame: Tensor, trained: Tensor) -> None:
    """Make the last columns of a frame orthonormal to those before them, in place.

    Columns that are orthonormal stay to the last bit. Nothing changes if a unit to be changed is in
    use, which is not so for the units that an allocator has grown.

    Args:
        frame: columns, (size, units).
        trained: the other factor, whose columns are zero where a unit has no effect.
    """
    exact = frame.double().cpu()
    identity = torch.eye(frame.shape[1], dtype=exact.dtype)
    is_wrong = ((exact.T @ exact - identity).abs() > ORTHONORMAL).triu().any(0)
    if not is_wrong.any():
        return
    first = int(is_wrong.nonzero()[0])
    if trained[:, first:].any():
        return
    Q, R = torch.linalg.qr(exact)
    frame[:, first:] = (Q * R.diagonal().sign())[:, first:].to(frame)


def _other(side: Side) -> Side:
    return "B" if side == "A" else "A"
