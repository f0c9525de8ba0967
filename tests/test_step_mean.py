"""An accumulated step is the mean over all of its targets, as one big batch would be."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from adaptrank.allocation import AdaLoRA
from adaptrank.modules import Adapter, CausalLM, SequenceClassification
from adaptrank.parameterizations import SVD, LoRA
from adaptrank.training.step_mean import StepMean

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}
LENGTHS = [(9, 7), (4,), (12, 5, 3), (2,), (11, 6)]
"""Lengths of the rows of five batches."""


def rows(lengths, seed=0):
    """A right-padded batch of rows with these lengths; the first two tokens are a prompt."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.randint(3, 40, (length,), generator=random)
        mask[row, :length] = 1
        labels[row, 2:length] = ids[row, 2:length]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def together(batches, pad_label=-100):
    """The rows of several batches as one batch."""
    width = max(batch["input_ids"].shape[1] for batch in batches)
    whole = {}
    for key in batches[0]:
        fill = pad_label if key == "labels" else 0
        parts = [batch[key] for batch in batches]
        if parts[0].dim() == 2:
            parts = [nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in parts]
        whole[key] = torch.cat(parts)
    return whole


class TinyCausal(CausalLM):
    """A module whose backbone is made here, in float64."""

    tokenizer = None

    def load_backbone(self):
        torch.manual_seed(0)
        # Llama computes its norms in float32, whatever its dtype.
        config = GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).double()


class TinyClassifier(SequenceClassification):
    """A classifier whose backbone is made here, in float64."""

    tokenizer = None

    def load_backbone(self):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return BertForSequenceClassification(config).double()


class Watch(Callback):
    """Keep the gradients and the logged loss of each step, as a callback after ours sees them."""

    def __init__(self):
        self.gradients, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        self.gradients.append([p.grad.clone() for p in trained])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == len(self.gradients) > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))


def train(kind, batches, *callbacks, method=None, padding_free=True, **arguments):
    optimizer = partial(torch.optim.SGD, lr=0.5)
    causal = {"generate": False, "padding_free": padding_free}
    more = {"num_labels": 3} if kind is TinyClassifier else causal
    module = kind(
        "none",
        [Adapter([method or partial(LoRA, rank=2)])],
        optimizer=optimizer,
        warmup=0,
        schedule="constant",
        **more,
    )
    module.configure_model()
    torch.manual_seed(1)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and name.endswith(".B"):
            nn.init.normal_(parameter, std=0.3)
    watch = Watch()
    trainer = Trainer(
        **QUIET, max_epochs=1, callbacks=[*callbacks, watch], gradient_clip_val=0.7, **arguments
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    state = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    return state, watch, trainer


def check_equal(split, whole):
    (have, watched, _), (want, wanted, _) = split, whole
    for ours, theirs in zip(watched.gradients, wanted.gradients, strict=True):
        for grad, exact in zip(ours, theirs, strict=True):
            torch.testing.assert_close(grad, exact, rtol=1e-11, atol=1e-13)
    assert watched.losses == pytest.approx(wanted.losses, rel=1e-6)
    for name, value in want.items():
        torch.testing.assert_close(have[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("padding_free", [True, False])
def test_unequal_batches_are_one_big_batch(monkeypatch, padding_free):
    """Five batches, three to a step, so that the last step of the epoch has two."""
    monkeypatch.setattr("adaptrank.modules.padding_free.SHORT_ROW", 1)
    batches = [rows(lengths, seed) for seed, lengths in enumerate(LENGTHS)]
    whole = [together(batches[:3]), together(batches[3:])]
    split = train(TinyCausal, batches, padding_free=padding_free, accumulate_grad_batches=3)
    assert len(split[1].losses) == 2
    check_equal(split, train(TinyCausal, whole, padding_free=padding_free))


def test_a_batch_without_a_label_in_the_middle_of_a_step_changes_nothing():
    batches = [rows(lengths, seed) for seed, lengths in enumerate(LENGTHS[:3])]
    silent = rows((6, 5))
    silent["labels"][:] = -100
    for place in (0, 1, 3):
        split = [*batches[:place], silent, *batches[place:]]
        check_equal(
            train(TinyCausal, split, accumulate_grad_batches=4),
            train(TinyCausal, [together(batches)]),
        )


def test_unequal_batches_of_a_classifier_are_one_big_batch():
    batches = []
    for seed, lengths in enumerate(LENGTHS[:3]):
        batch = rows(lengths, seed)
        batch["labels"] = torch.arange(len(lengths)) % 3
        batches.append(batch)
    batches[0]["labels"][0] = -100
    check_equal(
        train(TinyClassifier, batches, accumulate_grad_batches=3),
        train(TinyClassifier, [together(batches)]),
    )


def test_penalties_and_scores_see_the_mean_of_the_step():
    """A penalty is added once and not scaled, and an allocator scores the step's gradient."""
    batches = [rows(lengths, seed) for seed, lengths in enumerate(LENGTHS[:4])]
    whole = [together(batches[:2]), together(batches[2:])]
    method = partial(SVD, rank=4, orth=0.5)

    def run(batches, **arguments):
        allocator = AdaLoRA(budget=14, soft=False, every=1, warmup=0, final=0)
        result = train(TinyCausal, batches, allocator, method=method, **arguments)
        return result, allocator.events

    split, events = run(batches, accumulate_grad_batches=2)
    expected, expected_events = run(whole)
    check_equal(split, expected)
    assert [event["pruned"] for event in events] == [e["pruned"] for e in expected_events]
    for event, exact in zip(events, expected_events, strict=True):
        assert event["scores"] == pytest.approx(exact["scores"], rel=1e-9, abs=1e-15)


def test_one_batch_in_one_process_is_left_to_the_last_bit():
    step, loss = StepMean(), torch.tensor(1.7, requires_grad=True)
    step.note(torch.tensor(3), {"train_loss": loss})
    assert step.weigh(loss, 1) is loss
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 0.1)
    assert step.complete([weight], 1) == {"train_loss": loss.detach()}
    assert torch.equal(weight.grad, torch.full((2,), 0.1))


def test_batches_of_equal_counts_have_weights_of_one():
    """A step that had the right mean before keeps it, to the last bit."""
    step, losses = StepMean(), [torch.tensor(0.3), torch.tensor(0.7)]
    for loss in losses:
        step.note(torch.tensor(5), {"train_loss": loss})
        assert torch.equal(step.weigh(loss, 2), loss)
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 0.1)
    assert float(step.complete([weight], 2)["train_loss"]) == pytest.approx(0.5)
    assert torch.equal(weight.grad, torch.full((2,), 0.1))


def test_an_interrupted_step_leaves_nothing_to_the_next_run():
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True
            raise KeyboardInterrupt

    batches = [rows(lengths, seed) for seed, lengths in enumerate(LENGTHS[:2])]
    module = TinyCausal(
        "none",
        [Adapter([partial(LoRA, rank=2)])],
        optimizer=partial(torch.optim.SGD, lr=0.5),
        warmup=0,
        generate=False,
    )
    loader = DataLoader(batches, batch_size=None)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2, callbacks=[Stop()]).fit(
            module, loader
        )
    assert module.step_mean._batches == 1
    watch = Watch()
    Trainer(**QUIET, max_steps=1, callbacks=[watch]).fit(module, loader)
    assert module.step_mean._batches == 0
