"""Averages of the weights (EMA, SWA) that average what trains, and share what is frozen.

Lightning's callbacks copy a whole module, average all of its parameters and buffers, and put the
copy into the checkpoint. A frozen weight must not be averaged: 0.9 w + 0.1 w is not always w, and
the average of an index is no index. Here only trained tensors are averaged, and frozen parameters
are those of the module itself, which also saves the memory of a second backbone.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from adaptrank.artifacts import trained_modules

STATE_OF_SWA = "average_model_state"
"""Key of the averaged weights in the state of StochasticWeightAveraging."""


def average_trained_only(trainer: Trainer, module: LightningModule) -> None:
    """Let the averaging callbacks of a trainer average trained tensors only.

    Call it after the callbacks' setup. StochasticWeightAveraging copies the module before it is
    built, so its copy is made again.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, WeightAveraging) and callback._average_model is not None:
            averaged = callback._average_model
            _share_frozen(averaged.module, module)
            averaged.update_parameters = partial(  # type: ignore[method-assign]
                update_average, averaged
            )
        elif isinstance(callback, StochasticWeightAveraging):
            module.configure_model()
            callback._average_model = _copy_trained(module)


def averaged_models(trainer: Trainer | None) -> Iterator[nn.Module]:
    """Yield the averaged copies of the module that callbacks of a trainer hold."""
    callbacks: list[Callback] = [] if trainer is None else trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if not isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            continue
        averaged: nn.Module | None = callback._average_model
        if averaged is not None:
            yield averaged.module if isinstance(averaged, AveragedModel) else averaged


def _share_frozen(averaged: nn.Module, module: nn.Module) -> None:
    """Replace the frozen parameters of a copy by those of the module."""
    owners = dict(averaged.named_modules(remove_duplicate=False))
    for path, owner in module.named_modules(remove_duplicate=False):
        for name, parameter in owner._parameters.items():
            if parameter is not None and not parameter.requires_grad:
                owners[path]._parameters[name] = parameter


def _copy_trained(module: LightningModule) -> LightningModule:
    """Copy a module without its frozen parameters, which the copy shares."""
    frozen = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, frozen)


@torch.no_grad()
def update_average(averaged: AveragedModel, module: Any) -> None:
    """Update the average of what trains, and copy all buffers that do not.

    It stands in for `AveragedModel.update_parameters`.

    Args:
        averaged: the average, with its averaging function.
        module: an AdaptedModule.
    """
    pairs = [
        (average.detach(), parameter.detach().to(average.device))
        for average, parameter in zip(
            averaged.module.parameters(), module.parameters(), strict=True
        )
        if parameter.requires_grad
    ]
    whole = {id(tensor) for tensor in trained_modules(module.model).values()}
    buffers = zip(averaged.module.buffers(), module.buffers(), strict=True)
    for average, buffer in buffers:
        trains = id(buffer) in whole and buffer.is_floating_point()
        if averaged.use_buffers and trains:
            pairs.append((average, buffer.to(average.device)))
        else:
            average.copy_(buffer)
    _average(averaged, pairs)
    averaged.n_averaged += 1


def _average(averaged: AveragedModel, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Move each average towards its value, or onto it at the first time."""
    if averaged.n_averaged == 0:
        for average, value in pairs:
            average.copy_(value)
        return
    if averaged.multi_avg_fn is not None:
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for average, value in pairs:
            groups.setdefault((average.device, average.dtype), []).append((average, value))
        for (device, _), group in groups.items():
            averages, values = [pair[0] for pair in group], [pair[1] for pair in group]
            averaged.multi_avg_fn(averages, values, averaged.n_averaged.to(device))
        return
    average_function: Callable[..., Tensor] = (
        averaged.avg_fn or get_swa_avg_fn()  # type: ignore[no-untyped-call]
    )
    for average, value in pairs:
        count = averaged.n_averaged.to(average.device)
        average.copy_(average_function(average, value, count))


def filter_weights(checkpoint: dict[str, Any], trained: Mapping[str, Tensor]) -> None:
    """Leave frozen tensors out of every state of the module in a checkpoint.

    These are the weights themselves, which a callback may have replaced by averaged ones, the
    weights that go on training beside an average, and the average in the state of a callback.

    Args:
        checkpoint: changed in place.
        trained: names of the tensors to keep.
    """
    for key in ("state_dict", "current_model_state"):
        if key in checkpoint:
            checkpoint[key] = _only(checkpoint[key], trained)
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, dict) and isinstance(state.get(STATE_OF_SWA), Mapping):
            state[STATE_OF_SWA] = _only(state[STATE_OF_SWA], trained)


def _only(state: Mapping[str, Any], trained: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if name in trained}


def fill_frozen(module: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Add the frozen tensors to a state dict that is loaded strictly. This is a load pre-hook."""
    strict = rest[1] if len(rest) > 1 else True
    if not strict or module.backbone is None:
        return
    trained = module.trained_state()
    for name, value in module.state_dict().items():
        if name not in trained:
            state_dict.setdefault(f"{prefix}{name}", value)
