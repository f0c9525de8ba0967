"""Fine-tune a causal language model on completions, and evaluate it by loss, perplexity, exact match and choices."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from adaptrank._errors import UserError
from adaptrank.modules import padding_free as unpadded
from adaptrank.modules.adapted import AdaptedModule
from adaptrank.modules.metrics import ExactMatch, MultipleChoice
from adaptrank.ops import low_rank as products
from adaptrank.ops.cross_entropy import linear_cross_entropy


class CausalLM(AdaptedModule):
    """A causal language model, trained on the tokens whose label is not -100.

    Evaluation: `loss` per completion token (weighted by tokens) and `perplexity`, its exponent; where rows have an
    `answer`, `exact_match` of greedy generations; where they have `choices`, `accuracy` by summed log-probability and
    `accuracy_norm` by log-probability per character. Logits are computed for completion tokens only.

    Args:
        max_new_tokens: longest generation, in tokens.
        generate: whether to generate for exact match.
        padding_free: in training, compute nothing for padding, where the model is one of `unpadded.MODEL_TYPES`; losses are the same.
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
        self.max_new_tokens, self.generate_answers = max_new_tokens, generate
        self.mean_loss = MeanMetric()
        self.exact_match = ExactMatch()
        self.choice = MultipleChoice()
        self.choice_norm = MultipleChoice(normalize=True)
        self._split: tuple[Any, nn.Module | None] = (
            None,
            None,
        )  # the model that was asked, and its body

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss of every labelled token, and the row it is in: (tokens,), (tokens,)."""
        if labels.dim() != 2:
            raise UserError(
                f"CausalLM needs a label for each token, (rows, tokens), and got labels of shape {tuple(labels.shape)}; use a "
                f"data module of completions, such as CausalLMData, or the module SequenceClassification."
            )
        targets = labels[:, 1:]
        wanted = targets != -100
        split = self._body_and_head()
        if split is not None:
            body, head = split
            hidden = self._hidden(body, input_ids, attention_mask, wanted)
            return linear_cross_entropy(hidden, *head, targets[wanted]), wanted.nonzero()[:, 0]
        columns = wanted.any(0).nonzero().squeeze(1)  # positions that some row needs
        if "logits_to_keep" in self._forward_arguments:
            logits = self.model(
                input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=columns
            ).logits
        else:
            logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits[
                :, columns
            ]
        wanted, targets = wanted[:, columns], targets[:, columns]
        losses = F.cross_entropy(logits[wanted].float(), targets[wanted], reduction="none")
        return losses, wanted.nonzero()[:, 0]

    def _hidden(
        self, body: nn.Module, input_ids: Tensor, attention_mask: Tensor, wanted: Tensor
    ) -> Tensor:
        """Last hidden states where the next token is wanted: (tokens, d)."""
        mask, here = attention_mask != 0, F.pad(wanted, (0, 1))
        trains = self.training and torch.is_grad_enabled()
        if (
            self.padding_free
            and trains
            and unpadded.fits(body, mask)
            and not bool((here & ~mask).any())
        ):
            return unpadded.hidden_states(body, input_ids, mask)[here[mask]]
        hidden: Tensor = body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden[here]

    def _body_and_head(self) -> tuple[nn.Module, tuple[Tensor, Tensor | None]] | None:
        """The body, and (W, bias) of the head, where the loss can be computed without logits; None where it cannot, or where
        hooks would miss that the model is not called whole."""
        model = self.model
        if self._split[0] is not model:
            self._split = (model, body_of(model))
        body, head = self._split[1], products.plain(model.get_output_embeddings())
        hooked = model._forward_hooks or model._forward_pre_hooks
        return None if body is None or head is None or hooked else (body, head)

    @property
    def _forward_arguments(self) -> Mapping[str, Any]:
        return inspect.signature(self.model.forward).parameters

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
            self.exact_match.update(
                self.complete(batch["prompt_ids"], batch["prompt_mask"]), batch["answers"]
            )
            self.log("exact_match", self.exact_match, prog_bar=True, batch_size=size)
        if "choices" in batch:
            rows = batch["choices"]
            losses, row = self(rows["input_ids"], rows["attention_mask"], rows["labels"])
            scores = torch.zeros(len(rows["input_ids"]), device=losses.device).index_add(
                0, row, -losses
            )
            for metric, name in ((self.choice, "accuracy"), (self.choice_norm, "accuracy_norm")):
                metric.update(scores, rows["characters"], rows["group"], rows["target"])
                self.log(name, metric, batch_size=size)

    def on_validation_epoch_end(self) -> None:
        if self.mean_loss.update_called:
            self.log("perplexity", self.mean_loss.compute().exp())

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, str]]:
        texts = self.complete(batch["prompt_ids"], batch["prompt_mask"])
        return [
            {"prompt": p, "completion": t} for p, t in zip(batch["prompts"], texts, strict=True)
        ]

    @torch.no_grad()
    def complete(self, prompt_ids: Tensor, prompt_mask: Tensor) -> list[str]:
        """Greedy continuations of left-padded prompts (B, T), as B texts."""
        output = self.model.generate(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        texts: list[str] = self.tokenizer.batch_decode(
            output[:, prompt_ids.shape[1] :], skip_special_tokens=True
        )
        return texts


def body_of(model: Any) -> nn.Module | None:
    """The body of a causal language model whose logits are head(body(...).last_hidden_state) and nothing more, else None.

    Asked of the model itself: with hidden states in the place of its body, does it return what its head makes of them? Models that
    scale or cap logits do not. The head must be a frozen linear layer.
    """
    from transformers.modeling_outputs import BaseModelOutput

    class Output(BaseModelOutput):
        """Has no caches, router logits or whatever else a body may return."""

        def __getattr__(self, name: str) -> None:
            if name.startswith("_"):
                raise AttributeError(name)

    body, head = (
        getattr(model, model.base_model_prefix or "model", None),
        model.get_output_embeddings(),
    )
    plain = products.plain(head)
    if not isinstance(body, nn.Module) or body is model or plain is None:
        return None
    W = plain[0]
    hidden = torch.linspace(-1, 1, 3 * W.shape[1], device=W.device, dtype=W.dtype).view(1, 3, -1)
    tokens = torch.zeros(1, 3, dtype=torch.long, device=W.device)
    own = vars(body).get("forward")
    body.forward = lambda *args, **kwargs: Output(last_hidden_state=hidden)
    try:
        with torch.no_grad():
            logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
            return body if torch.equal(logits, head(hidden)) else None
    except (
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
    ):  # it reads more of its body than the last hidden state
        return None
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own
