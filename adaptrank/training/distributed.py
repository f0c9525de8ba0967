"""Several processes: adapters stay out of what replicates or shards the base, and their gradients are averaged by themselves.

A bucketed reducer cannot follow tensors whose shape changes, and a sharder cannot cut them. Adapters are small: one flat all-reduce
after each backward pass does the same. The frozen base has no gradients to average.
"""

from collections.abc import Iterable, Sequence
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
from torch import Tensor, nn

from adaptrank._collectives import several
from adaptrank._errors import UserError
from adaptrank.axes import fit_ranks
from adaptrank.parameterizations import Parameterization, adapter_parameters, wrappers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@torch.no_grad()
def average_gradients(tensors: Sequence[Tensor]) -> None:
    """Average `.grad` over all processes, by one all-reduce a dtype.

    Where a tensor has a gradient on some processes only, the others count as zero; where it has none on any, it has none afterwards:
    an optimizer would move it.
    """
    if not several():
        return
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), group in groups.items():
        have = torch.tensor(
            [float(tensor.grad is not None) for tensor in group], device=device, dtype=dtype
        )
        values = [
            torch.zeros_like(t).flatten() if t.grad is None else t.grad.flatten() for t in group
        ]
        flat = torch.cat([have, *values])
        dist.all_reduce(flat)
        counts, *parts = torch.split(flat, [len(group), *(t.numel() for t in group)])
        for tensor, count, part in zip(group, counts.tolist(), parts, strict=True):
            if count:
                tensor.grad = (part / dist.get_world_size()).view_as(tensor)


@torch.no_grad()
def copy_from_first(model: nn.Module, more: Iterable[Tensor] = ()) -> None:
    """Give every process the adapters of the first, parameters and buffers such as indices, and further tensors."""
    if not several():
        return
    own = [tensor for wrapper in wrappers(model) for _, tensor in _own(wrapper)]
    for tensor in {id(tensor): tensor for tensor in [*own, *more]}.values():
        value = tensor.detach().contiguous()
        dist.broadcast(value, 0)
        tensor.data.copy_(value)


def _own(wrapper: Parameterization) -> Iterable[tuple[str, Tensor]]:
    named = [
        *wrapper.named_parameters(remove_duplicate=False),
        *wrapper.named_buffers(remove_duplicate=False),
    ]
    return [(name, tensor) for name, tensor in named if not name.startswith("base.")]


def keep_apart(trainer: Trainer, owner: object) -> None:
    """Have the trainer's strategy leave adapters out; call it before the strategy sets the module up, and `rejoin` after the run.

    Args:
        trainer: whose strategy.
        owner: who calls `average_adapters` after each backward pass; of several the last one.
    Raises:
        ValueError: for a strategy that flattens or shards all there is.
    """
    strategy: Strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.configure_ddp = partial(_configure_ddp, strategy)  # type: ignore[method-assign]
    elif isinstance(strategy, ModelParallelStrategy):
        strategy.load_checkpoint = partial(_load_checkpoint, strategy)  # type: ignore[method-assign]
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise UserError(
            f"{type(strategy).__name__} takes hold of all parameters, and ranks that move change their shapes; use strategy=ddp, or "
            f"ModelParallelStrategy to shard the frozen weights."
        )
    strategy.__dict__[_OWNER] = owner


def rejoin(trainer: Trainer) -> None:
    """Undo `keep_apart`: a later run without an allocator is the strategy's own matter."""
    for name in ("configure_ddp", "load_checkpoint", _OWNER):
        trainer.strategy.__dict__.pop(name, None)
    trainer.lightning_module.__dict__.pop("_ddp_params_and_buffers_to_ignore", None)


_OWNER = "_averages_adapters"


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
    """Load as the strategy does, which asks no hook of the module, once the axes have the stored sizes."""
    if not Path(path).is_file():
        raise UserError(
            f"{path} is a checkpoint in shards, which ranks that move cannot be read from; save it whole, with "
            f"ModelParallelStrategy(save_distributed_checkpoint=False)."
        )
    assert strategy.lightning_module is not None
    fit_ranks(
        strategy.lightning_module, torch.load(path, mmap=True, weights_only=True)["state_dict"]
    )
    return ModelParallelStrategy.load_checkpoint(strategy, path, *args, **kwargs)


def apart(module: nn.Module) -> set[str]:
    """Full names of all parameters and buffers of adapters."""
    return {
        f"{path}.{name}".removeprefix(".")
        for path, wrapper in module.named_modules(remove_duplicate=False)
        if isinstance(wrapper, Parameterization)
        for name, _ in _own(wrapper)
    }


def average_adapters(
    trainer: Trainer, module: LightningModule, owner: object, more: Iterable[Tensor] = ()
) -> None:
    """Average the gradients of adapters, and of further tensors, where the strategy leaves that to us; done by the owner only.

    A module that shards its base calls it without one, which counts where no allocator owns it.
    """
    sharded = isinstance(
        trainer.strategy, ModelParallelStrategy
    )  # which averages nothing that is whole
    if trainer.strategy.__dict__.get(_OWNER) is owner and (owner is not None or sharded):
        own = (
            [p for p in module.parameters() if p.requires_grad]
            if sharded
            else adapter_parameters(module)
        )
        average_gradients([*own, *more])


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of the lists that hold wrappers: the blocks of a transformer."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return [
        block
        for blocks in lists
        for block in blocks
        if wrappers(block) and not isinstance(block, nn.ModuleList)
    ]


def shard_frozen(model: nn.Module, blocks: Iterable[nn.Module], mesh: "DeviceMesh") -> None:
    """Shard frozen weights over the processes (FSDP2), block by block; what trains stays whole on each.

    Args:
        model: with adapters.
        blocks: modules that are gathered for their forward and backward pass, one at a time; what is in no block stays whole.
        mesh: of the data parallel processes.
    """
    from torch.distributed.fsdp import fully_shard

    whole = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for block in blocks:
        fully_shard(block, mesh=mesh, ignored_params=set(whole))
    copy_from_first(model, whole)
