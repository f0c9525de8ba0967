"""Adapters and models by name, for the verbs that load them."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.cli.errors import ConfigError, a_checkpoint, missing_file

if TYPE_CHECKING:
    import torch

    from adaptrank.backbones import LoadingOptions, Quantization, Source

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
        added_tokens: tokens that the tokenizer of the base's files does not have.
        trained_rows: rows of the embedding and the head that were trained by themselves.
        quantization: that of training, as the adapter records it.
        trusts_code: whether Python code that comes with the base is run. No file can set it.
    """

    source: "Source"
    adapter: Path | None
    auto_class: str
    num_labels: int | None = None
    conventions: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: int | None = None
    added_tokens: tuple[str, ...] = ()
    trained_rows: tuple[int, ...] = ()
    quantization: Mapping[str, Any] | None = None
    trusts_code: bool = False

    @property
    def is_causal(self) -> bool:
        """True if the model completes text."""
        return self.auto_class == CAUSAL

    @property
    def writes_text(self) -> bool:
        """True if the model completes a text, or writes another one for it."""
        return self.auto_class in (CAUSAL, SEQ2SEQ)

    @property
    def is_quantized(self) -> bool:
        """True if the files of the base hold quantized weights."""
        from adaptrank.backbones import load_config

        config = load_config(self.source, self._options())
        return getattr(config, "quantization_config", None) is not None

    def load(
        self,
        dtype: "torch.dtype",
        adapted: bool = True,
        quantization: "Quantization | None" = None,
        device_map: str | None = None,
        folded: bool = True,
    ) -> Any:
        """Return the model in evaluation mode.

        Args:
            dtype: dtype of the weights that are not quantized.
            adapted: whether it has its adapter.
            quantization: how linear layers are quantized. None loads them as they are.
            device_map: devices of the layers. None is the CPU.
            folded: whether trained rows are written into the embedding and the head.
        """
        import transformers

        from adaptrank.artifacts import load_adapter
        from adaptrank.backbones import add_embedding_rows, embedding_rows, load_model
        from adaptrank.injection import fold_rows, train_rows

        labels: dict[str, Any] = {}
        if self.num_labels is not None:
            labels["num_labels"] = self.num_labels
        auto_class = getattr(transformers, self.auto_class)
        model = load_model(
            self.source,
            auto_class,
            dtype,
            replace(self._options(), quantization=quantization, device_map=device_map),
            fresh_head=bool(labels) or self.auto_class == MULTIPLE_CHOICE,
            **labels,
        )
        present = embedding_rows(model)
        if self.vocabulary is not None:
            add_embedding_rows(model, self.tokenizer(), self.vocabulary)
        if self.trained_rows:
            fresh_from = None if self.vocabulary is None else present
            train_rows(model, self.trained_rows, fresh_from)
        if adapted and self.adapter is not None:
            model = load_adapter(model, self.adapter)
        if folded:
            fold_rows(model)
        return model.train(False)

    def _options(self) -> "LoadingOptions":
        from adaptrank.backbones import LoadingOptions

        return LoadingOptions(trust_remote_code=self.trusts_code, added_tokens=self.added_tokens)

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

        tokenizer = load_tokenizer(self.source, self._options())
        if use_chat_template(tokenizer, self.conventions):
            log.warning(
                "The chat template of %s is not the one of training, which is used here.",
                self.source.name,
            )
        return tokenizer


def find_model(name: str, base: str | None, trusts_code: bool = False) -> StoredModel:
    """Return an adapter's folder, a run's folder, a model's folder, or a model id as a model.

    Raises:
        ConfigError: if the name is none of these.
    """
    from adaptrank import backbones
    from adaptrank.artifacts import WEIGHTS, hub_is_offline, prompt_conventions

    if Path(name).expanduser().exists():
        folder = adapter_folder(name)
        if (folder / WEIGHTS).is_file():
            return find_adapter(name, base, trusts_code)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ConfigError(
                f"{name!r} holds neither an adapter ({WEIGHTS}) nor a model (config.json)."
            )
    elif _is_adapter_on_hub(name):
        return find_adapter(name, base, trusts_code)
    source = backbones.resolve(name)
    if source.kind == "hub" and hub_is_offline() and name not in backbones.WHEELS:
        raise ConfigError(
            f"There is no adapter and no model {name!r}: it is no folder, it is not in the Hub's "
            f"cache, and HF_HUB_OFFLINE forbids to ask the Hub."
        )
    config = stored_config(Path(source.path))
    auto_class = SEQ2SEQ if config.get("is_encoder_decoder") is True else CAUSAL
    return StoredModel(
        source,
        None,
        auto_class,
        conventions=prompt_conventions(config),
        trusts_code=trusts_code,
    )


def find_adapter(name: str, base: str | None, trusts_code: bool = False) -> StoredModel:
    """Return an adapter's folder, or the adapter in a run's folder, with its base model.

    Args:
        name: the folder, or the adapter's name on the Hub.
        base: the base model, if it is not the one that the adapter's file names.
        trusts_code: whether a person allows Python code that comes with the base.
    Raises:
        ConfigError: if there is no adapter, or no base.
    """
    from adaptrank.artifacts import read_adapter

    folder = adapter_folder(name)
    description = read_adapter(folder)
    described = description["base"]
    auto_class = described.get("auto_class") or "AutoModelForCausalLM"
    if auto_class not in AUTO_CLASSES:
        raise ConfigError(
            f"{folder} was made for transformers' {auto_class!r}. The commands load "
            f"{', '.join(AUTO_CLASSES)}. In Python, load the base yourself, and "
            f"adaptrank.load_adapter(model, folder)."
        )
    revision = described.get("revision") if base is None else None
    source = find_base(folder, base or described.get("name"), revision)
    tokens: Mapping[str, int] = described.get("added_tokens", {})
    return StoredModel(
        source,
        folder,
        auto_class,
        described.get("num_labels"),
        description.get("conventions", {}),
        described.get("vocabulary"),
        tuple(sorted(tokens, key=lambda token: tokens[token])),
        tuple(described.get("trained_rows", ())),
        described.get("quantization"),
        trusts_code,
    )


def _is_adapter_on_hub(name: str) -> bool:
    """Return whether a name is that of an adapter on the Hub, and of no model.

    The Hub itself is asked only about a name that no cache and no wheel knows.
    """
    from adaptrank import backbones
    from adaptrank.artifacts import (
        cached_adapter,
        hub_is_offline,
        is_adapter_on_hub,
        parse_hub_name,
    )

    on_hub = parse_hub_name(name)
    if on_hub is None:
        return False
    if cached_adapter(on_hub) is not None or on_hub.revision is not None:
        return True
    is_known = backbones.resolve(name).kind != "hub"
    return not is_known and not hub_is_offline() and is_adapter_on_hub(on_hub)


def adapter_folder(name: str) -> Path:
    """Return the folder of an adapter. A run's folder stands for the adapter in it.

    Args:
        name: a folder, or a name on the Hub, which is looked for in the Hub's cache first.
    Raises:
        ConfigError: if the name is a checkpoint, or nothing has this name.
    """
    from adaptrank.artifacts import WEIGHTS, locate_adapter, parse_hub_name

    given = Path(name).expanduser()
    if given.suffix == ".ckpt" and given.is_file():
        raise ConfigError(a_checkpoint(name))
    if not given.exists() and parse_hub_name(name) is None:
        raise ConfigError(missing_file(name, "adapter folder"))
    folder = locate_adapter(name)
    inside = folder / "adapter"
    is_run = not (folder / WEIGHTS).is_file() and (inside / WEIGHTS).is_file()
    return inside if is_run else folder


def find_base(folder: Path, name: str | None, revision: str | None = None) -> "Source":
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
        return backbones.resolve(name, revision)
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


def stored_dtype(source: "Source", trusts_code: bool = False) -> "torch.dtype":
    """Return the dtype of a base's files, or float32 if its configuration gives none."""
    import torch

    from adaptrank.backbones import LoadingOptions, load_config

    options = LoadingOptions(trust_remote_code=trusts_code)
    dtype = getattr(load_config(source, options), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
