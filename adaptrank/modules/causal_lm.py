"""Fine-tune a causal language model on completions.

The evaluation measures loss, perplexity, exact match of generated answers, and multiple choice.
"""

import inspect
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from adaptrank._errors import UserError
from adaptrank.artifacts import stop_ids_of
from adaptrank.backbones import before_end
from adaptrank.modules import padding_free
from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.body_and_head import separable_body
from adaptrank.modules.metrics import ExactMatch, MultipleChoice
from adaptrank.ops.cross_entropy import linear_cross_entropy
from adaptrank.ops.low_rank import plain

IGNORED = -100
"""Label of tokens that are not trained on."""


class CausalLM(AdaptedModule):
    """A causal language model, trained on the tokens whose label is not -100.

    The evaluation reports `loss` per completion token, weighted by tokens, and its exponent
    `perplexity`. Where rows have an `answer`, it reports `exact_match` of greedy generations. Where
    rows have `choices`, it reports `accuracy` by summed log-probability, and `accuracy_norm` by
    log-probability per character. Logits are computed for completion tokens only.

    Args:
        max_new_tokens: longest generation, in tokens.
        generate: whether to generate for exact match.
        padding_free: in training, compute nothing for padding, where the model is one of
            `padding_free.MODEL_TYPES`. Losses are the same.
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
        super().__init__(*args, **kwargs)
        self.padding_free = padding_free
        self.max_new_tokens = max_new_tokens
        self.generate_answers = generate
        self.mean_loss = MeanMetric()
        self.exact_match = ExactMatch()
        self.choice = MultipleChoice()
        self.choice_norm = MultipleChoice(normalize=True)
        # The model that was probed, and its separable body. In a tuple, PyTorch does not register
        # them as submodules a second time.
        self._probed: tuple[Any, nn.Module | None] = (None, None)

    # ---- the loss

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of every labelled token, and the row it is in: (tokens,), (tokens,).

        Args:
            input_ids: (rows, length).
            attention_mask: (rows, length), 0 on padding.
            labels: (rows, length), -100 where a token is not trained on.
        """
        if labels.dim() != 2:
            raise UserError(
                "CausalLM needs a label for each token, (rows, tokens), and got labels of shape "
                f"{tuple(labels.shape)}. Use a data module of completions, such as CausalLMData, "
                "or the module SequenceClassification."
            )
        targets = labels[:, 1:]
        is_target = targets != IGNORED
        split = self._body_and_head()
        if split is None:
            losses = self._losses_from_logits(input_ids, attention_mask, targets, is_target)
        else:
            body, (weight, bias) = split
            hidden = self._hidden_states(body, input_ids, attention_mask, is_target)
            losses = linear_cross_entropy(hidden, weight, bias, targets[is_target])
        return losses, is_target.nonzero()[:, 0]

    def _body_and_head(self) -> tuple[nn.Module, tuple[Tensor, Tensor | None]] | None:
        """Return the body, and (W, bias) of the head, if the loss can be computed without logits.

        The result is None if it cannot. It is also None if the model has forward hooks, which
        would not run, because the model is not called as a whole.
        """
        model = self.model
        if self._probed[0] is not model:
            self._probed = (model, separable_body(model))
        body = self._probed[1]
        head = plain(model.get_output_embeddings())
        is_hooked = model._forward_hooks or model._forward_pre_hooks
        if body is None or head is None or is_hooked:
            return None
        return body, head

    def _hidden_states(
        self, body: nn.Module, input_ids: Tensor, attention_mask: Tensor, is_target: Tensor
    ) -> Tensor:
        """Return the last hidden states that predict a target, (tokens, d)."""
        mask = attention_mask != 0
        predicts = F.pad(is_target, (0, 1))
        if self._skips_padding(body, mask, predicts):
            return padding_free.hidden_states(body, input_ids, mask)[predicts[mask]]
        output = body(input_ids=input_ids, attention_mask=attention_mask)
        hidden: Tensor = output.last_hidden_state
        return hidden[predicts]

    def _skips_padding(self, body: nn.Module, mask: Tensor, predicts: Tensor) -> bool:
        """Tell whether this batch goes through the body without its padding."""
        is_training = self.training and torch.is_grad_enabled()
        if not (self.padding_free and is_training and padding_free.fits(body, mask)):
            return False
        # A label after padding is predicted from padding, which must then be computed.
        return not bool((predicts & ~mask).any())

    def _losses_from_logits(
        self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor, is_target: Tensor
    ) -> Tensor:
        """Return the losses (tokens,) from the logits of positions where some row has a target."""
        columns = is_target.any(0).nonzero().squeeze(1)
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=columns
            ).logits
        else:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask)
            logits = output.logits[:, columns]
        is_target, targets = is_target[:, columns], targets[:, columns]
        return F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="none")

    def chance(self) -> dict[str, float]:
        tokens = self.model.get_input_embeddings().num_embeddings
        return {"loss": math.log(tokens), "vocabulary": float(tokens)}

    # ---- steps

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        losses, _ = self(batch["input_ids"], batch["attention_mask"], batch["labels"])
        loss: Tensor = losses.mean()
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        size = len(batch["input_ids"])
        losses, _ = self(batch["input_ids"], batch["attention_mask"], batch["labels"])
        self.mean_loss.update(losses)
        self.log("loss", self.mean_loss, prog_bar=True, batch_size=size)
        if self.generate_answers and "answers" in batch:
            texts = self.complete(batch["prompt_ids"], batch["prompt_mask"])
            self.exact_match.update(texts, batch["answers"])
            self.log("exact_match", self.exact_match, prog_bar=True, batch_size=size)
        if "choices" in batch:
            self._score_choices(batch["choices"], size)

    def _score_choices(self, choices: dict[str, Tensor], batch_size: int) -> None:
        """Update and log the accuracies over choices, one row of the batch per choice."""
        losses, row = self(choices["input_ids"], choices["attention_mask"], choices["labels"])
        zeros = torch.zeros(len(choices["input_ids"]), device=losses.device)
        log_probabilities = zeros.index_add(0, row, -losses)
        for metric, name in ((self.choice, "accuracy"), (self.choice_norm, "accuracy_norm")):
            metric.update(
                log_probabilities, choices["characters"], choices["group"], choices["target"]
            )
            self.log(name, metric, batch_size=batch_size)

    def on_validation_epoch_end(self) -> None:
        if self.mean_loss.update_called:
            self.log("perplexity", self.mean_loss.compute().exp())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        completions = self.complete(batch["prompt_ids"], batch["prompt_mask"])
        return [
            {"prompt": prompt, "completion": completion}
            for prompt, completion in zip(batch["prompts"], completions, strict=True)
        ]

    @torch.no_grad()
    def complete(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """Return the greedy continuations of left-padded prompts (B, T), as B texts."""
        output = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        # An end token that is not special would be part of the text.
        ends = stop_ids_of(self.model.generation_config)
        generated = [before_end(row, ends) for row in output[:, prompt_ids.shape[1] :].tolist()]
        texts: list[str] = self.tokenizer.batch_decode(generated, skip_special_tokens=True)
        return texts
