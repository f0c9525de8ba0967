"""Declarations of a method about itself, as class attributes that the whole library reads."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import nn

from adaptrank import layers
from adaptrank._options import DECAY, POSITIVE, Range
from adaptrank.parameterizations.capabilities import DEFAULT_CAPABILITIES
from adaptrank.parameterizations.tensor_kinds import TensorKind


class StudiedRate(NamedTuple):
    """Learning rate of AdamW that the trials of a study chose for a method.

    Args:
        rate: the rate.
        page: page of the documentation with the study.
    """

    rate: float
    page: str


class Traits:
    """Declarations of a method. A constructor may set those that depend on its arguments."""

    source: ClassVar[str]
    """arXiv id of the method."""
    ranges: ClassVar[Mapping[str, Range]] = {
        "alpha": POSITIVE,
        "scale": POSITIVE,
        "dropout": DECAY,
    }
    """Numeric argument -> the values that make sense. A class adds its own to those of its bases.
    Any other number has to be finite, and whole where its annotation says so. Bounds that depend
    on the layer are checked by the constructor."""

    # What it wraps.

    accepts: ClassVar[tuple[type[nn.Module], ...]] = layers.LINEAR
    """Kinds of layers that can be wrapped. Override `wraps` if types cannot say it."""
    reads_weight: ClassVar[bool] = False
    """Whether the formula reads the weight that it changes, rather than only adding to it. The
    wrapped layer must then have a dense weight."""
    reads_blocks: ClassVar[bool] = False
    """Whether the formula reads the spectrum or the blocks of W. `adapt` then splits a fused
    projection (query, key and value in one layer), unless it is told otherwise."""

    # What it computes.

    mergeable: bool = True
    """Whether W' exists as a dense matrix that can replace the layer's weight."""
    starts_at_base: bool = True
    """Whether training starts at what the frozen layer computes, to the last bit."""
    recomputable: ClassVar[bool] = True
    """Whether a forward pass may be computed a second time, as gradient checkpointing does."""
    exact_gradient: ClassVar[Mapping[str, Any]] = {}
    """Arguments under which the backward pass is the derivative of the forward pass, for a method
    whose default is another gradient by design."""

    # What it trains.

    axes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = {}
    """Rank axis -> {tensor name: the dimension that counts units}.

    The tensor named last is the closing factor: it is zero in a fresh or closed unit. A square
    tensor has several dimensions, (0, 1): rows that read from other units, and columns that feed
    them. Its further dimensions are zero in a fresh unit, too. May be a property."""
    stacks: Mapping[str, Mapping[str, int]] = {}
    """Stack -> {tensor name: the dimension that grows with it}. A strategy adds to a stack between
    rounds of training. Its slices are no units: nothing scores them, and no allocator moves them. A
    file or a checkpoint says how many there are."""
    stack_floors: Mapping[str, int] = {}
    """Stack -> the least number of its slices, where that is not 0."""
    shared: tuple[str, ...] = ()
    """Tensors that `adapt` ties across layers."""
    shared_over: str = "kind"
    """Layers that share them: those of one "kind" and shape, of one "block", or "all"."""
    no_decay: ClassVar[tuple[str, ...]] = ()
    """Tensors exempt from weight decay: scales, gates and magnitudes."""
    kinds: ClassVar[Mapping[str, str]] = {}
    """Tensor, or module of the wrapper's own -> its kind, a member of `TensorKind` or its word.
    All others are "factors". A learning rate can be given to a kind."""

    @classmethod
    def kind_of(cls, name: str) -> str:
        """Return the kind of a trained tensor, by its name in the wrapper."""
        first, *_ = name.split(".")
        return str(cls.kinds.get(first, TensorKind.FACTORS))

    studied_rate: ClassVar[StudiedRate | None] = None
    """Learning rate that a study of this library chose for the method, or None without a study.
    `fit` warns about a rate that is more than twenty times larger or smaller."""

    # What allocators and rank initializers ask.

    capabilities: ClassVar[frozenset[str]] = DEFAULT_CAPABILITIES
    """Capabilities of the axes beside pruning: members of `Capability`, or their words."""
    parts: int = 1
    """Number of parts of the layer that units are spread over. A rule that chooses a number of
    units chooses a multiple of it."""
    input_factor: Mapping[str, str] = {}
    """Axis -> its trained tensor (units, n) that multiplies the input."""
    features: Mapping[str, tuple[int | None, int | None]] = {}
    """Tensor -> (the dimension that counts outputs, the dimension that counts inputs). These are
    cut when the layer loses outputs or inputs."""
