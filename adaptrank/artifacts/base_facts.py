"""Facts about a frozen model that its own configuration states: name, task, number of classes."""

import os
from typing import Any

from torch import nn

from adaptrank.parameterizations import pretrained_part

TASK_HEADS = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "Model": "AutoModel",
}
"""Ending of a transformers class -> the class that loads its task by name."""

WITH_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForTokenClassification",
)


def base_facts(model: nn.Module) -> dict[str, Any]:
    """Return what the configuration of a transformers model states about it, or {} for another.

    A folder is given by its absolute path, so that it is found from any working directory.
    """
    part = pretrained_part(model)
    config = getattr(part, "config", None)
    facts: dict[str, Any] = {}
    name = getattr(config, "_name_or_path", None)
    if isinstance(name, str) and name:
        facts["name"] = os.path.abspath(name) if os.path.isdir(name) else name
    endings = (ending for ending in TASK_HEADS if type(part).__name__.endswith(ending))
    ending = next(endings, None)
    if part is None or ending is None:
        return facts
    facts["auto_class"] = TASK_HEADS[ending]
    if facts["auto_class"] in WITH_CLASSES:
        facts["num_labels"] = int(config.num_labels)  # type: ignore[union-attr]
    return facts
