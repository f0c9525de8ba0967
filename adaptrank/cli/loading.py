"""Adapters and models by name, for the verbs that load them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.cli.errors import ConfigError, a_checkpoint, missing_file

if TYPE_CHECKING:
    import torch

    from adaptrank.backbones import Source

log = logging.getLogger("adaptrank")

AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForTokenClassification",
    "AutoModelForSeq2SeqLM",
    "AutoModelForMultipleChoice",
)
"""Classes of transformers that a file may ask for."""

CAUSAL, SEQ2SEQ = "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"
"""Classes of models that write text."""

MULTIPLE_CHOICE = "AutoModelForMultipleChoice"
"""Class of models that score one text of several."""


@dataclass
class StoredModel:
    """A base model on disk, with an adapter or without.

    Args:
        source: the base model.
        adapter: folder of the adapter, or None for a plain model.
        auto_class: name of the transformers class that loads the base.
        num_labels: number of classes, for a classifier.
        conventions: those of training, as the adapter or the merged model records them.
        vocabulary: number of tokens, if the embedding has rows that the base's files do not have.
    """

    source: "Source"
    adapter: Path | None
    auto_class: str
    num_labels: int | None = None
    conventions: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None

    @property
    def is_causal(self) -> bool:
        """True if the model completes text."""
        return self.auto_class == CAUSAL

    @property
    def writes_text(self) -> bool:
        """True if the model completes a text, or writes another one for it."""
        return self.auto_class in (CAUSAL, SEQ2SEQ)

    def load(self, dtype: "torch.dtype", adapted: bool = True) -> Any:
        """Return the model in evaluation mode, with its adapter unless `adapted` is false."""
        import transformers

        from adaptrank.artifacts import load_adapter
        from adaptrank.backbones import add_embedding_rows, load_model

        labels = {} if self.num_labels is None else {"num_labels": self.num_labels}
        auto_class = getattr(transformers, self.auto_class)
        has_fresh_head = bool(labels) or self.auto_class == MULTIPLE_CHOICE
        model = load_model(self.source, auto_class, dtype, has_fresh_head, **labels)
        if self.vocabulary is not None:
            add_embedding_rows(model, self.tokenizer(), self.vocabulary)
        if adapted and self.adapter is not None:
            model = load_adapter(model, self.adapter)
        return model.train(False)

    def preprocessor(self) -> Any:
        """Return what makes inputs of raw data: the image processor, or else the tokenizer."""
        from adaptrank.backbones import load_image_processor

        if self.auto_class == "AutoModelForImageClassification":
            return load_image_processor(self.source)
        return self.tokenizer()

    def tokenizer(self) -> Any:
        """Return the base's tokenizer, with the chat template of training."""
        from adaptrank.artifacts import use_chat_template
        from adaptrank.backbones import load_tokenizer

        tokenizer = load_tokenizer(self.source)
        if use_chat_template(tokenizer, self.conventions):
            log.warning(
                "The chat template of %s is not the one of training, which is used here.",
                self.source.name,
            )
        return tokenizer


def find_model(name: str, base: str | None) -> StoredModel:
    """Return an adapter's folder, a run's folder, a model's folder, or a model id as a model.

    Raises:
        ConfigError: if the name is none of these.
    """
    from adaptrank import backbones
    from adaptrank.artifacts import WEIGHTS, prompt_conventions

    folder = adapter_folder(name)
    if (folder / WEIGHTS).is_file():
        return find_adapter(name, base)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(
            f"{name!r} holds neither an adapter ({WEIGHTS}) nor a model (config.json)."
        )
    source = backbones.resolve(name)
    config = stored_config(Path(source.path))
    auto_class = SEQ2SEQ if config.get("is_encoder_decoder") is True else CAUSAL
    return StoredModel(source, None, auto_class, conventions=prompt_conventions(config))


def find_adapter(name: str, base: str | None) -> StoredModel:
    """Return an adapter's folder, or the adapter in a run's folder, with its base model.

    Args:
        name: the folder.
        base: the base model, if it is not the one that the adapter's file names.
    Raises:
        ConfigError: if there is no adapter, or no base.
    """
    from adaptrank.artifacts import read_adapter

    folder = adapter_folder(name)
    if not folder.exists():
        raise ConfigError(missing_file(name, "adapter folder"))
    description = read_adapter(folder)
    described = description["base"]
    auto_class = described.get("auto_class") or "AutoModelForCausalLM"
    if auto_class not in AUTO_CLASSES:
        raise ConfigError(
            f"{folder} was made for transformers' {auto_class!r}. The commands load "
            f"{', '.join(AUTO_CLASSES)}. In Python, load the base yourself, and "
            f"adaptrank.load_adapter(model, folder)."
        )
    source = find_base(folder, base or described.get("name"))
    return StoredModel(
        source,
        folder,
        auto_class,
        described.get("num_labels"),
        description.get("conventions", {}),
        described.get("vocabulary"),
    )


def adapter_folder(name: str) -> Path:
    """Return the folder of a name. A run's folder stands for the adapter in it.

    Raises:
        ConfigError: if the name is a checkpoint.
    """
    from adaptrank.artifacts import WEIGHTS

    folder = Path(name).expanduser()
    if folder.suffix == ".ckpt" and folder.is_file():
        raise ConfigError(a_checkpoint(name))
    inside = folder / "adapter"
    is_run = not (folder / WEIGHTS).is_file() and (inside / WEIGHTS).is_file()
    return inside if is_run else folder


def find_base(folder: Path, name: str | None) -> "Source":
    """Return the base model of an adapter's folder.

    Raises:
        ConfigError: if there is no name, or no such model.
    """
    from adaptrank import backbones

    if not name:
        raise ConfigError(
            f"{folder} does not say what base it was trained on. Name it with --base."
        )
    try:
        return backbones.resolve(name)
    except FileNotFoundError as error:
        raise ConfigError(f"The base of {folder}: {error} Name the base with --base.") from error


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the configuration of a model in a folder, or {} if it has none."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Whatever is wrong with the model, its loading says it better.
        return {}
    return config if isinstance(config, dict) else {}


def stored_dtype(source: "Source") -> "torch.dtype":
    """Return the dtype of a base's files, or float32 if its configuration gives none."""
    import torch
    from transformers import AutoConfig

    dtype = getattr(AutoConfig.from_pretrained(source.path), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
