"""Compile the blocks of a transformer, so that ranks and lengths may change without a new graph.

A transformer repeats one block. Compiled block by block, all of them share a few graphs. There is
one graph for blocks whose input needs no gradient and one for the others, and further ones for
evaluation, or where some wrappers of a block have no units, or one.

PyTorch takes the sizes of parameters as constants. Here the dimensions that count units are marked
as dynamic, and so are the dimensions of the input that count rows and tokens.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptrank._errors import UserError, did_you_mean
from adaptrank.parameterizations import Parameterization, wrappers
from adaptrank.training.compiler_settings import BLOCK_COMPILER

Model = TypeVar("Model", bound=nn.Module)

OPTIONS = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
"""Options of `torch.compile`."""
MOST_GRAPHS = 64
"""Graphs of one block before PyTorch gives up compiling it. PyTorch's own limit is 8."""


def compile_blocks(model: Model, **options: Any) -> Model:
    """Compile each block of a transformer in place, adapters included.

    The model keeps its structure, and the names of its tensors. Ranks may change from block to
    block and from step to step. A call that fills a cache, as in generation, runs as before. A
    model of transformers fills one in training as well, unless `model.config.use_cache` is False.

    The compiler's settings change only while a block is compiled. Before torch 2.13 its limit of
    recompilations, `torch._dynamo.config.cache_size_limit`, becomes `MOST_GRAPHS` for good.

    Args:
        model: a model with adapters. Its blocks are the members of its module lists.
        options: options of `torch.compile`. `dynamic=False` compiles anew for each number of rows
            and each length, and still not for each rank.

    Returns:
        The same model.
    Raises:
        UserError: if the model has no blocks, or for an option that `torch.compile` does not take.
    """
    check_compile_options(options)
    blocks = list(transformer_blocks(model))
    if not blocks:
        raise UserError(
            f"{type(model).__name__} has no module list with blocks to compile; compile it as a "
            f"whole, torch.compile(model)."
        )
    if "recompile_limit" in OPTIONS:
        options = {"recompile_limit": MOST_GRAPHS, **options}
    else:
        # The setting's name up to torch 2.6, and an alias later.
        torch._dynamo.config.cache_size_limit = MOST_GRAPHS
    marks_lengths = options.get("dynamic") is not False
    for block in blocks:
        block.compile(**options)
        block._compiled_call_impl = _CompiledCall(block, marks_lengths)
    return model


def transformer_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of module lists that hold further modules, outermost lists only."""
    for child in model.children():
        if not isinstance(child, nn.ModuleList):
            yield from transformer_blocks(child)
            continue
        for member in child:
            if isinstance(member, nn.ModuleList):
                yield from transformer_blocks(nn.ModuleList([member]))
                continue
            inner = member.innermost if isinstance(member, Parameterization) else member
            if any(True for _ in inner.children()):
                yield member


class _CompiledCall:
    """The call of a compiled block.

    Args:
        block: a module that `nn.Module.compile` has compiled.
        marks_lengths: whether the numbers of rows and tokens are dynamic from the first graph on.
    """

    def __init__(self, block: nn.Module, marks_lengths: bool) -> None:
        self._block = block
        self._compiled: Callable[..., Any] = block._compiled_call_impl  # type: ignore[assignment]
        self._marks_lengths = marks_lengths

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A cache has the number of the layer as an index, so each block would have graphs of its
        # own. A model that is compiled as a whole takes its blocks in.
        if _has_cache(args, kwargs) or torch.compiler.is_compiling():
            return self._block._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        with BLOCK_COMPILER.calling(partial(self._mark, args, kwargs)):
            return self._compiled(*args, **kwargs)

    def _mark(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Mark the sizes that may change, before the block is compiled."""
        mark_ranks(self._block)
        if self._marks_lengths:
            mark_lengths([*args, *kwargs.values()])


def mark_ranks(model: nn.Module) -> None:
    """Mark the dimensions that count units as dynamic, in every tensor of every rank axis."""
    from torch._dynamo import maybe_mark_dynamic

    for wrapper in wrappers(model):
        for axis in wrapper.axes:
            for name, dim in wrapper.axis_tensors(axis):
                maybe_mark_dynamic(getattr(wrapper, name), dim)


def mark_lengths(inputs: Iterable[Any]) -> None:
    """Mark the dimensions that are as long as the batch or its sequences as dynamic.

    Args:
        inputs: inputs of a block. The first tensor holds the hidden states (rows, tokens, d).
    """
    from torch._dynamo import maybe_mark_dynamic

    tensors = list(_tensors(inputs))
    lengths = tensors[0].shape[:-1] if tensors else ()
    for tensor in tensors:
        # A length of one may stand for a dimension that is broadcast.
        dims = [dim for dim, size in enumerate(tensor.shape) if size > 1 and size in lengths]
        maybe_mark_dynamic(tensor, dims)


def _has_cache(args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    from transformers import Cache

    return any(isinstance(value, Cache) for value in (*args, *kwargs.values()))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


# ---- options


def check_compile_options(options: Mapping[str, Any], option: str = "compile") -> None:
    """Check the options of `torch.compile`, before anything is loaded.

    Args:
        options: the options, by name.
        option: what the user calls them, for the errors.
    Raises:
        UserError: naming the option, its value and what fits.
    """
    for name in options:
        if name not in OPTIONS:
            raise UserError(
                f"{option} has no option {name!r}; torch.compile takes {', '.join(OPTIONS)}."
                f"{did_you_mean(name, OPTIONS)}"
            )
    for name, fits in (("mode", _modes), ("backend", _backends)):
        value = options.get(name)
        if value is None or callable(value):
            continue
        choices = fits()
        if value not in choices:
            raise UserError(
                f"{option}: {name}={value!r} is unknown; use one of {', '.join(choices)}."
                f"{did_you_mean(value, choices)}"
            )
    if options.get("mode") is not None and options.get("options") is not None:
        raise UserError(f"{option}: a mode sets options of its own; give mode or options.")


def _modes() -> list[str]:
    from torch._inductor import list_mode_options

    return list(list_mode_options())


def _backends() -> list[str]:
    from torch._dynamo import list_backends

    return sorted(list_backends(None))
