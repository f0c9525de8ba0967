"""Inputs of text classifiers: token types where the model reads them, and the padding."""

from typing import Any

from adaptrank._errors import UserError
from adaptrank.backbones import LoadingOptions, Source, load_config
from adaptrank.modules.batch_keys import forward_keys


def leave_out_unread_types(
    tokenizer: Any, source: Source, mapping: str, options: LoadingOptions | None = None
) -> Any:
    """Let a tokenizer make token types only where the model's class, not built yet, names them.

    Args:
        tokenizer: tokenizer of the backbone.
        source: where the backbone comes from.
        mapping: name of the mapping of transformers from configurations to classes of the task,
            such as "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING".
        options: how the backbone is loaded.

    Returns:
        The tokenizer.

    Raises:
        UserError: if transformers has no class of the task for this kind of model.
    """
    import transformers

    config = load_config(source, options)
    model_class: Any = getattr(transformers, mapping).get(type(config), None)
    check_has_task(source, config, mapping)
    # The code of some models comes with their weights.
    if isinstance(model_class, type) and "token_type_ids" not in forward_keys(model_class):
        names = tokenizer.model_input_names
        tokenizer.model_input_names = [name for name in names if name != "token_type_ids"]
    return tokenizer


def check_has_task(source: Source, config: Any, mapping: str) -> None:
    """Check that transformers has a class of a task for a kind of model.

    Args:
        source: where the backbone comes from.
        config: its configuration. The code of some models comes with their weights.
        mapping: as in `leave_out_unread_types`.

    Raises:
        UserError: if it has none.
    """
    import transformers

    if type(config) in getattr(transformers, mapping) or hasattr(config, "auto_map"):
        return
    task = mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING").lower().replace("_", " ")
    raise UserError(
        f"{source.name} is of the kind {config.model_type!r}, for which transformers has no model "
        f"of the task {task}. Choose another backbone, or another task."
    )


def pad_as_tokenizer(model: Any, tokenizer: Any) -> Any:
    """Tell a model which token its tokenizer pads with. A decoder finds the end of a text by it.

    Returns:
        The model.
    """
    if tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
