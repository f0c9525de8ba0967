"""Trainable parts of a backbone: adapters, whole modules, and rows of added tokens."""

from typing import TYPE_CHECKING

from torch import nn

from adaptrank import backbones
from adaptrank._errors import UserError
from adaptrank.artifacts import load_together, read_adapter
from adaptrank.injection import (
    adapt,
    apply_rank_pattern,
    find_modules,
    record_trained,
    row_modules,
)
from adaptrank.modules.half_precision import dtype_of, train_in_float32
from adaptrank.modules.learning_rates import match_rates
from adaptrank.modules.settings import read_rank_pattern
from adaptrank.parameterizations import plain_parameters

if TYPE_CHECKING:
    from adaptrank.modules.adapted import AdaptedModule


def make_trainable(module: "AdaptedModule", backbone: nn.Module) -> None:
    """Freeze a backbone but for what a task trains in it.

    Args:
        module: the task.
        backbone: its pretrained model, which gets the adapters.

    Raises:
        UserError: if a key of `learning_rates` names nothing that trains.
    """
    trained_whole = _prepare_trained_modules(module, backbone)
    _inject_adapters(module, backbone, trained_whole)
    match_rates(backbone, module.rates_of(backbone))


def _prepare_trained_modules(module: "AdaptedModule", backbone: nn.Module) -> list[str]:
    """Hold the modules that train whole in float32, and return their paths."""
    heads = module.heads(backbone)
    resized = backbones.embedding_paths(backbone) if module.trains_embeddings else []
    rows = row_modules(backbone)
    trained = find_modules(backbone, [*heads, *module.train_modules, *resized, *rows])
    if module.adapter is not None:
        trained |= _modules_of_file(module, backbone, module.adapter)
    # Tied modules share a tensor, which the first of them casts.
    dtypes = {path: dtype_of(part) for path, part in trained.items()}
    for path, part in trained.items():
        train_in_float32(part, dtypes[path], cast_back=path not in heads)
    return list(trained)


def _modules_of_file(
    module: "AdaptedModule", backbone: nn.Module, adapter: str
) -> dict[str, nn.Module]:
    """Return the modules that an adapter's file holds whole, {path: module}.

    Raises:
        UserError: if the backbone does not have one of them, such as the head of another task.
    """
    saved = read_adapter(adapter)
    present = dict(backbone.named_modules())
    found = {}
    for name in saved["trained_modules"]:
        path = name.rpartition(".")[0]
        if path not in present:
            loaded_by = saved["base"].get("auto_class") or "another class"
            raise UserError(
                f"{adapter} has trained {path!r}, which {type(backbone).__name__} does not have. "
                f"Its base was loaded by {loaded_by}, and {type(module).__name__} loads one by "
                f"{module.auto_class}. Take the task that it was trained for."
            )
        found[path] = present[path]
    return found


def _inject_adapters(
    module: "AdaptedModule", backbone: nn.Module, trained_whole: list[str]
) -> None:
    """Wrap layers with new adapters, load the saved one, and set the ranks to start from."""
    parts = [backbone.get_submodule(path) for path in trained_whole]
    for entry in module.adapters:
        adapt(
            backbone,
            entry.targets,
            entry.parameterization,
            exclude=entry.exclude or (),
            name=entry.name,
            train_modules=trained_whole,
            split_fused=entry.split_fused,
            seed=module.seed,
        )
    if module.adapter is not None:
        # New adapters change nothing yet, and train together with the loaded one.
        load_together(backbone, module.adapter)
        # The file names the modules that train whole with it, and this run may train others.
        for part in parts:
            for parameter in plain_parameters(part):
                parameter.requires_grad_(True)
            record_trained(backbone, plain_parameters(part))
    for path in row_modules(backbone):
        rows = backbone.get_submodule(path)
        rows.requires_grad_(True)
        record_trained(backbone, rows.parameters())
    if module.rank_pattern:
        apply_rank_pattern(backbone, read_rank_pattern(module.rank_pattern), module.seed)
