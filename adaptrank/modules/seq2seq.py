"""Fine-tune a model with an encoder and a decoder, such as T5 or BART, to rewrite texts."""

import logging
import math
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank._options import COUNT, check_number
from adaptrank.artifacts import GENERATION_KEYS, stop_ids_of
from adaptrank.backbones import before_end, load_config, position_limit
from adaptrank.modules.batch_keys import (
    IGNORED,
    at_least_float32,
    entries,
    read_inputs,
    read_labels,
)
from adaptrank.modules.generation_settings import read_generation
from adaptrank.modules.text_inputs import check_has_task
from adaptrank.modules.text_metrics import read_text_metrics
from adaptrank.modules.token_loss import TokenLossModule
from adaptrank.training.moving import to_device

log = logging.getLogger("adaptrank")

TEXT_KEYS = ("sources", "targets")
"""Keys of an evaluation batch that the model does not read."""

OVERFLOWING = ("t5", "mt5", "umt5", "longt5")
"""Model types whose activations leave the range of float16."""


class Seq2Seq(TokenLossModule):
    """An encoder-decoder model, trained on the tokens of the target.

    The decoder reads the target one token later, after the model's start token, as
    `prepare_decoder_input_ids_from_labels` of the model makes it. The loss is the mean over tokens
    whose label is not -100. The evaluation reports `loss` per token, weighted by tokens, its
    exponent `perplexity`, and metrics of the texts that the model generates.

    Args:
        max_new_tokens: longest generation, in tokens.
        generate: whether an evaluation generates texts. It takes most of the evaluation's time.
        generation: settings of transformers' GenerationConfig, such as {num_beams: 4}. The others
            are the model's own, but without sampling.
        metrics: metrics of generated texts: exact_match, bleu, sacrebleu, chrf, rouge,
            edit_distance, wer, cer, or any class of torchmetrics by `class_path`.
        kwargs: as in `AdaptedModule`.
    """

    auto_class = "AutoModelForSeq2SeqLM"
    metrics_shown: ClassVar = ("loss", "perplexity", "exact_match")

    def __init__(
        self,
        *args: Any,
        max_new_tokens: int = 64,
        generate: bool = True,
        generation: dict[str, Any] | None = None,
        metrics: list[str | dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("max_new_tokens", max_new_tokens, COUNT, whole=True)
        generation_settings = read_generation(generation)
        scores = read_text_metrics(["exact_match"] if metrics is None else metrics)
        super().__init__(*args, **kwargs)
        self.max_new_tokens = max_new_tokens
        self.generate_texts = generate
        self.generation = generation_settings
        self.scores = scores

    # ---- building

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer of the backbone. One without a decoder is refused before it is loaded."""
        config = load_config(self.source, self.loading)
        check_has_task(self.source, config, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING")
        return super().tokenizer

    def load_backbone(self) -> Any:
        backbone = super().load_backbone()
        if not hasattr(backbone, "prepare_decoder_input_ids_from_labels"):
            raise UserError(
                f"{type(backbone).__name__} has no prepare_decoder_input_ids_from_labels, by which "
                "the decoder's inputs are made. Use T5, BART or a model like them."
            )
        self._check_start(backbone)
        if self.frozen_dtype == torch.float16 and backbone.config.model_type in OVERFLOWING:
            log.warning(
                "Activations of %s leave the range of float16, and the loss becomes NaN. Use "
                "model.dtype=bf16 or fp32.",
                backbone.config.model_type,
            )
        return backbone

    def _check_start(self, backbone: Any) -> None:
        """Take the ids of start and padding where a composed model's configuration has none."""
        config = backbone.config
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        if config.decoder_start_token_id is None:
            starts = (self.tokenizer.cls_token_id, self.tokenizer.bos_token_id)
            start = next((token for token in starts if token is not None), config.pad_token_id)
            config.decoder_start_token_id = start
            backbone.generation_config.decoder_start_token_id = start

    def conventions(self) -> dict[str, Any]:
        recorded = {
            key: self.generation[key]
            for key in GENERATION_KEYS
            if isinstance(self.generation.get(key), int | float)
        }
        return {"generation": recorded} if recorded else {}

    def metrics_logged(self) -> Sequence[str]:
        of_texts = [name for name, _ in self.scores.items()] if self.generate_texts else []
        return ("loss", "perplexity", *of_texts)

    def chance(self) -> dict[str, float]:
        tokens = self.model.get_output_embeddings().weight.shape[0]
        return {"loss": math.log(tokens), "vocabulary": float(tokens)}

    # ---- the loss

    def forward(self, batch: dict[str, Any], beside: Collection[str] = ()) -> Tensor:
        """Return the loss of every labelled token, (tokens,).

        Args:
            batch: inputs of the encoder, and labels (B, T), -100 where a token is not trained on.
            beside: keys of the batch that are no inputs of the model.
        """
        inputs = read_inputs(batch, self.model, beside)
        labels = read_labels(batch)
        self._check_labels(inputs, labels)
        host = self.host_batch.of(entries(batch))
        is_target = host["labels"] != IGNORED
        index = to_device(is_target.flatten().nonzero().squeeze(1), labels.device)
        if "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(
                labels=labels
            )
        logits = self.model(**inputs).logits.flatten(0, 1).index_select(0, index)
        targets = labels.flatten().index_select(0, index)
        return F.cross_entropy(at_least_float32(logits), targets, reduction="none")

    def _check_labels(self, inputs: dict[str, Any], labels: Tensor) -> None:
        """Refuse labels of another task."""
        rows = len(next(value for value in inputs.values() if isinstance(value, Tensor)))
        if labels.dim() != 2 or len(labels) != rows:
            raise UserError(
                f"Seq2Seq needs the tokens of a target for each of {rows} sources, and got labels "
                f"of shape {tuple(labels.shape)}. Use a data module such as Seq2SeqData."
            )

    # ---- steps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss, count = self.mean_of(self(batch))
        self.step_mean.note(count, {"train_loss": loss})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        size = len(read_labels(batch))
        self.log_losses(self(batch, TEXT_KEYS), size)
        if not self.generate_texts:
            return
        texts = self.complete(batch["input_ids"], batch.get("attention_mask"))
        self.scores.update(texts, self._targets(batch))
        for name, metric in self.scores.items():
            self.log(name, metric, prog_bar=True, batch_size=size)

    def _targets(self, batch: dict[str, Any]) -> list[str]:
        """Return the texts of the targets. Without them they are decoded from the labels."""
        if "targets" in batch:
            return list(batch["targets"])
        labels = read_labels(batch)
        ids = torch.where(labels == IGNORED, self.tokenizer.pad_token_id, labels)
        texts: list[str] = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        texts = self.complete(batch["input_ids"], batch.get("attention_mask"))
        sources = batch.get("sources")
        if sources is None:
            return [{"prediction": text} for text in texts]
        return [
            {"source": source, "prediction": text}
            for source, text in zip(sources, texts, strict=True)
        ]

    @torch.no_grad()
    def complete(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Return what the model writes for sources (B, L), as B texts without special tokens.

        Texts are shorter than `max_new_tokens` where the decoder has fewer positions.
        """
        settings = {"do_sample": False, **self.generation}
        longest = self.max_new_tokens
        positions = position_limit(self.model, "decoder")
        if positions is not None and positions < longest:
            longest = positions
            if ("positions", positions) not in self.warned:
                self.warned.add(("positions", positions))
                log.warning(
                    "The decoder has %d positions, so texts have at most as many tokens, and not "
                    "max_new_tokens=%d.",
                    positions,
                    self.max_new_tokens,
                )
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=longest,
            use_cache=True,
            **settings,
        )
        # The first token is the start token. An end token that is not special would be text.
        ends = stop_ids_of(self.model.generation_config)
        generated = [before_end(row, ends) for row in output[:, 1:].tolist()]
        texts: list[str] = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return texts
