"""Several processes: adapters are kept apart from what replicates or shards the frozen model.

A bucketed reducer cannot follow tensors whose shape changes, and a sharder cannot cut them.
Adapters are small, so one flat all-reduce after each backward pass averages their gradients. The
frozen base has no gradients to average.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import Tensor, nn

from adaptrank._collectives import several
from adaptrank._errors import UserError
from adaptrank.axes import fit_ranks
from adaptrank.parameterizations import Parameterization, adapter_parameters, wrappers
from adaptrank.training.moving import to_device

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@torch.no_grad()
def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Average `.grad` over all processes, by one all-reduce for each device and dtype.

    A missing gradient counts as zero if another process has one. A tensor without a gradient on
    any process has none afterwards, since an optimizer would move it.
    """
    if not several():
        return
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), group in groups.items():
        have = [float(tensor.grad is not None) for tensor in group]
        values = [
            torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten() for t in group
        ]
        flat = torch.cat([to_device(torch.tensor(have, dtype=dtype), device), *values])
        dist.all_reduce(flat)
        counts, *parts = torch.split(flat, [len(group), *(t.numel() for t in group)])
        # The device is read only where another process may have a gradient that is missing here.
        is_there = have if all(have) else counts.tolist()
        for tensor, count, part in zip(group, is_there, parts, strict=True):
            if count:
                tensor.grad = (part / dist.get_world_size()).view_as(tensor)


@torch.no_grad()
def copy_from_first(model: nn.Module, more: Iterable[Tensor] = ()) -> None:
    """Copy the adapters of the first process, and further tensors, to all processes.

    Buffers, such as the indices of units, are copied as well.
    """
    if not several():
        return
    own = [tensor for wrapper in wrappers(model) for _, tensor in _own_tensors(wrapper)]
    for tensor in {id(tensor): tensor for tensor in [*own, *more]}.values():
        value = tensor.detach().contiguous()
        dist.broadcast(value, 0)
        tensor.data.copy_(value)


def _own_tensors(wrapper: Parameterization) -> Iterable[tuple[str, Tensor]]:
    """Yield the tensors of a wrapper and of its parts, also those that no file holds."""
    yield from wrapper.named_parameters(recurse=False, remove_duplicate=False)
    yield from wrapper.named_buffers(recurse=False, remove_duplicate=False)
    for name, module in wrapper.own_modules().items():
        yield from module.named_parameters(name, remove_duplicate=False)
        yield from module.named_buffers(name, remove_duplicate=False)


def check_launcher(trainer: Trainer) -> None:
    """Check that training happens in this process, where its result is needed.

    Raises:
        UserError: if the strategy trains in child processes that end with what they trained.
    """
    strategy = trainer.strategy
    if isinstance(getattr(strategy, "launcher", None), _MultiProcessingLauncher):
        method = getattr(strategy, "_start_method", "fork")
        raise UserError(
            f"{type(strategy).__name__} with start_method={method!r} (ddp_{method}, or "
            f"ddp_notebook) trains in child processes, and what they train is lost when they end: "
            f"use strategy=ddp, which starts this program once for each device."
        )


def keep_apart(trainer: Trainer) -> None:
    """Have the trainer's strategy leave adapters out; call it before the strategy sets up.

    `rejoin` undoes it after the run. In between, `average_adapters` has to be called after each
    backward pass.

    Raises:
        ValueError: if the strategy flattens or shards all parameters.
    """
    strategy: Strategy = trainer.strategy
    check_launcher(trainer)
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp = partial(_configure_ddp, strategy)  # type: ignore[method-assign]
    elif isinstance(strategy, ModelParallelStrategy):
        strategy.load_checkpoint = partial(_load_checkpoint, strategy)  # type: ignore[method-assign]
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"{type(strategy).__name__} takes hold of all parameters, and ranks that move change "
            f"their shapes; use strategy=ddp, or ModelParallelStrategy to shard the frozen weights."
        )
    strategy.__dict__[_APART] = True


def rejoin(trainer: Trainer) -> None:
    """Undo `keep_apart`, so that a later run without an allocator is left to the strategy."""
    for name in ("configure_ddp", "load_checkpoint", _APART):
        trainer.strategy.__dict__.pop(name, None)
    trainer.lightning_module.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)


_APART = "_adapters_are_apart"


def _configure_ddp(strategy: DDPStrategy) -> None:
    module = strategy.lightning_module
    assert module is not None
    names = apart(module)
    module._ddp_params_and_buffers_to_ignore = names  # type: ignore[assignment]  # where DDP looks
    if any(
        p.requires_grad and name not in names
        for name, p in module.named_parameters(remove_duplicate=False)
    ):
        strategy.model = strategy._setup_model(module)  # a head, or modules that train whole
        strategy._register_ddp_hooks()
    copy_from_first(module)


def _load_checkpoint(
    strategy: ModelParallelStrategy, path: Any, *args: Any, **kwargs: Any
) -> dict[str, Any]:
    """Give the axes their stored sizes, and then load as the strategy does.

    The strategy calls no hook of the module. It asks for the optimizer state of every tensor that
    trains, and a tensor that never had a gradient has none. A layer that began without units has
    such tensors.
    """
    if not Path(path).is_file():
        raise UserError(
            f"{path} is a checkpoint in shards, which ranks that move cannot be read from; save it "
            f"whole, with ModelParallelStrategy(save_distributed_checkpoint=False)."
        )
    assert strategy.lightning_module is not None
    checkpoint = torch.load(path, mmap=True, weights_only=True)
    fit_ranks(strategy.lightning_module, checkpoint["state_dict"])
    without_state: list[Tensor] = []
    for optimizer, stored in zip(
        strategy.optimizers, checkpoint.get("optimizer_states", []), strict=False
    ):
        without_state += _tensors_without_state(optimizer, stored)
    for tensor in without_state:
        tensor.requires_grad_(False)
    try:
        return ModelParallelStrategy.load_checkpoint(strategy, path, *args, **kwargs)
    finally:
        for tensor in without_state:
            tensor.requires_grad_()


def _tensors_without_state(
    optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]
) -> list[Tensor]:
    """Return the trained tensors of an optimizer that a stored state of it has no state of."""
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    labels = [label for group in stored["param_groups"] for label in group["params"]]
    return [
        tensor
        for tensor, label in zip(tensors, labels, strict=False)
        if tensor.requires_grad and label not in stored["state"]
    ]


def apart(module: nn.Module) -> set[str]:
    """Return the full names of all parameters and buffers of adapters."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, wrapper in module.named_modules(remove_duplicate=False)
        if isinstance(wrapper, Parameterization)
        for name, _ in _own_tensors(wrapper)
    }


def average_adapters(
    trainer: Trainer, module: LightningModule, more: Iterable[Tensor] = ()
) -> None:
    """Average the gradients of adapters, and of further tensors, if the strategy does not.

    A strategy that shards the base averages nothing that is whole on each process, so all trained
    parameters are averaged here. Under DDP these are the adapters, if `keep_apart` took them out.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy):
        trained = [p for p in module.parameters() if p.requires_grad]
        average_gradients([*trained, *more])
    elif trainer.strategy.__dict__.get(_APART):
        average_gradients([*adapter_parameters(module), *more])


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer: members of module lists that hold wrappers."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        block
        for blocks in lists
        for block in blocks
        if wrappers(block) and not isinstance(block, nn.ModuleList)
    ]


def shard_frozen(model: nn.Module, blocks: Iterable[nn.Module], mesh: "DeviceMesh") -> None:
    """Shard frozen weights over the processes (FSDP2), block by block.

    Trained parameters stay whole on each process.

    Args:
        model: the model with its adapters.
        blocks: modules that are gathered one at a time for their forward and backward pass. Frozen
            weights outside of all blocks stay whole.
        mesh: mesh of the data parallel processes.
    """
    from torch.distributed.fsdp import fully_shard

    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=set(whole))
    copy_from_first(model, whole)
