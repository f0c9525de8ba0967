"""Stacks of a wrapper: dimensions that grow between rounds of training and that hold no units."""

from collections.abc import Iterator, Mapping
from typing import cast

from torch import Tensor, nn

from adaptrank._errors import UserError
from adaptrank.axes.optimizer_state import replace_units
from adaptrank.parameterizations import Parameterization, wrappers


def resize_stack(wrapper: Parameterization, stack: str, size: int) -> None:
    """Give every tensor of a stack this size. Added slices are zero, and come last.

    A parameter stays the same object, so that tied layers and optimizers keep it. Its gradient is
    dropped. One that a tied layer has resized already stays as it is.

    Args:
        wrapper: the wrapper.
        stack: name of the stack, a key of `wrapper.stacks`.
        size: number of slices.
    """
    for name, dim in wrapper.stacks[stack].items():
        tensor = cast(Tensor, getattr(wrapper, name))
        present = tensor.shape[dim]
        if present == size:
            continue
        shape = list(tensor.shape)
        shape[dim] = max(0, size - present)
        replace_units(tensor, dim, range(min(present, size)), tensor.new_zeros(shape), ())


def stored_stacks(
    model: nn.Module, state_dict: Mapping[str, Tensor]
) -> Iterator[tuple[Parameterization, str, int]]:
    """Yield (wrapper, stack, size) of each stack that a state dict of the model holds.

    Raises:
        UserError: if the tensors of one stack are stored with different sizes, or with none.
    """
    paths = {module: path for path, module in model.named_modules()}
    for wrapper in wrappers(model):
        for stack, tensors in wrapper.stacks.items():
            sizes = {}
            for name, dim in tensors.items():
                key = f"{paths[wrapper]}.{name}".removeprefix(".")
                if key in state_dict:
                    present = cast(Tensor, getattr(wrapper, name))
                    sizes[key] = _size(key, state_dict[key], present.dim(), dim)
            if not sizes:
                continue
            size = next(iter(sizes.values()))
            if len(set(sizes.values())) > 1 or size < wrapper.stack_floors.get(stack, 0):
                listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
                raise UserError(
                    f"The tensors of {paths[wrapper]}:{stack} were stored with sizes that do not "
                    f"fit ({listed}); the file is damaged."
                )
            yield wrapper, stack, size


def _size(key: str, stored: Tensor, dimensions: int, dim: int) -> int:
    """Return the size of a stored tensor in a dimension that counts slices."""
    if stored.dim() != dimensions:
        raise UserError(
            f"{key} was stored with shape {tuple(stored.shape)}, and has {dimensions} dimension(s) "
            f"here; the file is damaged, or of another model."
        )
    return stored.shape[dim]
