"""A pretrained model by its name, for use in Python."""

from typing import Any

from adaptrank._errors import UserError, did_you_mean
from adaptrank.backbones.dtype import auto_dtype
from adaptrank.backbones.load import load_model
from adaptrank.backbones.lookup import resolve


def load_backbone(
    name: str, task: str | type[Any] = "CausalLM", dtype: str = "auto", **kwargs: Any
) -> Any:
    """Load a pretrained model from a folder, a local cache, an installed wheel, or the Hub.

    The first of these places that has the model serves it. Only the last one needs a network.

    Args:
        name: a local folder, or a model id.
        task: what the model is for, as in the name of a class of transformers: "CausalLM",
            "SequenceClassification", "ImageClassification" or another `AutoModelFor...`, or "" for
            the model without a head. A class of transformers may stand here as well.
        dtype: dtype of the weights: bf16, fp16, fp32 or fp64, or "auto", which is bf16 where the
            processor is fast at it, else float32.
        kwargs: further arguments of `from_pretrained`, such as `num_labels=3`.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: for an unknown task or dtype.
        FileNotFoundError: if the name is a path that holds no model.
        OSError: if the Hub cannot be reached, or does not have the model.
    """
    return load_model(resolve(name), _auto_class(task), auto_dtype(dtype), **kwargs)


def _auto_class(task: str | type[Any]) -> type[Any]:
    """Return the class of transformers for a task.

    Raises:
        UserError: if there is none.
    """
    import transformers

    if not isinstance(task, str):
        return task
    prefix = "AutoModelFor"
    wanted = f"{prefix}{task.removeprefix(prefix)}" if task else "AutoModel"
    known = [each for each in dir(transformers) if each.startswith(prefix)]
    if wanted != "AutoModel" and wanted not in known:
        names = [each.removeprefix(prefix) for each in known]
        hint = did_you_mean(task, names)
        raise UserError(
            f"There is no task {task!r}.{hint} Use CausalLM, SequenceClassification, or another "
            f"{prefix}... of transformers."
        )
    auto_class: type[Any] = getattr(transformers, wanted)
    return auto_class
