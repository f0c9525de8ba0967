"""Refuse `save_pretrained` of transformers for a model that holds wrappers.

It would write the wrappers' own keys, and `from_pretrained` would start those layers at random.
transformers' Trainer saves through the same function. What it writes is decided by a
`TrainerWriter` that an allocator leaves with the model.
"""

import logging
import sys
from functools import wraps
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from adaptrank._errors import UserError
from adaptrank._files import write_json
from adaptrank.parameterizations.enclosing import enclosed

log = logging.getLogger("adaptrank")

GUARDED = "_adaptrank_guarded"
"""Attribute of the function that `guard_save_pretrained` puts in place."""

TRAINER_WRITER = "_adaptrank_trainer_writer"
"""Attribute of a model: the `TrainerWriter` of the Trainer that it is in."""

COUNTS_AS_ADAPTED = "_hf_peft_config_loaded"
"""Attribute of a transformers model that says whether PEFT has put adapters on it."""


class TrainerWriter(Protocol):
    """Writes the model's part of a Trainer's checkpoint."""

    def write(self, model: nn.Module, folder: Path) -> None:
        """Write a model that holds wrappers to a folder."""


def guard_save_pretrained() -> None:
    """Let `PreTrainedModel.save_pretrained` check for wrappers, if transformers is imported.

    `push_to_hub` and the libraries on top of transformers go through the same function.
    """
    modeling: Any = sys.modules.get("transformers.modeling_utils")
    model_class: Any = getattr(modeling, "PreTrainedModel", None)
    original = getattr(model_class, "save_pretrained", None)
    if original is None or hasattr(original, GUARDED):
        return

    @wraps(original)
    def save_pretrained(model: nn.Module, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        if not _holds_wrappers(model):
            return original(model, save_directory, *args, **kwargs)
        if not _called_by_trainer():
            raise UserError(_explain(model))
        folder = Path(save_directory)
        writer: TrainerWriter | None = model.__dict__.get(TRAINER_WRITER)
        if writer is not None:
            writer.write(model, folder)
            return None
        result = original(model, save_directory, *args, **kwargs)
        _mark_as_training_state(folder)
        return result

    setattr(save_pretrained, GUARDED, True)
    model_class.save_pretrained = save_pretrained


def _holds_wrappers(model: nn.Module) -> bool:
    from adaptrank.parameterizations.traversal import wrapped_layers

    return bool(wrapped_layers(enclosed(model)))


def _called_by_trainer() -> bool:
    """Tell whether a `transformers.Trainer` is among the callers.

    It resumes from the wrappers' own keys, which it loads into a model that has the wrappers.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "transformers.trainer":
            return True
    return False


def _explain(model: nn.Module) -> str:
    return (
        f"This {type(model).__name__} holds adapters, and from_pretrained would not find their "
        f"layers in what save_pretrained writes: write the adapter by "
        f"adaptrank.save_adapter(model, folder), or merge first, adaptrank.merge(model, "
        f"keep_originals=True), and undo it afterwards by adaptrank.unmerge(model)."
    )


HOW_TO_LOAD = (
    "This folder holds an adapter of adaptrank and no whole model. Load the base model by "
    "from_pretrained, and then the adapter by adaptrank.load_adapter(model, folder)."
)
"""Text of the refusals of `from_pretrained`."""

CONFIG_FILE = "config.json"


def refused_by_from_pretrained() -> dict[str, Any]:
    """Return the contents of a config.json that no class of transformers loads.

    Without a configuration, a named class would fall back on its default size and start at random.
    Auto classes quote the model type that they do not know. A named class quotes the size that is
    no number. Where a class has neither, a quantization without a method is refused before anything
    is built. A Trainer, which resumes from the folder, reads none of these entries.
    """
    return {
        "model_type": HOW_TO_LOAD,
        "vocab_size": HOW_TO_LOAD,
        "hidden_size": HOW_TO_LOAD,
        "quantization_config": {"adaptrank": HOW_TO_LOAD},
    }


def is_refused_by_from_pretrained(config: dict[str, Any]) -> bool:
    """Tell whether the contents of a config.json are those of a folder that a Trainer wrote."""
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and "adaptrank" in quantization


_named_folders: set[Path] = set()
"""Parents of the folders that a line in the log was about."""


def _mark_as_training_state(folder: Path) -> None:
    """Let `from_pretrained` refuse a folder that only a Trainer can load."""
    file = folder / CONFIG_FILE
    if file.is_file():
        write_json(file, refused_by_from_pretrained())
    if folder.parent not in _named_folders:
        _named_folders.add(folder.parent)
        log.warning(
            "The Trainer's %s holds the weights of the whole model, for resuming only. For "
            "checkpoints with the adapter alone, give the Trainer an allocator, or "
            "callbacks=[adaptrank.allocation.AdapterCallback()].",
            folder,
        )
