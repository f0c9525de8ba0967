import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from adaptrank.allocation.methods.adalora import AdaLoRA
from adaptrank.allocation.methods.elalora import ElaLoRA
from adaptrank.artifacts import read_adapter, save_adapter, trained_modules
from adaptrank.axes import rank_axes
from adaptrank.data import (
    ArithmeticProblems,
    CausalLMData,
    ClassificationData,
    GeneratedChoices,
    GeneratedDates,
    GeneratedSentences,
)
from adaptrank.modules import (
    Adapter,
    CausalLM,
    MultipleChoice,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)
from adaptrank.modules.optim import fuse, parameter_groups
from adaptrank.parameterizations import SVD, DoRA, HyperAdapt, LoRA, wrapped_layers

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


def causal(folder, *nest, **arguments):
    nest = nest or (partial(LoRA, rank=4, dropout=0.1),)
    return CausalLM(
        folder,
        [Adapter(list(nest))],
        dtype="fp32",
        optimizer=partial(torch.optim.AdamW, lr=5e-3),
        **arguments,
    )


def problems(**arguments):
    return ArithmeticProblems(**{"batch_size": 4, "train_size": 40, "val_size": 6, **arguments})


def fit(module, data, callbacks=(), ckpt_path=None, **arguments):
    trainer = Trainer(
        **{**QUIET, "enable_checkpointing": False, **arguments}, callbacks=list(callbacks)
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


# ---- loss and evaluation


def test_the_loss_is_that_of_the_labelled_tokens(tiny_llama):
    module = causal(tiny_llama)
    module.configure_model()
    module.eval()
    ids = torch.randint(3, 30, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    labels[0, 6:] = -100
    losses, rows = module(ids, mask, labels)
    full = module.model(input_ids=ids, attention_mask=mask).logits
    expected = F.cross_entropy(
        full[:, :-1].reshape(-1, full.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    torch.testing.assert_close(losses.mean(), expected)
    assert torch.bincount(rows).tolist() == [2, 5, 5]


def test_logits_are_computed_for_completions_only(tiny_llama):
    module = causal(tiny_llama)
    module.configure_model()
    seen = []
    module.model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    ids = torch.randint(3, 30, (2, 12))
    labels = ids.clone()
    labels[:, :9] = -100
    module(ids, torch.ones_like(ids), labels)
    assert seen == [3]


def test_validation_weighs_tokens_not_batches(tiny_llama):
    data = problems(
        eval_batch_size=4, val_size=6
    )  # batches of 4 and 2, with completions of uneven length
    module = causal(tiny_llama, generate=False)
    trainer = Trainer(**QUIET)
    (result,) = trainer.validate(module, datamodule=data, verbose=False)
    losses = torch.cat(
        [module(b["input_ids"], b["attention_mask"], b["labels"])[0] for b in data.val_dataloader()]
    )
    assert result["loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]), rel=1e-5)


class Parrot(CausalLM):
    """Completes every prompt with the same text."""

    said = " 1 + 1 = 2"

    def complete(self, prompt_ids, prompt_mask):
        assert prompt_mask[:, -1].all(), "prompts are padded on the left"
        return [self.said] * len(prompt_ids)


def test_exact_match_reads_the_final_answer(tiny_llama, tmp_path):
    rows = [
        {"prompt": "Question: 1 ?\nAnswer:", "completion": " 1 + 1 = 2", "answer": a}
        for a in ("2", "2.0", "3", "$2")
    ]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = CausalLMData(
        str(tmp_path / "v.jsonl"), validation=str(tmp_path / "v.jsonl"), batch_size=3
    )
    module = Parrot(tiny_llama, [Adapter([LoRA])], dtype="fp32")
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    assert result["exact_match"] == 0.75


def test_choices_are_scored_by_sum_and_by_character(tiny_llama, tmp_path):
    rows = [
        {
            "prompt": "Question: how many ?\nAnswer:",
            "completion": " 1",
            "choices": ["1", "2 3 4", "7"],
            "label": 0,
        },
        {
            "prompt": "Question: now ?\nAnswer:",
            "completion": " 4",
            "choices": ["3 3", "4"],
            "label": 1,
        },
    ]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = CausalLMData(
        str(tmp_path / "v.jsonl"), validation=str(tmp_path / "v.jsonl"), batch_size=2
    )
    module = causal(tiny_llama)
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    right = {"accuracy": 0, "accuracy_norm": 0}
    for row in rows:
        start = module.tokenizer(row["prompt"])["input_ids"]
        sums = []
        for choice in row["choices"]:
            rest = module.tokenizer(" " + choice)["input_ids"]
            ids = torch.tensor([start + rest])
            log_p = module.model(input_ids=ids).logits.log_softmax(-1)[0, len(start) - 1 : -1]
            sums.append(float(log_p.gather(1, torch.tensor(rest)[:, None]).sum()))
        by_character = [s / len(c) for s, c in zip(sums, row["choices"], strict=True)]
        right["accuracy"] += sums.index(max(sums)) == row["label"]
        right["accuracy_norm"] += by_character.index(max(by_character)) == row["label"]
    assert {name: result[name] * 2 for name in right} == right


def test_fit_validates_after_a_validation_before_it(tiny_llama):
    module, data = causal(tiny_llama), problems()
    trainer = Trainer(**QUIET, enable_checkpointing=False, max_epochs=1)
    (before,) = trainer.validate(module, datamodule=data, verbose=False)
    trainer.fit(module, datamodule=data)
    assert set(before) == {"loss", "perplexity", "exact_match"}
    assert float(trainer.callback_metrics["loss"]) != before["loss"]
    (after,) = trainer.validate(module, datamodule=data, verbose=False)
    assert after["loss"] == pytest.approx(float(trainer.callback_metrics["loss"])), (
        "no batch of the first one is left in it"
    )


def test_the_training_loss_is_the_mean_over_labelled_tokens(tiny_llama):
    module, data = causal(tiny_llama, partial(LoRA, rank=2)), problems()
    seen = []

    class Compare(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(float(outputs["loss"]))

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            logits = pl_module.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, :-1]
            seen.append(
                float(F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
            )

    fit(module, data, [Compare()], max_steps=1)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_batches_of_the_other_task_are_refused(tiny_llama, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"needs a label for each token.*shape \(4,\)\. Use .* SequenceClassification",
    ):
        fit(causal(tiny_llama), labelled(tmp_path), max_steps=1)


# ---- what trains


def test_only_adapters_train_and_training_helps(tiny_llama):
    module, data = causal(tiny_llama), problems()
    before, losses = {}, []

    class Remember(Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    fit(module, data, [Remember()], max_steps=30)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, p in module.named_parameters() if p.requires_grad}
    assert all(n.endswith((".A", ".B")) for n in moved)
    assert sum(losses[-5:]) < sum(losses[:5]) - 0.5


def test_a_half_precision_backbone_trains_float32_adapters_with_checkpointing_and_generates(
    tiny_llama,
):
    module = CausalLM(
        tiny_llama,
        [Adapter([HyperAdapt, LoRA])],
        dtype="bf16",
        gradient_checkpointing=True,
        max_new_tokens=3,
    )
    fit(module, problems(), max_steps=2)
    assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    ids = torch.randint(3, 20, (2, 5))
    assert len(module.complete(ids, torch.ones_like(ids))) == 2


def test_training_adapters_in_half_precision_is_warned_of_and_runs(tiny_llama, caplog):
    with caplog.at_level("WARNING", "adaptrank"):
        fit(causal(tiny_llama), problems(), max_steps=1, precision="bf16-true")
    assert "Use precision=32-true and model.dtype=bf16" in caplog.text


def test_dropout_of_adapters_is_on_while_training(tiny_llama):
    module = causal(tiny_llama)
    on = []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            on.append(all(layer.dropout.training for layer in wrapped_layers(pl_module).values()))

    fit(module, problems(), [Look()], max_steps=1)
    assert on == [True]


def test_parameter_groups(tiny_llama):
    module = causal(tiny_llama, DoRA, train_modules=["norm"])
    module.configure_model()
    decay, exempt = parameter_groups(module.model)
    assert "weight_decay" not in decay
    assert exempt["weight_decay"] == 0.0
    named = {id(p): n for n, p in module.named_parameters()}
    assert {named[id(p)].rsplit(".", 1)[1] for p in decay["params"]} == {"A", "B"}
    assert {named[id(p)].rsplit(".", 1)[1] for p in exempt["params"]} == {
        "m",
        "weight",
    }  # magnitudes, and the norm
    total = sum(len(g["params"]) for g in (decay, exempt))
    assert total == sum(p.requires_grad for p in module.parameters())


def test_lora_plus_trains_closing_factors_faster(tiny_llama):
    module = causal(tiny_llama, LoRA, lora_plus_ratio=16.0, schedule="constant", warmup=0)
    trainer = fit(module, problems(), max_steps=1)
    rates = {}
    for group in trainer.optimizers[0].param_groups:
        for p in group["params"]:
            rates[next(n for n, q in module.named_parameters() if q is p).rsplit(".", 1)[1]] = (
                group["lr"]
            )
    assert rates == {"A": 5e-3, "B": 8e-2}
    with pytest.raises(ValueError, match="lora_plus_ratio needs a method with a rank axis"):
        fit(causal(tiny_llama, HyperAdapt, lora_plus_ratio=16.0), problems(), max_steps=1)


def test_a_warm_up_that_never_ends_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="A warm-up of 500 steps never ends in a run of 2"):
        fit(causal(tiny_llama, warmup=500), problems(), max_steps=2)


def test_configure_model_twice_changes_nothing(tiny_llama):
    module = causal(tiny_llama)
    module.configure_model()
    names = [n for n, _ in module.named_parameters()]
    module.configure_model()
    assert [n for n, _ in module.named_parameters()] == names


def test_a_warm_start_continues_where_the_adapter_ended(tiny_llama, tmp_path):
    first = causal(tiny_llama)
    fit(first, problems(), max_steps=3)
    save_adapter(first.model, tmp_path / "a")
    for second in (
        causal(tiny_llama, adapter=str(tmp_path / "a")),
        CausalLM(tiny_llama, adapter=str(tmp_path / "a"), dtype="fp32"),
    ):
        second.configure_model()
        mine = second.model.state_dict()
        assert all(torch.equal(v, mine[k]) for k, v in first.model.state_dict().items())
    with pytest.raises(ValueError, match="Nothing to train"):
        CausalLM(tiny_llama)


def test_further_modules_train_beside_an_adapter_alone(tiny_llama, tmp_path):
    """The file trains the output embeddings, and the run trains the norm as well."""
    first = causal(tiny_llama, train_modules=["lm_head"])
    first.configure_model()
    save_adapter(first.model, tmp_path / "a")
    warm = CausalLM(
        tiny_llama, adapter=str(tmp_path / "a"), train_modules=["model.norm"], dtype="fp32"
    )
    warm.configure_model()
    start = warm.model.model.norm.weight.detach().clone()
    fit(warm, problems(), max_steps=1)
    assert not torch.equal(warm.model.model.norm.weight, start)
    assert set(trained_modules(warm.model)) == {"lm_head.weight", "model.norm.weight"}
    save_adapter(warm.model, tmp_path / "b")
    assert set(read_adapter(tmp_path / "b")["trained_modules"]) == {*trained_modules(warm.model)}


def test_a_rank_pattern_file_replays_the_ranks(tiny_llama, tmp_path):
    sizes = {"model.layers.0.self_attn.q_proj:rank": 2, "model.layers.1.mlp.up_proj:rank": 7}
    (tmp_path / "ranks.json").write_text(json.dumps(sizes))
    module = causal(tiny_llama, rank_pattern=str(tmp_path / "ranks.json"))
    module.configure_model()
    have = {key: len(axis) for key, axis in rank_axes(module.model).items()}
    assert {key: have.pop(key) for key in sizes} == sizes
    assert set(have.values()) == {4}
    with pytest.raises(FileNotFoundError, match="There is no file rank_pattern="):
        causal(tiny_llama, rank_pattern="nowhere.json").configure_model()
    for text in ("[1, 2]", "{", '{"a": 1}\n{"b": 2}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="holds no JSON mapping"):
            causal(tiny_llama, rank_pattern=str(tmp_path / "bad.json")).configure_model()


# ---- classification


def labelled(tmp_path, labels=("few", "some", "more")):
    rows = [
        {"text": f"how many {w} {i}", "text_pair": "and now", "label": labels.index(w)}
        for i in range(8)
        for w in labels
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ClassificationData(str(tmp_path / "t.jsonl"), val_fraction=0.25, batch_size=4)


def test_classification_trains_its_head_and_reports(tiny_bert, tmp_path):
    module = SequenceClassification(
        tiny_bert, [Adapter([LoRA])], dtype="fp32", metrics=["accuracy", "f1", "matthews"],
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
    )  # fmt: skip
    trainer = fit(module, labelled(tmp_path), max_epochs=2)
    names = {
        n.split(".")[1]
        for n, p in module.named_parameters()
        if p.requires_grad and ".A" not in n and ".B" not in n
    }
    assert names == {"classifier"}
    assert set(trainer.callback_metrics) >= {"loss", "accuracy", "f1", "matthews"}
    assert module.model.config.num_labels == 3


def test_a_head_on_a_half_precision_encoder_trains_in_float32(tiny_bert, tmp_path):
    module = SequenceClassification(tiny_bert, [Adapter([HyperAdapt])], num_labels=3, dtype="bf16")
    fit(module, labelled(tmp_path), max_steps=2)
    assert module.model.classifier.weight.dtype == torch.float32
    assert module.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16


def test_a_norm_that_trains_inside_a_half_precision_backbone_is_float32_and_casts_back(
    tiny_llama, tmp_path
):
    module = CausalLM(
        tiny_llama, [Adapter([LoRA])], dtype="bf16", train_modules=["norm", "input_layernorm"]
    )
    fit(module, problems(), max_steps=2)
    assert module.model.model.norm.weight.dtype == torch.float32
    assert (
        module.model.model.layers[0].input_layernorm(torch.zeros(1, 32, dtype=torch.bfloat16)).dtype
        == torch.bfloat16
    )
    save_adapter(module.model, tmp_path / "a")
    warm = CausalLM(tiny_llama, adapter=str(tmp_path / "a"), dtype="bf16")
    warm.configure_model()
    assert torch.equal(warm.model.model.norm.weight, module.model.model.norm.weight), (
        "no bit is lost on the way"
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "trained", [["encoder"], ["embeddings", "encoder"], ["attention"], ["layer.0"], ["pooler"]]
)
def test_parts_of_an_encoder_that_train_whole_take_and_give_half_precision(
    tiny_bert, tmp_path, trained, dtype
):
    adapted = ["query"] if trained == ["pooler"] else ["pooler.dense"]

    def outputs(dtype):
        module = SequenceClassification(
            tiny_bert,
            [Adapter([HyperAdapt], targets=adapted)],
            num_labels=3,
            train_modules=trained,
            dtype=dtype,
        )
        data = labelled(tmp_path)
        fit(module, data, max_steps=1)
        batch = next(iter(data.val_dataloader()))
        with torch.no_grad():
            return module, module.eval()(batch).float()

    module, half = outputs(dtype)
    _, full = outputs("fp32")
    torch.testing.assert_close(half, full, rtol=0.05, atol=0.05)
    parts = [part for path, part in module.model.named_modules() if path.endswith(trained[0])]
    for part in parts:
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


@pytest.mark.parametrize("trained", [["layers.0"], ["self_attn"], ["mlp"], ["embed_tokens"]])
def test_parts_of_a_decoder_that_train_whole_take_and_give_half_precision(tiny_llama, trained):
    losses = []
    for dtype in ("bf16", "fp32"):
        module = CausalLM(
            tiny_llama,
            [Adapter([LoRA], targets=["lm_head"])],
            dtype=dtype,
            train_modules=trained,
            max_new_tokens=3,
        )
        trainer = fit(module, problems(), max_steps=2)
        (result,) = trainer.validate(module, datamodule=problems(), verbose=False)
        losses.append(result["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_decoder_classifies(tiny_llama, tmp_path):
    module = SequenceClassification(tiny_llama, [Adapter([LoRA])], num_labels=3, dtype="fp32")
    fit(module, labelled(tmp_path), max_steps=2)
    assert {n for n, p in module.named_parameters() if p.requires_grad and "score" in n}


def test_the_loss_of_a_validation_weighs_rows_not_batches(tiny_bert, tmp_path):
    rows = [{"text": f"how many {i}", "label": i % 3} for i in range(5)]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ClassificationData(
        str(tmp_path / "v.jsonl"), validation=str(tmp_path / "v.jsonl"), batch_size=4
    )
    module = SequenceClassification(tiny_bert, [Adapter([LoRA])], num_labels=3, dtype="fp32")
    (result,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    module.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(module(b), b["labels"], reduction="none") for b in data.val_dataloader()
        ]
    assert [len(x) for x in losses] == [4, 1]
    assert result["loss"] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)


def test_a_regression_reports_correlations(tiny_bert, tmp_path):
    module = SequenceClassification(tiny_bert, [Adapter([LoRA])], num_labels=1, dtype="fp32")
    trainer = fit(module, labelled(tmp_path), max_epochs=1)  # whole labels are numbers too
    assert set(trainer.callback_metrics) >= {"loss", "pearson", "spearman"}


def test_metrics_that_do_not_fit_are_refused(tiny_bert):
    module = SequenceClassification(tiny_bert, [Adapter([LoRA])], num_labels=3, metrics=["pearson"])
    with pytest.raises(
        ValueError, match=r"'pearson' does not fit 3 label\(s\)\. Use accuracy, f1, matthews"
    ):
        module.configure_model()


# ---- resume, bit by bit


ALLOCATORS = {
    "ElaLoRA": lambda: ElaLoRA(swaps=3, every=2, warmup=3, final=3),
    "AdaLoRA": lambda: AdaLoRA(budget=40, every=2, warmup=3, final=3),
}
STEPS = 12  # warm-up to 3, events at 5, 7, 9, final from 9


UNINTERRUPTED: dict = {}
"""(task, allocator, accumulation, rows) -> what the run without a stop ends with."""


class Stop(Callback):
    """Ends the run after a step, as a kill would, once the checkpoint is written."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


def whole_state(trainer, module):
    optimizer = trainer.optimizers[0]
    return (
        {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad},
        [
            {k: v.clone() for k, v in optimizer.state[p].items()}
            for g in optimizer.param_groups
            for p in g["params"]
        ],
        [g["lr"] for g in optimizer.param_groups],
        torch.get_rng_state(),
    )


STOPS = {"warm-up": 2, "between": 6, "event": 7, "final": 10}
LENGTHS = {
    "accumulate-1": (1, 28, {"max_steps": STEPS}),
    "accumulate-2": (2, 28, {"max_steps": STEPS}),
    "epochs": (1, 16, {"max_epochs": 3}),
}

RESUMED = {
    "causal": (CausalLM, "llama", ArithmeticProblems, {"generate": False}),
    "tokens": (TokenClassification, "bert", GeneratedSentences, {}),
    "seq2seq": (Seq2Seq, "t5", GeneratedDates, {"generate": False}),
    "choices": (MultipleChoice, "bert", GeneratedChoices, {}),
}
"""Task -> its module, its model, its data, and further arguments of the module."""


def stopped_runs():
    """Yield all combinations. `make test` has every stop once, and every length at an event.

    Other tasks stop at an event.
    """
    for name, stop in STOPS.items():
        for length, arguments in LENGTHS.items():
            is_common = name == "event" or length == "accumulate-1"
            marks = [] if is_common else [pytest.mark.tables]
            yield pytest.param("causal", stop, *arguments, id=f"{name}-{length}", marks=marks)
    for task in RESUMED:
        if task != "causal":
            yield pytest.param(task, STOPS["event"], *LENGTHS["accumulate-1"], id=task)


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize(("task", "stop", "accumulate", "size", "length"), [*stopped_runs()])
def test_resume_is_bit_exact(
    tiny_llama, tiny_bert, tiny_t5, tmp_path, allocator, task, stop, accumulate, size, length
):
    """12 steps equal `stop` steps, a kill, and the rest.

    Equal are parameters, moments, ranks, learning rate and random state.
    """

    def run(folder, *callbacks, ckpt_path=None):
        torch.manual_seed(1 if ckpt_path is None else 2)
        make_module, folder_of_task, make_data, more = RESUMED[task]
        module = make_module(
            {"llama": tiny_llama, "bert": tiny_bert, "t5": tiny_t5}[folder_of_task],
            [Adapter([partial(SVD, rank=4, dropout=0.1)])],
            dtype="fp32",
            optimizer=partial(torch.optim.AdamW, lr=5e-3),
            **more,
        )
        moves_ranks = ALLOCATORS[allocator]()
        trainer = Trainer(
            **QUIET,
            **length,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            callbacks=[
                moves_ranks,
                ModelCheckpoint(folder, every_n_train_steps=stop, save_top_k=-1, filename="{step}"),
                *callbacks,
            ],
        )
        try:
            trainer.fit(
                module,
                datamodule=make_data(train_size=size, val_size=6, batch_size=4),
                ckpt_path=ckpt_path,
                weights_only=True,
            )
        except (KeyboardInterrupt, SystemExit):
            return None
        return whole_state(trainer, module), moves_ranks.events

    key = (task, allocator, accumulate, size)
    if key not in UNINTERRUPTED:
        UNINTERRUPTED[key] = run(tmp_path / "whole")
    whole, events = UNINTERRUPTED[key]
    assert run(tmp_path / "part", Stop(stop)) is None
    resumed, resumed_events = run(
        tmp_path / "rest", ckpt_path=str(tmp_path / "part" / f"step={stop}.ckpt")
    )
    assert events == resumed_events
    assert len(events) == 3
    assert whole[0].keys() == resumed[0].keys()
    assert all(torch.equal(v, resumed[0][k]) for k, v in whole[0].items())
    assert all(
        torch.equal(a[k], b[k]) for a, b in zip(whole[1], resumed[1], strict=True) for k in a
    )
    assert whole[2] == resumed[2]
    assert torch.equal(whole[3], resumed[3])


def test_a_checkpoint_holds_no_backbone_and_loads_without_pickle(tiny_llama, tmp_path):
    module = causal(tiny_llama)
    fit(
        module,
        problems(),
        [ModelCheckpoint(tmp_path, every_n_train_steps=2)],
        max_steps=2,
        enable_checkpointing=True,
    )
    (file,) = tmp_path.glob("*.ckpt")
    stored = torch.load(file, weights_only=True)
    assert stored["state_dict"].keys() == {
        n for n, p in module.named_parameters() if p.requires_grad
    }


def test_a_checkpoint_of_other_adapters_is_refused(tiny_llama, tmp_path):
    fit(
        causal(tiny_llama),
        problems(),
        [ModelCheckpoint(tmp_path, every_n_train_steps=2)],
        max_steps=2,
        enable_checkpointing=True,
    )
    (file,) = tmp_path.glob("*.ckpt")
    with pytest.raises(
        ValueError, match=r"The checkpoint has no .*da .*saved under other adapters"
    ):
        fit(causal(tiny_llama, HyperAdapt), problems(), ckpt_path=file, max_steps=4)


def test_an_optimizer_is_fused_unless_someone_said_how_it_steps():
    p = [nn.Parameter(torch.ones(3))]
    for optimizer, fused in (
        (torch.optim.AdamW(p), True),
        (torch.optim.AdamW(p, foreach=True), None),
        (torch.optim.AdamW(p, fused=False), False),
    ):
        fuse(optimizer)
        assert optimizer.param_groups[0]["fused"] is fused
    fuse(torch.optim.LBFGS(p))  # has no such word
