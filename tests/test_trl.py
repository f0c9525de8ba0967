"""Allocators in TRL's trainers, and the frozen base as their reference model."""

import gc
from functools import partial

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
)

from adaptrank import adapt, load_adapter, rank_axes
from adaptrank.allocation import AdaLoRA
from adaptrank.interop.trainers import BaseReference, allow_quantized, use_base_as_reference
from adaptrank.parameterizations import SVD, LoRA

trl = pytest.importorskip("trl")

SCHEDULE = {"every": 1, "warmup": 1, "final": 1}
COMMON = {
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
PAIRS = Dataset.from_list(
    [
        {"prompt": "How many has", "chosen": f" {i % 10} and", "rejected": f" more {i % 7}"}
        for i in range(8)
    ]
)
TEXTS = Dataset.from_list(
    [{"prompt": "How many has", "completion": f" {i % 10} and {i % 7}"} for i in range(8)]
)


def adapted(folder, of=AutoModelForCausalLM, train_modules=(), **changes):
    model = of.from_pretrained(folder, **changes)
    method = partial(SVD, rank=3, orth=0.1)
    return adapt(model, ["q_proj", "v_proj"], method, train_modules=train_modules)


def allocator():
    return AdaLoRA(budget=5, **SCHEDULE)


def sizes(model):
    return {key: len(axis) for key, axis in rank_axes(model).items()}


def reward(completions, **_):
    return [float(sum(map(ord, completion)) % 7) for completion in completions]


def sft(folder, out, *callbacks, data=TEXTS, model=None, **changes):
    return trl.SFTTrainer(
        adapted(folder) if model is None else model,
        args=trl.SFTConfig(str(out), **{**COMMON, **changes}),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[*callbacks],
    )


def dpo(folder, out, *callbacks, attention_dropout=0.0, **changes):
    model = adapted(folder, attention_dropout=attention_dropout)
    return trl.DPOTrainer(
        model,
        ref_model=BaseReference(model),
        args=trl.DPOConfig(str(out), **{**COMMON, **changes}),
        train_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[*callbacks],
    )


def rewards(folder, out, *callbacks, **changes):
    return trl.RewardTrainer(
        adapted(folder, AutoModelForSequenceClassification, ["score"], num_labels=1),
        args=trl.RewardConfig(str(out), **{**COMMON, **changes}),
        train_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[*callbacks],
    )


def grpo(folder, out, *callbacks, **changes):
    settings = {"num_generations": 2, "max_completion_length": 4, "max_steps": 3, **changes}
    return trl.GRPOTrainer(
        adapted(folder),
        reward_funcs=reward,
        args=trl.GRPOConfig(str(out), **{**COMMON, **settings}),
        train_dataset=PAIRS.remove_columns(["chosen", "rejected"]),
        processing_class=AutoTokenizer.from_pretrained(folder),
        callbacks=[*callbacks],
    )


TRAINERS = {"SFT": sft, "DPO": dpo, "reward": rewards, "GRPO": grpo}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", TRAINERS)
def test_ranks_move_and_checkpoints_are_adapters(kind, tiny_llama, tmp_path):
    policy = allocator()
    trainer = TRAINERS[kind](tiny_llama, tmp_path, policy)
    start = sizes(trainer.model)
    trainer.train()
    assert policy.events
    assert sum(sizes(trainer.model).values()) == 5 < sum(start.values())
    steps = trainer.state.global_step
    folder = tmp_path / f"checkpoint-{steps}"
    stored = load_file(folder / "model.safetensors")
    own = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert stored.keys() == {*own, "adaptrank.run_state"}
    if kind == "reward":
        assert "score.weight" in own
        plain = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
        loaded = load_adapter(plain, folder)
        assert torch.equal(loaded.score.weight, trainer.model.score.weight)


# ---- the frozen base as the reference


@pytest.mark.filterwarnings("ignore")
def test_the_reference_of_dpo_is_the_base_and_no_second_model(tiny_llama, tmp_path):
    gc.collect()
    before = {id(m) for m in gc.get_objects() if isinstance(m, PreTrainedModel)}
    trainer = dpo(tiny_llama, tmp_path, allocator(), attention_dropout=0.5, disable_dropout=False)
    trainer.train()
    models = [m for m in gc.get_objects() if isinstance(m, PreTrainedModel)]
    new = [m for m in models if id(m) not in before and type(m) is type(trainer.model)]
    assert new == [trainer.model]

    batch = next(iter(trainer.get_train_dataloader()))
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    other = trl.DPOTrainer(
        adapted(tiny_llama),
        ref_model=plain,
        args=trl.DPOConfig(str(tmp_path), **COMMON),
        train_dataset=PAIRS,
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    trainer.model.train()
    ours = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    theirs = other.compute_ref_log_probs(other.ref_model, batch)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    policy = trainer.compute_ref_log_probs(trainer.model, batch)
    assert not torch.equal(policy[0], ours[0])
    assert trainer.model.training
    assert all(m.training for m in trainer.model.modules())


@pytest.mark.filterwarnings("ignore")
def test_grpo_takes_the_base_as_its_reference(tiny_llama, tmp_path):
    trainer = grpo(tiny_llama, tmp_path, allocator(), logging_steps=1)
    use_base_as_reference(trainer, beta=0.5)
    trainer.train()
    divergences = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert divergences
    assert divergences[-1] > 0
    with pytest.raises(ValueError, match="has loaded a second model as its reference"):
        use_base_as_reference(trainer, beta=0.5)


@pytest.mark.tables
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_trains_and_resumes(bits, tiny_llama, tmp_path):
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    load = partial(AutoModelForCausalLM.from_pretrained, tiny_llama, quantization_config=config)

    def start():
        model = adapt(load(), ["q_proj", "v_proj"], partial(LoRA, rank=3))
        return sft(tiny_llama, tmp_path, allocator(), model=allow_quantized(model))

    whole = start()
    whole.train()
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert sizes(load_adapter(load(), tmp_path / "checkpoint-4")) == sizes(whole.model)


def test_a_reference_that_would_move_is_refused(tiny_llama):
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match="holds no adapter, and quantized weights cannot train"):
        allow_quantized(plain)
    with pytest.raises(ValueError, match="holds no adapter to switch off"):
        BaseReference(plain)
    adapt(plain, ["q_proj"], partial(LoRA, rank=2), train_modules=["lm_head"])
    with pytest.raises(ValueError, match=r"lm_head\.weight train\(s\) whole"):
        BaseReference(plain)
    with pytest.raises(ValueError, match=r"Linear has no `beta`"):
        use_base_as_reference(nn.Linear(1, 1), 0.1)
