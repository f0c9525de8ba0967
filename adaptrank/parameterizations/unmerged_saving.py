"""Refuse `save_pretrained` of transformers for a model that holds wrappers.

It would write the wrappers' own keys, and `from_pretrained` would start those layers at random.
"""

import json
import logging
import sys
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from adaptrank._errors import UserError
from adaptrank._files import write_json
from adaptrank.parameterizations.enclosing import enclosed

log = logging.getLogger("adaptrank")

GUARDED = "_adaptrank_guarded"
"""Attribute of the function that `guard_save_pretrained` puts in place."""


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
        result = original(model, save_directory, *args, **kwargs)
        _mark_as_training_state(Path(save_directory))
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


REFUSED_CONFIG = {
    "adaptrank": "These weights are of a model with adapters that are not merged, for a Trainer to "
    "resume from. Load the base, and the adapter by adaptrank.load_adapter."
}
"""Entry of config.json for which every `from_pretrained` refuses the folder, in any class.

Without a configuration, a named class would fall back on its default size and start at random.
"""

_named_folders: set[Path] = set()
"""Parents of the folders that a line in the log was about."""


def _mark_as_training_state(folder: Path) -> None:
    """Let `from_pretrained` refuse a folder that only a Trainer can load."""
    file = folder / "config.json"
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        # A quantization without a method is refused before anything is built.
        config["quantization_config"] = REFUSED_CONFIG
        write_json(file, config)
    if folder.parent not in _named_folders:
        _named_folders.add(folder.parent)
        log.warning(
            "The Trainer's %s holds the weights of a model with adapters, for resuming only; "
            "write the adapter by adaptrank.save_adapter(model, folder).",
            folder,
        )
