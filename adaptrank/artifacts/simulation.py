"""One training step on tensors without values: the memory it holds, and the products it computes.

On the meta device every operation of a step runs with shapes and dtypes alone. What would be
allocated is counted, and so are floating-point operations.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from adaptrank.artifacts.known_shapes import KnownShapes

FEW = (2, 3)
"""Numbers of blocks of which a step is run, where all blocks are equal."""


@dataclass(frozen=True)
class SimulatedStep:
    """Cost of one forward and backward pass.

    Args:
        activations: most bytes that are held at once beside weights, gradients and optimizer.
        flops: floating-point operations of matrix products.
    """

    activations: int
    flops: int


def simulate_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    fused_attention: bool = True,
    shapes: KnownShapes | None = None,
) -> SimulatedStep:
    """Run a forward and a backward pass without values, and return what it takes.

    Where all blocks of a model are equal, passes through two and through three of them are run,
    and each further block takes what the third one does.

    Args:
        model: on the meta device. Gradients are there from the beginning, and do not count.
        loss: computes the loss of a batch on the meta device.
        fused_attention: whether attention keeps queries, keys, values, the output and one number a
            row, as the fused kernels of PyTorch do, and no matrix of probabilities.
        shapes: results of an earlier step. Steps that share it are quicker.

    Raises:
        Exception: of PyTorch, if the step reads a value, which no tensor has here.
    """
    shapes = KnownShapes() if shapes is None else shapes
    blocks = equal_blocks(model)
    if blocks is None:
        return _simulate(model, loss, fused_attention, shapes)
    steps = []
    # The first pass is left out: a module may find something out once.
    for count in (FEW[0], *FEW):
        with blocks.only(count):
            steps.append(_simulate(model, loss, fused_attention, shapes))
    _, two, three = steps
    more = len(blocks.modules) - FEW[1]
    return SimulatedStep(
        three.activations + more * (three.activations - two.activations),
        three.flops + more * (three.flops - two.flops),
    )


@dataclass(frozen=True)
class Blocks:
    """The equal blocks of a model.

    Args:
        parent: module that holds their list.
        name: name of the list.
        modules: the list.
    """

    parent: nn.Module
    name: str
    modules: nn.ModuleList

    @contextmanager
    def only(self, count: int) -> Iterator[None]:
        """Within the block, let the model have no more than the first blocks."""
        setattr(self.parent, self.name, nn.ModuleList(list(self.modules)[:count]))
        try:
            yield
        finally:
            setattr(self.parent, self.name, self.modules)


def equal_blocks(model: nn.Module) -> Blocks | None:
    """Return the blocks of a model, if it has one list of them and all of them are equal."""
    lists = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [
        (path, modules)
        for path, modules in lists
        if not any(path.startswith(f"{other}.") for other, _ in lists)
    ]
    long = [(path, modules) for path, modules in outer if len(modules) > FEW[1] + 1]
    if len(long) != 1:
        return None
    path, modules = long[0]
    signatures = {_signature(block) for block in modules}
    if len(signatures) != 1:
        return None
    parent, _, name = path.rpartition(".")
    return Blocks(model.get_submodule(parent), name, modules)


def _signature(block: nn.Module) -> tuple[Any, ...]:
    """Return the kinds of a block's modules, and its parameters, as a value to compare."""
    # Of blocks in a row, gradient checkpointing may recompute only some.
    kinds = tuple(
        (name, type(module), bool(getattr(module, "gradient_checkpointing", False)))
        for name, module in block.named_modules()
    )
    parameters = tuple(
        (name, parameter.shape, parameter.dtype, parameter.requires_grad)
        for name, parameter in block.named_parameters()
    )
    return kinds + parameters


def _simulate(
    model: nn.Module, loss: Callable[[], Tensor], fused_attention: bool, shapes: KnownShapes
) -> SimulatedStep:
    """Run a forward and a backward pass of a model as it is."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    attention = _FusedAttention() if fused_attention else nullcontext()
    counter = _Counter([*model.parameters(), *model.buffers()], shapes)
    try:
        with counter, attention:
            loss().backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    attended = attention.flops if isinstance(attention, _FusedAttention) else 0
    return SimulatedStep(counter.peak, counter.flops + attended)


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of storages that operations make, while they live, and operations.

    Args:
        known: tensors whose storages do not count.
        shapes: runs the operations.
    """

    def __init__(self, known: Iterable[Tensor], shapes: KnownShapes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes = shapes
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._seen: Any = WeakIdKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        count = flop_registry.get(operation.overloadpacket)
        result, flops = self.shapes.run(operation, args, dict(kwargs or {}), count)
        self.flops += flops
        # A view, and an operation in place, make no storage.
        if not operation.is_view:
            self._note(result)
        return result

    def _note(self, result: Any) -> None:
        if isinstance(result, tuple | list):
            for value in result:
                self._note(value)
        elif isinstance(result, Tensor) and result.is_meta:
            storage = result.untyped_storage()
            if storage not in self._seen:
                self._seen[storage] = True
                size = storage.nbytes()
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


class _FusedAttention:
    """Stands for the fused attention of PyTorch, which keeps no matrix of probabilities.

    A block that is computed again in the backward pass finds it as well.

    Attributes:
        flops: floating-point operations of its products, forward and backward. The backward pass
            computes the scores again.
    """

    def __init__(self) -> None:
        self.flops = 0
        self._attention = F.scaled_dot_product_attention

    def __enter__(self) -> "_FusedAttention":
        F.scaled_dot_product_attention = self
        return self

    def __exit__(self, *_: object) -> None:
        F.scaled_dot_product_attention = self._attention

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the output, (..., queries, d) of queries (..., queries, d)."""
        if query.device.type != "meta" or kwargs.get("dropout_p"):
            return self._attention(query, key, value, *args, **kwargs)
        pairs = query.shape[:-1].numel() * key.shape[-2]
        forward = 2 * pairs * (query.shape[-1] + value.shape[-1])
        backward = forward + 2 * pairs * (2 * query.shape[-1] + value.shape[-1])
        self.flops += forward + (backward if query.requires_grad else 0)
        output: Tensor = _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return output


class _Attention(torch.autograd.Function):
    """Attention without values: shapes, and what a fused kernel keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        normalizers = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, normalizers)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
