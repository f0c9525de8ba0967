"""A training step reads nothing from its device between events and log intervals."""

import inspect
from functools import partial

import pytest
import torch
from conftest import perturb
from lightning.pytorch import Trainer
from lightning.pytorch.core import hooks
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from step_reads import DeviceReads
from test_batches import Ready, examples, packed, tiny
from test_step_mean import QUIET, TinyClassifier
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForSequenceClassification

from adaptrank.allocation import ALLOCATORS, AdaLoRA, DyLoRA, DynamicRank, SoRA
from adaptrank.allocation.scores.importance import IMPORTANCES
from adaptrank.cli.progress import StepLines
from adaptrank.injection import adapt
from adaptrank.modules import Adapter
from adaptrank.modules.host_batch import HostBatch
from adaptrank.modules.known_attention import ENCODERS, known_attention
from adaptrank.parameterizations import SVD, LoRA, wrappers

LOG_EVERY = 4


def move_and_place(reads):
    """Move batches by a copy, which is on the device."""

    def move(batch, device):
        reads.take_back(t for t in tree_leaves(batch) if isinstance(t, torch.Tensor))
        moved = tree_map(lambda value: value.clone(), batch)
        reads.place(tree_leaves(moved))
        return moved

    return move


def reads_between_logs(module, batches, monkeypatch, **trainer):
    """Train on the batches, and return the reads of the steps that log nothing.

    The first step and the last are left out: some things begin in the one, and end in the other.
    """
    reads = DeviceReads()
    advance = _TrainingEpochLoop.advance
    monkeypatch.setattr(hooks, "move_data_to_device", move_and_place(reads))

    def watched(loop, fetcher):
        step = loop.trainer.global_step + 1
        if step == 1:
            reads.place([*module.parameters(), *module.buffers()])
        if step in (1, len(batches)) or step % LOG_EVERY == 0:
            return advance(loop, fetcher)
        with reads:
            return advance(loop, fetcher)

    monkeypatch.setattr(_TrainingEpochLoop, "advance", watched)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=LOG_EVERY,
        gradient_clip_val=1.0,
        **trainer,
    ).fit(module, DataLoader(batches, batch_size=None))
    return reads.reads


def padded(texts, width):
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = text
        mask[row, : len(text)] = 1
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


FORMS = {
    "padding-free": padded(examples(), 24),
    "padded": padded(examples(), 12),
    "whole rows": {
        key: torch.cat([value[2:], value[2:]]) for key, value in padded(examples(), 12).items()
    },
    "packed": packed(examples()),
}


@pytest.fixture
def one_line(monkeypatch):
    """Progress in one line, at the end."""
    monkeypatch.setattr("adaptrank.cli.progress.LINES", 1)


@pytest.mark.parametrize(
    ("form", "head"), [*((form, "frozen") for form in FORMS), ("padded", "trained")]
)
def test_a_step_of_a_language_model(form, head, monkeypatch, one_line):
    module = Ready(tiny(num_hidden_layers=1).float(), partial(SVD, rank=3))
    module.model.get_output_embeddings().requires_grad_(head == "trained")
    allocator = AdaLoRA(budget=10, every=4, warmup=2, final=2)
    batches = [FORMS[form]] * 6
    found = reads_between_logs(module, batches, monkeypatch, callbacks=[allocator, StepLines()])
    assert not found, "\n".join(found)


def test_a_step_of_a_classifier(monkeypatch, one_line):
    module = TinyClassifier("none", [Adapter([LoRA])], num_labels=3)
    batch = {**padded(examples(), 14), "labels": torch.tensor([0, -100, 2])}
    found = reads_between_logs(module, [batch] * 6, monkeypatch, callbacks=[StepLines()])
    assert not found, "\n".join(found)


# ---- what the host knows of a batch


def test_a_batch_that_was_changed_on_the_device_is_read_there():
    host = {"labels": torch.ones(2, 3), "names": ["a", "b"], "mask": torch.ones(2, 3)}
    moved = {key: value.clone() if key != "names" else value for key, value in host.items()}
    known = HostBatch()
    known.note(host, moved)
    assert set(moved) == set(host)
    assert all(known.of(moved)[key] is host[key] for key in host)
    moved["labels"][0] = -100
    other = {**moved, "mask": moved["mask"].clone()}
    assert known.of(other)["labels"] is moved["labels"]
    assert known.of(other)["mask"] is other["mask"]
    known.note(moved, host)
    assert known.of(moved)["mask"] is moved["mask"]


def test_a_batch_of_which_one_tensor_is_unknown_is_read_on_the_device_as_a_whole():
    host = {"labels": torch.ones(2, 3), "mask": torch.ones(2, 3)}
    moved = {key: value.to("meta") for key, value in host.items()}
    known = HostBatch()
    known.note(host, moved)
    assert known.of(moved)["mask"] is host["mask"]
    changed = {**moved, "labels": torch.ones(2, 3, device="meta")}
    assert known.of(changed)["mask"] is moved["mask"]


def test_inputs_beside_which_a_mask_is_not_all_are_left_alone():
    model = tiny("llama")
    mask = torch.ones(2, 4, dtype=torch.long)
    inputs = {"input_ids": mask, "attention_mask": mask, "encoder_attention_mask": mask}
    with known_attention(inputs, inputs, model) as ready:
        assert ready is inputs
    model.config.model_type = "gpt2"
    with known_attention(dict(list(inputs.items())[:2]), inputs, model) as ready:
        assert ready["attention_mask"] is mask


@pytest.mark.parametrize("hook", ["transfer_batch_to_device", "on_after_batch_transfer"])
def test_a_module_that_moves_its_batches_itself_is_left_alone(hook, monkeypatch):
    """Its labels are others on the device. They are what is trained on."""

    def other_labels(self, batch, *args):
        return {**batch, "labels": torch.full_like(batch["labels"], -100)}

    module = type("Own", (Ready,), {hook: other_labels})(tiny(num_hidden_layers=1).float(), LoRA)
    lengths = []
    monkeypatch.setattr(module.step_mean, "note", lambda count, means: lengths.append(int(count)))
    batches = DataLoader([FORMS["padded"]] * 2, batch_size=None)
    Trainer(max_steps=2, **QUIET).fit(module, batches)
    assert lengths == [0, 0]


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("model_type", [*sorted(ENCODERS), "llama"])
def test_attention_that_is_known_is_that_of_the_plain_mask(model_type, hides):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "dim": 16}
    sizes |= {"num_attention_heads": 2, "vocab_size": 40, "pad_token_id": 0, "n_layers": 1}
    sizes |= {"n_heads": 2, "hidden_dim": 24, "embedding_size": 16, "num_key_value_heads": 2}
    known = AutoConfig.for_model(model_type)
    sizes = {key: value for key, value in sizes.items() if hasattr(known, key)}
    config = AutoConfig.for_model(model_type, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    batch = padded(examples(), 13 if hides else 12)
    inputs = {
        key: batch[key] if hides else batch[key][2:] for key in ("input_ids", "attention_mask")
    }
    with known_attention(inputs, inputs, model) as ready:
        assert ready["attention_mask"] is not inputs["attention_mask"]
        assert torch.equal(model(**ready).logits, model(**inputs).logits)
    assert model.config._attn_implementation == "sdpa"
    watching = model.register_forward_pre_hook(lambda *args: None, with_kwargs=True)
    with known_attention(inputs, inputs, model) as ready:
        assert ready is inputs  # the hook may look for the mask
    watching.remove()


# ---- allocators


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return x + self.down_proj(self.up_proj(x).tanh())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def allocators():
    """Every allocator, every score, and the settings with a step of their own."""
    for name, kind in ALLOCATORS.items():
        if kind.__module__.startswith("adaptrank."):
            yield name, kind, {}
    for score in IMPORTANCES:
        yield score, AdaLoRA, {"importance": score}
    yield "SoRA within a budget", SoRA, {"budget": 70, "unit": "parameters"}
    yield "DyLoRA, drawn units", DyLoRA, {"rule": "drawn"}
    yield "DynamicRank, early", DynamicRank, {"rule": "early"}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [case[1:] for case in allocators()],
    ids=[case[0] for case in allocators()],
)
def test_a_step_of_an_allocator(kind, settings):
    model = adapt(Blocks(), "all-linear", partial(LoRA, rank=3))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    batches = [torch.randn(4, 8) for _ in range(8)]
    known = inspect.signature(kind).parameters
    allocator = kind(**{name: 8 for name in ("every", "warmup") if name in known}, **settings)
    allocator.start(model, optimizer, 200, batches=batches, loss=model)
    for wrapper in wrappers(model):
        perturb(wrapper, 0.2)
    reads = DeviceReads()
    reads.place([*model.parameters(), *model.buffers()])
    reads.place(tracked.tensor for tracked in allocator.engine.state)
    for batch in batches[:5]:
        with reads:
            model(batch).backward()
            allocator.before_step()
            optimizer.step()
            optimizer.zero_grad()
            assert allocator.step() is None
    assert not reads.reads, "\n".join(reads.reads)
