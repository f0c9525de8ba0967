"""Fine-tune a causal language model on completions.

The evaluation measures loss, perplexity, exact match of generated answers, and multiple choice.
"""

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adaptrank._errors import UserError
from adaptrank._options import COUNT, check_number
from adaptrank.artifacts import stop_ids_of
from adaptrank.backbones import before_end, position_limit
from adaptrank.modules import padding_free
from adaptrank.modules.batch_keys import (
    BOUNDARY_KEYS,
    at_least_float32,
    check_shapes,
    entries,
    read_inputs,
    read_labels,
    takes,
)
from adaptrank.modules.body_and_head import separable_body
from adaptrank.modules.generation_room import cut_prompts, rows_with_room
from adaptrank.modules.known_attention import known_attention
from adaptrank.modules.metrics import ExactMatch, MultipleChoice
from adaptrank.modules.model_losses import has_own_terms, own_terms_only
from adaptrank.modules.packed_rows import attention_inputs, check_packing
from adaptrank.modules.target_selection import Targets, find_targets, selected
from adaptrank.modules.token_loss import TokenLossModule
from adaptrank.ops.cross_entropy import linear_cross_entropy
from adaptrank.ops.low_rank import plain
from adaptrank.training.moving import to_device

log = logging.getLogger("adaptrank")

EVALUATION_KEYS = ("answers", "choices", "prompt_ids", "prompt_mask")
"""Keys of a validation batch beside inputs and labels."""
CHOICE_KEYS = ("group", "characters", "target")
"""Keys of the choices of a validation batch beside inputs and labels."""


class CausalLM(TokenLossModule):
    """A causal language model, trained on the tokens whose label is not -100.

    The evaluation reports `loss` per completion token, weighted by tokens, and its exponent
    `perplexity`. Where rows have an `answer`, it reports `exact_match` of greedy generations. Where
    rows have `choices`, it reports `accuracy` by summed log-probability, and `accuracy_norm` by
    log-probability per character. Logits are computed for completion tokens only.

    The training loss of a mixture of experts includes the load-balancing loss of its router where
    the model's configuration sets `output_router_logits`, as in transformers. It is logged as
    `train_aux_loss`, and `train_loss` is without it.

    Args:
        max_new_tokens: longest generation, in tokens.
        generate: whether to generate for exact match.
        padding_free: in training, compute nothing for padding, where the model is one of
            `padding_free.MODEL_TYPES`. Losses are the same. Compiled blocks read the padded batch.
        kwargs: as in `AdaptedModule`.
    """

    auto_class = "AutoModelForCausalLM"
    metrics_shown: ClassVar = ("loss", "perplexity", "exact_match", "accuracy", "accuracy_norm")

    def __init__(
        self,
        *args: Any,
        max_new_tokens: int = 24,
        generate: bool = True,
        padding_free: bool = True,
        **kwargs: Any,
    ) -> None:
        check_number("max_new_tokens", max_new_tokens, COUNT, whole=True)
        super().__init__(*args, **kwargs)
        self.padding_free = padding_free and self.compile_options is None
        if padding_free and not self.padding_free:
            log.info("padding_free is off: compiled blocks read padded batches.")
        self.max_new_tokens = max_new_tokens
        self.generate_answers = generate
        self.exact_match = ExactMatch()
        self.choice = MultipleChoice()
        self.choice_norm = MultipleChoice(normalize=True)
        # The model that was probed, and its separable body. In a tuple, PyTorch does not register
        # them as submodules a second time.
        self._probed: tuple[Any, nn.Module | None] = (None, None)

    def configure_model(self) -> None:
        super().configure_model()
        data: Any = getattr(self._trainer, "datamodule", None)
        if getattr(data, "packing", False):
            check_packing(self.model, data.batch_size, data.max_length)

    # ---- the loss

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of every labelled token, and the row it is in: (tokens,), (tokens,).

        Args:
            input_ids: (rows, length).
            attention_mask: (rows, length), 0 on padding, or (rows, 1, length, length), where each
                token says which ones it sees. None for rows without padding.
            labels: (rows, length), -100 where a token is not trained on.
            inputs: further inputs that the model names. `position_ids` that begin again within a
                row separate its examples.
        """
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        losses, targets, _ = self._token_losses({**batch, **inputs})
        return losses, targets.row

    def _token_losses(
        self, batch: Any, beside: Collection[str] = ()
    ) -> tuple[Tensor, Targets, Tensor | None]:
        """Return the loss of every labelled token, these tokens, and the model's own terms.

        Args:
            batch: inputs and labels.
            beside: keys of the batch that are no inputs of the model.
        """
        inputs = read_inputs(batch, self.model, beside, BOUNDARY_KEYS)
        labels = read_labels(batch)
        check_shapes(inputs, labels)
        host = self.host_batch.of(entries(batch))
        targets = find_targets(labels, host["labels"])
        inputs = attention_inputs(inputs, self.model, host)
        split = self._body_and_head(inputs)
        if split is None:
            losses, own_terms = self._losses_from_logits(inputs, host, targets)
            return losses, targets, own_terms
        body, (weight, bias) = split
        hidden = self._hidden_states(body, inputs, host, targets)
        return linear_cross_entropy(hidden, weight, bias, targets.tokens), targets, None

    def _body_and_head(
        self, inputs: Mapping[str, Any]
    ) -> tuple[nn.Module, tuple[Tensor, Tensor | None]] | None:
        """Return the body, and (W, bias) of the head, if the loss can be computed without logits.

        The result is None if it cannot. It is also None if the model as a whole does more: if it
        has forward hooks, adds terms of its own to the loss, or reads an input that its body does
        not.
        """
        model = self.model
        if self._probed[0] is not model:
            self._probed = (model, separable_body(model))
        body = self._probed[1]
        head = plain(model.get_output_embeddings())
        is_hooked = model._forward_hooks or model._forward_pre_hooks
        if body is None or head is None or is_hooked or has_own_terms(model):
            return None
        return (body, head) if all(takes(body, key) for key in inputs) else None

    def _hidden_states(
        self, body: nn.Module, inputs: Mapping[str, Any], host: Mapping[str, Any], targets: Targets
    ) -> Tensor:
        """Return the last hidden states that predict a target, (tokens, d)."""
        mask = host.get("attention_mask")
        if inputs.keys() == {"input_ids", "attention_mask"} and mask is not None:
            mask = mask != 0
            if mask.dim() == 2 and self._skips_padding(body, mask, targets.predicts):
                hidden = padding_free.hidden_states(body, inputs["input_ids"], mask)
                return hidden.index_select(0, targets.select(targets.predicts[mask]))
        with known_attention(inputs, host, body) as ready:
            output = body(**ready)
        return selected(output.last_hidden_state, targets.index)

    def _skips_padding(self, body: nn.Module, mask: Tensor, predicts: Tensor) -> bool:
        """Tell whether this batch goes through the body without its padding."""
        is_training = self.training and torch.is_grad_enabled()
        if not (self.padding_free and is_training and padding_free.fits(body, mask)):
            return False
        # A label after padding is predicted from padding, which must then be computed.
        return not bool((predicts & ~mask).any())

    def _losses_from_logits(
        self, inputs: Mapping[str, Any], host: Mapping[str, Any], targets: Targets
    ) -> tuple[Tensor, Tensor | None]:
        """Return the losses (tokens,), and the terms that the model adds to its loss, or None.

        Logits are computed at positions where some row has a target.
        """
        columns = to_device(targets.columns, targets.labels.device)
        selects = takes(self.model, "logits_to_keep")
        selection = {"logits_to_keep": columns} if selects else {}
        own_terms: Tensor | None = None
        if has_own_terms(self.model):
            with own_terms_only(self.model):
                output = self.model(**inputs, **selection, labels=targets.labels[:, 1:])
            own_terms = output.loss
        else:
            with known_attention(inputs, host, self.model) as ready:
                output = self.model(**ready, **selection)
        logits = output.logits if selects else output.logits.index_select(1, columns)
        index = targets.select(targets.predicts.index_select(1, targets.columns))
        logits = at_least_float32(selected(logits, index))
        return F.cross_entropy(logits, targets.tokens, reduction="none"), own_terms

    def chance(self) -> dict[str, float]:
        tokens = self.model.get_input_embeddings().num_embeddings
        return {"loss": math.log(tokens), "vocabulary": float(tokens)}

    # ---- steps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses, _, own_terms = self._token_losses(batch)
        loss, count = self.mean_of(losses)
        means = {"train_loss": loss}
        if own_terms is not None:
            # Nothing trains on a batch without a label.
            own_terms = own_terms if len(losses) else 0 * own_terms
            means["train_aux_loss"] = own_terms
            loss = loss + own_terms
        self.step_mean.note(count, means)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        size = len(read_labels(batch))
        losses, _, _ = self._token_losses(batch, EVALUATION_KEYS)
        self.log_losses(losses, size)
        if self.generate_answers and "answers" in batch:
            # Nothing completes an empty prompt. The data module counts such rows in a warning.
            rows = batch["prompt_mask"].any(1).nonzero().flatten().tolist()
            if rows:
                texts = self.complete(batch["prompt_ids"][rows], batch["prompt_mask"][rows])
                self.exact_match.update(texts, [batch["answers"][row] for row in rows])
            self.log("exact_match", self.exact_match, prog_bar=True, batch_size=size)
        if "choices" in batch:
            self._score_choices(batch["choices"], size)

    def _score_choices(self, choices: dict[str, Tensor], batch_size: int) -> None:
        """Update and log the accuracies over choices, one row of the batch per choice."""
        losses, targets, _ = self._token_losses(choices, CHOICE_KEYS)
        zeros = torch.zeros(len(choices["labels"]), device=losses.device)
        log_probabilities = zeros.index_add(0, targets.row, -losses)
        for metric, name in ((self.choice, "accuracy"), (self.choice_norm, "accuracy_norm")):
            metric.update(
                log_probabilities, choices["characters"], choices["group"], choices["target"]
            )
            self.log(name, metric, batch_size=batch_size)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        completions = self.complete(batch["prompt_ids"], batch["prompt_mask"])
        return [
            {"prompt": prompt, "completion": completion}
            for prompt, completion in zip(batch["prompts"], completions, strict=True)
        ]

    @torch.no_grad()
    def complete(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """Return the greedy continuations of left-padded prompts (B, T), as B texts.

        Where the model has a fixed number of positions, a prompt loses its first tokens until the
        answer has room, or until the prompt has half of the positions. The answer is then shorter.

        Raises:
            UserError: if a prompt has no token.
        """
        if not bool(prompt_mask.any(1).all()):
            raise UserError(
                "A prompt is empty, and there is nothing to complete. Remove or fill such rows."
            )
        most = self.max_new_tokens
        positions = position_limit(self.model)
        if positions is None or prompt_ids.shape[1] + most <= positions + 1:
            return self._continue(prompt_ids, prompt_mask, most)
        self._warn_of_positions(positions)
        bos = self.tokenizer.bos_token_id
        prompt_ids, prompt_mask = cut_prompts(prompt_ids, prompt_mask, positions, most, bos)
        texts = [""] * len(prompt_ids)
        # A row's answer does not depend on the other rows of its batch.
        for rows, longest in rows_with_room(prompt_mask, positions, most):
            width = int(prompt_mask[rows].sum(1).max())
            part = (prompt_ids[rows, -width:], prompt_mask[rows, -width:])
            for row, text in zip(rows, self._continue(*part, longest), strict=True):
                texts[row] = text
        return texts

    def _continue(self, prompt_ids: Tensor, prompt_mask: Tensor, longest: int) -> list[str]:
        """Return continuations of at most `longest` tokens."""
        # Rows of added tokens are put into the embedding once, and not for every token.
        with parametrize.cached():
            output = self.model.generate(
                input_ids=prompt_ids,
                attention_mask=prompt_mask,
                max_new_tokens=longest,
                do_sample=False,
                use_cache=True,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        # An end token that is not special would be part of the text.
        ends = stop_ids_of(self.model.generation_config)
        generated = [before_end(row, ends) for row in output[:, prompt_ids.shape[1] :].tolist()]
        texts: list[str] = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return texts

    def _warn_of_positions(self, positions: int) -> None:
        """Say once that prompts and answers do not fit together."""
        if ("positions", positions) in self.warned:
            return
        self.warned.add(("positions", positions))
        log.warning(
            "The model has %d positions, and some prompts with max_new_tokens=%d need more. Such "
            "prompts lose their first tokens, but keep half of the positions. Where an answer then "
            "has too little room, it is shorter. Lower max_length of the data or max_new_tokens.",
            positions,
            self.max_new_tokens,
        )
