"""Checks and settings for loading a backbone: devices, quantization, added tokens."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from adaptrank import backbones
from adaptrank._errors import UserError
from adaptrank.artifacts import read_adapter
from adaptrank.injection import find_modules, train_rows

if TYPE_CHECKING:
    from adaptrank.modules.adapted import AdaptedModule

# ---- devices


def check_devices(
    options: backbones.LoadingOptions, trainer: Trainer | None, fits: bool = False
) -> None:
    """Refuse devices that a strategy of Lightning would change, before weights are loaded.

    Args:
        options: how the backbone is loaded.
        trainer: the trainer, or None outside of one.
        fits: whether the trainer is about to train, although it does not yet.
    Raises:
        UserError: saying where the model would go, and what to leave out.
    """
    if trainer is None:
        return
    strategy: Any = trainer.strategy
    name = type(strategy).__name__
    if options.quantization is not None and isinstance(strategy, ModelParallelStrategy):
        raise UserError(
            f"quantize: {options.quantization.kind} does not go with {name}, which shards weights "
            f"that are plain numbers. Use one device or DDP, or leave quantize out."
        )
    if options.device_map is None:
        return
    trains = fits or trainer.state.fn == TrainerFn.FITTING
    if options.spreads and (trains or isinstance(strategy, ModelParallelStrategy)):
        raise UserError(
            f"device_map={options.device_map!r} spreads the model over devices, and {name} moves "
            f"it to one to train it. Leave device_map out here: it is for validate, test, predict "
            f"and generate."
        )
    if not options.spreads and not _is_device(options.device_map, strategy.root_device):
        raise UserError(
            f"device_map={options.device_map!r}, and {name} moves the model to "
            f"{strategy.root_device}. Leave device_map out, and choose by trainer.accelerator and "
            f"trainer.devices."
        )


def _is_device(device_map: Any, device: torch.device) -> bool:
    """Return whether a device map with one device means this one. "cuda" means any of that type."""
    named = next(iter(device_map.values())) if isinstance(device_map, Mapping) else device_map
    given = torch.device(named)
    return given.type == device.type and given.index in (None, device.index, device.index or 0)


def leave_in_place(module: "AdaptedModule", trainer: Trainer | None) -> None:
    """Let the strategy move all of a module but a backbone that is spread over devices."""
    placed = getattr(module.backbone, "hf_device_map", None)
    if trainer is None or placed is None or len(set(placed.values())) < 2:
        return
    strategy: Any = trainer.strategy

    def move_the_rest() -> None:
        for name, child in module.named_children():
            if name != "backbone":
                child.to(strategy.root_device)

    strategy.model_to_device = move_the_rest


def device_of(trainer: Trainer | None) -> torch.device | None:
    """Return the device of this process, or None outside of a trainer."""
    return None if trainer is None else trainer.strategy.root_device


# ---- quantization


def check_quantized(options: backbones.LoadingOptions, dtype: torch.dtype, compiles: bool) -> None:
    """Refuse a quantization that does not go with other settings, or whose packages are missing.

    Args:
        options: how the backbone is loaded.
        dtype: dtype of the weights that are not quantized.
        compiles: whether blocks are compiled.
    """
    quantization = options.quantization
    if quantization is None:
        return
    if compiles:
        raise UserError(
            f"quantize: {quantization.kind} does not go with compile: products with quantized "
            f"weights do not compile on every device. Leave one of them out."
        )
    backbones.check_quantization(quantization, dtype)


def modules_that_train(module: "AdaptedModule", model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the paths of modules that train whole: the heads of the task, and `train_modules`.

    Args:
        module: the task.
        model: its model, without weights.
    """
    return module.heads(model), list(find_modules(model, module.train_modules))


# ---- added tokens


def recorded_base(module: "AdaptedModule") -> Mapping[str, Any]:
    """Return the description of the base in the adapter that a module starts from, or {}."""
    return {} if module.adapter is None else read_adapter(module.adapter)["base"]


def tokens_to_add(module: "AdaptedModule") -> tuple[str, ...]:
    """Return the tokens that the tokenizer gets, by `added_tokens` or by the adapter's record.

    Raises:
        UserError: if the two name different ones.
    """
    given = module.loading.added_tokens
    recorded = added_tokens_of(recorded_base(module))
    if given and recorded and given != recorded:
        raise UserError(
            f"added_tokens={list(given)}, and the adapter {module.adapter} was trained with "
            f"{list(recorded)}. Leave added_tokens out."
        )
    return given or recorded


def added_tokens_of(base: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the added tokens that the description of a base records, in the order of their ids."""
    recorded: Mapping[str, int] = base.get("added_tokens", {})
    return tuple(sorted(recorded, key=lambda token: recorded[token]))


def add_tokens(module: "AdaptedModule", backbone: Any) -> None:
    """Give a backbone rows for tokens that it lacks, and let new rows train.

    The module then knows the number of rows (`vocabulary`) and the rows that train
    (`trained_rows`). With `resize_tokens: true` all rows train.
    """
    base = recorded_base(module)
    present = backbones.embedding_rows(backbone) or 0
    rows = base.get("vocabulary") or 0
    trained = list(base.get("trained_rows", ()))
    if module.loading.added_tokens or module.resize_tokens:
        rows = max(len(module.tokenizer), rows)
        trained = trained or new_rows(module, present)
    if rows > present:
        backbones.add_embedding_rows(backbone, module.tokenizer, rows)
        module.vocabulary = rows
    if module.resize_tokens is True:
        module.trains_embeddings = module.vocabulary is not None or bool(trained)
        return
    if module.vocabulary is not None and not trained:
        # An adapter of a run whose embedding trained whole.
        module.trains_embeddings = True
        return
    if trained:
        _train_rows(module, backbone, trained, present)


def new_rows(module: "AdaptedModule", present: int) -> list[int]:
    """Return the rows of tokens that are added, and of those beyond the embedding."""
    ids = module.tokenizer.convert_tokens_to_ids(list(module.loading.added_tokens))
    return sorted({*ids, *range(present, len(module.tokenizer))})


def _train_rows(
    module: "AdaptedModule", backbone: Any, trained: Iterable[int], present: int
) -> None:
    strategy = None if module._trainer is None else module._trainer.strategy
    if isinstance(strategy, ModelParallelStrategy):
        raise UserError(
            f"Rows of added tokens that train alone do not go with {type(strategy).__name__}. Set "
            f"model.resize_tokens: true, so that the embedding trains whole."
        )
    module.trained_rows = list(trained)
    fresh_from = None if module.vocabulary is None else present
    train_rows(backbone, module.trained_rows, fresh_from)


def describe_tokens(module: "AdaptedModule") -> dict[str, Any]:
    """Return what an adapter's file says about added tokens and rows."""
    described: dict[str, Any] = {}
    if module.vocabulary:
        described["vocabulary"] = module.vocabulary
    tokens = tokens_to_add(module)
    if tokens:
        ids = module.tokenizer.convert_tokens_to_ids(list(tokens))
        described["added_tokens"] = dict(zip(tokens, ids, strict=True))
    if module.trained_rows:
        described["trained_rows"] = module.trained_rows
    return described
