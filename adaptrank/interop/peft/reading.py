"""Put an adapter that HF PEFT wrote on its base, in our own classes."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaptrank import layers
from adaptrank._errors import UserError
from adaptrank.artifacts import (
    WEIGHTS,
    check_other_adapters,
    locate_adapter,
    open_weights,
    unchanged_on_error,
)
from adaptrank.axes import rank_axes
from adaptrank.injection import record_trained, wrap_targets
from adaptrank.interop.peft.configuration import read_config
from adaptrank.interop.peft.conversions import READERS, OurLayer, StoredLayer
from adaptrank.interop.peft.declared import declared_tensors
from adaptrank.interop.peft.initializations import (
    Product,
    check_initialization,
    subtracted_product,
)
from adaptrank.interop.peft.keys import split_key
from adaptrank.interop.peft.ties import tied_names, untied_tensors
from adaptrank.parameterizations import (
    Parameterization,
    enclosed,
    named_layers,
    wrapped_layers,
    wrappers,
)

Model = TypeVar("Model", bound=nn.Module)


def import_peft(
    model: Model,
    folder: str | os.PathLike[str],
    name: str = "default",
    initial: str | os.PathLike[str] | None = None,
) -> Model:
    """Put a PEFT adapter on its base: LoRA (with rsLoRA and patterns), DoRA, AdaLoRA or LoKr.

    An adapter that was initialized with PiSSA or OLoRA was trained on a base without the product of
    its first factors. Its change relative to the base itself is a LoRA of twice the rank.

    Args:
        model: the base, without an adapter of that name.
        folder: folder that PEFT's `save_pretrained` wrote, with weights in safetensors, or its
            name on the Hub, `user/name`.
        name: name of the adapter in our model.
        initial: folder of the same adapter as PEFT saved it before training. Initializations by
            data or by random numbers (CorDA, LoRA-GA, `pissa_niter_4`) need it.

    Returns:
        The same model.

    Raises:
        FileNotFoundError: if a file is missing. A pickle is never read.
        UserError: if the adapter is of another type, uses a setting that we do not understand, or
            does not fit the model, if the model has an adapter of that name, or if a module that
            PEFT trained whole would change for an adapter of another name. The model is unchanged
            then.
    """
    folder = locate_adapter(folder)
    first = None if initial is None else locate_adapter(initial)
    config, stored = read_peft(folder)
    check_initialization(config, folder, has_initial=initial is not None)
    first_factors = {} if first is None else _first_factors(first, config)
    root = enclosed(model)
    _check_name(root, name, folder)
    modules = named_layers(root)
    with unchanged_on_error(root):
        # Names of parameters are taken here, as layers that are wrapped later rename theirs.
        parameters = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        by_layer, trained_whole = _by_layer(stored, folder)
        trained_whole = declared_tensors(
            config, trained_whole, parameters, tied_names(root), folder
        )
        trained_whole = untied_tensors(root, config, trained_whole, folder)
        for path, tensors in by_layer.items():
            layer = _matrix_layer(modules, path, folder)
            subtracted: Callable[[int, float], Product | None]
            if first is None:
                subtracted = partial(subtracted_product, config, path, layer, folder)
            else:
                subtracted = partial(_scaled_product, first_factors, path, first)
            stored_layer = StoredLayer(folder, config, path, tensors, subtracted)
            converted = READERS[config["peft_type"]](stored_layer)
            _check_size(converted, path, layer, folder)
            _wrap(root, path, converted, name, folder)
        _load_whole(root, name, parameters, trained_whole, folder)
    return model


def _check_name(model: nn.Module, name: str, folder: Path) -> None:
    """Refuse a name that an adapter of the model has: the result would be a mixture of two."""
    if any(wrapper.name == name for wrapper in wrappers(model)):
        raise UserError(
            f"This model has an adapter {name!r} already, and {folder} needs a name of its own; "
            f"call import_peft(..., name='other'), or adaptrank.delete_adapter(model, {name!r}) "
            f"first."
        )


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the configuration and the tensors of a PEFT adapter.

    Raises:
        FileNotFoundError: if a file is missing.
        UserError: if a file is damaged, or we cannot read this type of adapter.
    """
    config = read_config(folder)
    with open_weights(folder / WEIGHTS) as stored:
        stored.check()
        return config, dict(stored)


def _first_factors(initial: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return {path: {name: tensor}} of the adapter as it was before training.

    Raises:
        UserError: if it is not the beginning of the adapter with this configuration.
    """
    first_config, stored = read_peft(initial)
    for key in ("peft_type", "init_lora_weights", "use_rslora", "r", "lora_alpha"):
        if first_config.get(key) != config.get(key):
            raise UserError(
                f"{initial} has {key}={first_config.get(key)!r}, and the trained adapter "
                f"{config.get(key)!r}. Give the adapter that PEFT saved before this training."
            )
    return _by_layer(stored, initial)[0]


def _scaled_product(
    first_factors: Mapping[str, Mapping[str, Tensor]],
    path: str,
    initial: Path,
    rank: int,
    scale: float,
) -> Product:
    """Return the product s B0 A0 of a layer before training, as (U, V) in float64."""
    tensors = first_factors.get(path, {})
    A, B = tensors.get("lora_A"), tensors.get("lora_B")
    if A is None or B is None:
        raise UserError(f"{initial} has no factors of {path}, which the trained adapter has.")
    return scale * B.double().flatten(1), A.double().flatten(1)


def _by_layer(
    stored: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return ({path: {name: tensor}} of adapted layers, {name: tensor} of whole modules)."""
    by_layer: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
    trained_whole: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        path, name = split_key(key, folder)
        if name is None:
            trained_whole[path] = tensor
        else:
            by_layer[path][name] = tensor
    return dict(by_layer), trained_whole


def _matrix_layer(modules: Mapping[str, nn.Module], path: str, folder: Path) -> nn.Module:
    """Return the frozen layer at a path, below its wrappers."""
    layer = modules.get(path)
    frozen = getattr(layer, "innermost", layer)
    if not isinstance(frozen, layers.MATRICES):
        raise UserError(
            f"{folder} adapts {path!r}, which is no layer of this model. Was it made for another "
            "base?"
        )
    return frozen


def _check_size(converted: OurLayer, path: str, layer: nn.Module, folder: Path) -> None:
    """Refuse a rank that no layer of this size can use, before memory is taken for it."""
    m, n = layers.shape(layer)
    rank = converted.method.keywords.get("rank")
    if isinstance(rank, int) and rank > 4 * (m + n):
        raise UserError(f"{folder}: a rank of {rank:,} for {path} of {m} x {n} is absurd.")


def _wrap(model: nn.Module, path: str, converted: OurLayer, name: str, folder: Path) -> None:
    """Wrap the layer at a path and copy the stored tensors into the wrapper."""
    wrap_targets(model, f"^{re.escape(path)}$", converted.method, name=name, split_fused=False)
    wrapper = next(w for w in wrapped_layers(model)[path].nest if w.name == name)
    _empty_axes(wrapper, converted.tensors)
    for attribute, value in converted.tensors.items():
        target = getattr(wrapper, attribute)
        if tuple(value.shape) != tuple(target.shape):
            raise UserError(
                f"{folder}: {attribute} of {path} is {tuple(value.shape)}, this model's is "
                f"{tuple(target.shape)}."
            )
        with torch.no_grad():
            target.copy_(value)
    wrapper.renew()


def _empty_axes(wrapper: Parameterization, tensors: Mapping[str, Tensor]) -> None:
    """Empty the axes of a wrapper that have no units in its stored tensors."""
    for axis in rank_axes(wrapper).values():
        layer, axis_name = axis.members[0]
        # The wrapper may lie around wrappers of other adapters.
        if layer is wrapper:
            name, _ = wrapper.axis_tensors(axis_name)[0]
            if not tensors[name].numel():
                axis.resize([])


def _load_whole(
    model: nn.Module,
    name: str,
    parameters: Mapping[str, Tensor],
    trained_whole: Mapping[str, Tensor],
    folder: Path,
) -> None:
    """Copy the tensors of modules that were trained whole, or leave all of them as they were."""
    for key, value in trained_whole.items():
        present = parameters.get(key)
        if present is None or present.shape != value.shape:
            raise UserError(
                f"{folder} holds {key} {tuple(value.shape)}, which this model does not have."
            )
    check_other_adapters(model, [name], trained_whole, parameters, folder)
    originals: dict[Tensor, Tensor] = {}
    trained: list[nn.Parameter] = []
    try:
        for key, value in trained_whole.items():
            target = parameters[key]
            originals[target] = target.detach().clone()
            with torch.no_grad():
                target.copy_(value)
            if isinstance(target, nn.Parameter) and target.is_floating_point():
                target.requires_grad_(True)
                trained.append(target)
    except BaseException:
        with torch.no_grad():
            for target, original in originals.items():
                target.copy_(original)
        raise
    record_trained(model, trained)
