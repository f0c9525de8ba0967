"""An allocator in transformers' Trainer, as it is: gradients, checkpoints, resuming, refusals."""

import copy
import pickle
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils import get_total_norm
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

from adaptrank import adapt, load_adapter, rank_axes
from adaptrank.allocation import (
    EVA,
    AdaLoRA,
    AdapterCallback,
    Allocator,
    ALoRA,
    BeamLoRA,
    DyLoRA,
    DynamicRank,
    ElaLoRA,
    GoRA,
    LoRAPrune,
    PRILoRA,
    SoRA,
    SubLoRA,
)
from adaptrank.allocation.shells.transformers import AllocatorCallback
from adaptrank.modules.learning_schedule import learning_schedule
from adaptrank.parameterizations import SVD, HyperAdapt, LoRA
from adaptrank.training.penalties import add_penalty_gradients

STEPS = 12
SCHEDULE = {"every": 2, "warmup": 3, "final": 3}
EVENTS = [5, 7, 9]
IDS = torch.arange(6)[None]


def base(of=LlamaForCausalLM, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        **{"num_hidden_layers": 1, **changes},
    )
    return of(config)


METHOD = partial(SVD, rank=3, orth=0.1, dropout=0.1)


def adapted(method=METHOD, model=None, layers=1, **more):
    model = base(num_hidden_layers=layers) if model is None else model
    return adapt(model, ["q_proj", "v_proj", "up_proj"], method, **more)


def rows(count=40):
    random = torch.Generator().manual_seed(0)
    draws = [torch.randint(32, (6,), generator=random) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in draws]


def arguments(folder, **changes):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 100,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def trainer_of(folder, allocator, model=None, data=None, extra=(), **changes):
    callbacks = [*allocator] if isinstance(allocator, list) else [allocator]
    return Trainer(
        adapted() if model is None else model,
        arguments(folder, **changes),
        train_dataset=rows() if data is None else data,
        eval_dataset=rows(4) if data is None else None,
        callbacks=[*callbacks, *extra],
    )


def sizes(model):
    return {key: len(axis) for key, axis in rank_axes(model).items()}


def trained(trainer):
    """Everything that a resumed run has to share: tensors, moments, and the learning rate."""
    tensors = dict(trainer.model.state_dict())
    states = trainer.optimizer.state_dict()["state"]
    for index, state in states.items():
        tensors |= {f"{index}.{name}": value for name, value in state.items()}
    return tensors


def assert_equal(a, b):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different


def losses(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


class Stop(TrainerCallback):
    """Interrupts the run at the beginning of a step."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class OutOfMemory(TrainerCallback):
    """Raises what the Trainer takes for too large a batch, once."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            raise RuntimeError("CUDA out of memory.")


# ---- the whole of it


def test_adalora_trains_in_a_trainer_by_one_callback(tmp_path):
    model, allocator = adapted(), AdaLoRA(budget=5, **SCHEDULE)
    start = sizes(model)
    trainer = Trainer(
        model, arguments(tmp_path, save_strategy="no"), train_dataset=rows(), callbacks=[allocator]
    )
    trainer.train()
    assert [event["step"] for event in allocator.events] == EVENTS
    assert sum(sizes(model).values()) == 5 < sum(start.values())
    moments = {
        id(p): trainer.optimizer.state[p]
        for g in trainer.optimizer.param_groups
        for p in g["params"]
    }
    for axis in rank_axes(model).values():
        for slot in axis.slots():
            assert moments[id(slot.tensor)]["exp_avg"].shape == slot.tensor.shape


def test_an_allocator_has_every_event_of_the_trainer():
    events = [name for name in dir(TrainerCallback) if name.startswith("on_")]
    for name in events:
        assert callable(getattr(ElaLoRA(), name)), name
        assert callable(getattr(AdapterCallback(), name)), name


class Ela(ElaLoRA, registered=False):
    """Has a short schedule by default, for a callback that is given as a class."""

    def __init__(self):
        super().__init__(swaps=4, every=1, warmup=1, final=1)


@pytest.mark.parametrize("form", ["class", "earlier form", "added later"])
def test_other_ways_to_give_the_allocator(form, tmp_path):
    allocator = Ela()
    given = {"class": [Ela], "earlier form": [AllocatorCallback(allocator)], "added later": []}
    trainer = trainer_of(tmp_path, given[form], adapted(partial(LoRA, rank=2)), max_steps=4)
    if form == "added later":
        trainer.add_callback(allocator)
    trainer.train()
    if form == "class":
        (allocator,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, Ela)]
    assert [event["step"] for event in allocator.events] == [2, 3]
    assert (tmp_path / "checkpoint-4" / "adapter_model.safetensors").is_file()


# ---- gradients


def gradients(axes):
    return {
        f"{key} {slot.label}": slot.tensor.grad.clone()
        for key, axis in axes.items()
        for slot in axis.slots()
    }


class Looks(Allocator, registered=False):
    """Notes the gradients that an allocator sees."""

    def __init__(self):
        super().__init__(budget=8, every=1, warmup=1, final=0)
        self.seen = []

    def observe(self, axes):
        self.seen.append(gradients(axes))

    def score(self, axis):
        return torch.arange(float(len(axis)))


@pytest.mark.parametrize("norm", [1e-3, 0.0], ids=["clipped", "not clipped"])
def test_gradients_are_complete_and_not_clipped_where_an_allocator_sees_them(norm, tmp_path):
    """Two micro-batches of unequal length, the penalty of the SVD form, and then the clipping."""
    method = partial(SVD, rank=3, orth=0.1)
    long, short = torch.arange(8), torch.tensor([3, 1, 4, 1, 5, -100, -100, -100])
    pair = [{"input_ids": long, "labels": long}, {"input_ids": short.abs() % 32, "labels": short}]
    want = adapted(method)
    labels = torch.stack([long, short])
    want(torch.stack([row["input_ids"] for row in pair]), labels=labels).loss.backward()
    add_penalty_gradients(want)
    expected = gradients(rank_axes(want))

    allocator, norms = Looks(), []
    trainer = trainer_of(
        tmp_path,
        allocator,
        adapted(method),
        pair,
        max_steps=2,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_grad_norm=norm,
        save_strategy="no",
    )
    optimizer = trainer.create_optimizer()
    optimizer.register_step_pre_hook(
        lambda *_: norms.append(
            get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
        )
    )
    trainer.train()
    for label, gradient in allocator.seen[0].items():
        torch.testing.assert_close(gradient, expected[label], rtol=1e-4, atol=1e-7)
    total = get_total_norm(list(allocator.seen[0].values()))
    torch.testing.assert_close(norms[0], torch.tensor(norm) if norm else total)
    assert trainer.args.max_grad_norm == norm


def test_the_trainer_computes_what_plain_calls_in_a_loop_do(tmp_path):
    """Bit by bit: clipping, accumulation, the penalty, and events of AdaLoRA."""
    seen = []
    allocator = AdaLoRA(budget=5, **SCHEDULE)
    trainer = trainer_of(
        tmp_path,
        allocator,
        adapted(partial(SVD, rank=3, orth=0.1)),
        gradient_accumulation_steps=2,
        max_grad_norm=1e-3,
        save_strategy="no",
    )
    trainer.model.register_forward_pre_hook(lambda *given: seen.append(given[-1]), with_kwargs=True)
    trainer.train()

    model, again = adapted(partial(SVD, rank=3, orth=0.1)), AdaLoRA(budget=5, **SCHEDULE)
    twin = Trainer(model, trainer.args)
    twin.create_optimizer_and_scheduler(STEPS)
    again.start(model, twin.optimizer, STEPS)
    model.train()
    for step in range(STEPS):
        for batch in seen[2 * step : 2 * step + 2]:
            model(**batch).loss.backward()
        again.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        twin.optimizer.step()
        again.step()
        twin.lr_scheduler.step()
        twin.optimizer.zero_grad()
    again.finish()
    assert again.events == allocator.events
    assert_equal(trained(twin), trained(trainer))


def test_arguments_get_their_norm_back_after_an_interrupt(tmp_path):
    trainer = trainer_of(tmp_path, [ElaLoRA(swaps=2, **SCHEDULE), Stop(2)], save_strategy="no")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    plain = Trainer(trainer.model, trainer.args, callbacks=[AdapterCallback()])
    assert plain.args.max_grad_norm == 1.0


def test_two_allocators_share_a_run_and_the_penalty_is_added_once(tmp_path):
    """The one that chooses ranks comes first, whatever the order."""

    def run(*allocators):
        model = adapted(partial(SVD, rank=3, orth=0.1))
        trainer_of(tmp_path, [*allocators], model, save_strategy="no").train()
        return model.state_dict()

    first, second = EVA(budget=8), AdaLoRA(budget=5, **SCHEDULE)
    one = run(first, second)
    assert second.run.start_total == 8
    assert_equal(one, run(AdaLoRA(budget=5, **SCHEDULE), EVA(budget=8)))
    alone, beside = Looks(), Looks()
    assert_equal(run(alone), run(AdapterCallback(), beside))
    assert len(alone.seen) == len(beside.seen)
    assert_equal(alone.seen[-1], beside.seen[-1])


# ---- checkpoints


LOW_RANK = {"method": partial(LoRA, rank=3, dropout=0.1)}
KINDS = {
    "AdaLoRA": (partial(AdaLoRA, budget=5, **SCHEDULE), {}),
    "SoRA": (partial(SoRA, budget=5, **SCHEDULE), LOW_RANK),
    "EVA": (lambda: [EVA(budget=8), AdaLoRA(budget=5, **SCHEDULE)], {}),
}
FURTHER = {
    "BeamLoRA": (partial(BeamLoRA, **SCHEDULE), LOW_RANK),
    "DyLoRA": (DyLoRA, LOW_RANK),
    "SubLoRA": (partial(SubLoRA, budget=5, **SCHEDULE), LOW_RANK),
    "ALoRA": (partial(ALoRA, **SCHEDULE), LOW_RANK),
    "DynamicRank": (partial(DynamicRank, budget=5, **SCHEDULE), LOW_RANK),
    "GoRA": (lambda: [GoRA(), ElaLoRA(swaps=2, **SCHEDULE)], LOW_RANK),
    "PRILoRA": (lambda: [PRILoRA(every=2), ElaLoRA(swaps=2, **SCHEDULE)], LOW_RANK),
    "LoRAPrune": (partial(LoRAPrune, **SCHEDULE), {**LOW_RANK, "layers": 3}),
}
ALL = [*KINDS, *(pytest.param(name, marks=pytest.mark.tables) for name in FURTHER)]


@pytest.mark.parametrize("name", ALL)
def test_a_killed_run_resumes_bit_by_bit(name, tmp_path):
    """Under accumulation, dropout, evaluations and a folder that was moved."""
    make, model = {**KINDS, **FURTHER}[name]
    settings = {
        "gradient_accumulation_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "lr_scheduler_type": "cosine",
    }

    def start(folder, *extra):
        return trainer_of(folder, make(), adapted(**model), extra=extra, **settings)

    whole = start(tmp_path / "whole")
    whole.train()
    killed = start(tmp_path / "killed", Stop(8))
    with pytest.raises(KeyboardInterrupt):
        killed.train()
    moved = (tmp_path / "killed" / "checkpoint-6").rename(tmp_path / "moved")
    resumed = start(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=str(moved))
    assert_equal(trained(resumed), trained(whole))
    assert losses(resumed) == losses(whole)
    # The same Trainer goes on after an interrupt, as in a notebook.
    killed.remove_callback(Stop)
    if name == "LoRAPrune":
        with pytest.raises(ValueError, match="The masks of LoRAPrune stay on this model"):
            killed.train(resume_from_checkpoint=str(moved))
        return
    killed.train(resume_from_checkpoint=str(moved))
    assert_equal(trained(killed), trained(whole))


def test_a_checkpoint_holds_the_adapter_only_and_loads_as_one(tmp_path):
    model = adapted(partial(LoRA, rank=3))
    trainer_of(tmp_path, AdaLoRA(budget=5, **SCHEDULE), model, max_steps=10).train()
    folder = tmp_path / "checkpoint-10"
    stored = load_file(folder / "model.safetensors")
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert stored.keys() == {*own, "adaptrank.run_state"}
    again = load_adapter(base(), folder)
    assert sizes(again) == sizes(model)
    assert torch.equal(again.eval()(IDS).logits, model.eval()(IDS).logits)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_llama):
    """Folder of a checkpoint with a tokenizer, of a Trainer with an allocator."""
    folder = tmp_path_factory.mktemp("run")
    model = adapted(partial(LoRA, rank=2), AutoModelForCausalLM.from_pretrained(tiny_llama))
    trainer = trainer_of(folder, Ela(), model, max_steps=4)
    trainer.processing_class = AutoTokenizer.from_pretrained(tiny_llama)
    trainer.train()
    return folder / "checkpoint-4"


@pytest.mark.parametrize(
    "load",
    [
        AutoModelForCausalLM.from_pretrained,
        AutoModelForSequenceClassification.from_pretrained,
        LlamaForCausalLM.from_pretrained,
        LlamaForSequenceClassification.from_pretrained,
        lambda folder: peft.PeftModel.from_pretrained(base(), folder),
        peft.AutoPeftModelForCausalLM.from_pretrained,
    ],
    ids=["auto", "auto head", "class", "class head", "peft", "auto peft"],
)
@pytest.mark.parametrize("with_peft", [True, False], ids=["peft there", "no peft"])
def test_no_from_pretrained_takes_a_checkpoint_for_a_model(
    load, with_peft, checkpoint, monkeypatch
):
    if not with_peft:
        for module in ("models.auto.auto_factory", "integrations.peft"):
            monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda *_: False)
    with pytest.raises(Exception, match=r"adaptrank\.load_adapter\(model, folder\)"):
        load(str(checkpoint))


def test_the_tokenizer_of_a_checkpoint_loads(checkpoint, tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "How many has 1 2?"
    assert tokenizer(text) == AutoTokenizer.from_pretrained(tiny_llama)(text)


def test_the_folder_of_a_whole_model_is_not_overwritten(tmp_path):
    base().save_pretrained(tmp_path / "base")
    trainer = trainer_of(tmp_path / "run", AdapterCallback())
    with pytest.raises(
        ValueError, match="base holds a whole model, which an adapter would replace"
    ):
        trainer.save_model(str(tmp_path / "base"))
    assert_equal(
        dict(LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()), base().state_dict()
    )


def test_a_head_is_trained_saved_and_resumed(tmp_path):
    def model():
        plain = base(LlamaForSequenceClassification, num_labels=2, pad_token_id=0)
        return adapt(plain, ["q_proj"], partial(LoRA, rank=2), train_modules=["score"])

    data = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(rows())]
    whole = trainer_of(tmp_path, Ela(), model(), data, max_steps=4)
    whole.train()
    start = base(LlamaForSequenceClassification, num_labels=2, pad_token_id=0)
    assert not torch.equal(whole.model.score.weight, start.score.weight)
    loaded = load_adapter(start, tmp_path / "checkpoint-4")
    assert torch.equal(loaded.score.weight, whole.model.score.weight)
    resumed = trainer_of(tmp_path, Ela(), model(), data, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(trained(resumed), trained(whole))


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (partial(AdaLoRA, budget=5, soft=False, **SCHEDULE), partial(SVD, rank=3)),
        (partial(BeamLoRA, **SCHEDULE), partial(LoRA, rank=3)),
    ],
    ids=["AdaLoRA", "BeamLoRA"],
)
def test_the_best_checkpoint_is_loaded_with_its_ranks(make, method, tmp_path, caplog):
    """Its ranks, and for BeamLoRA its gates, are those of an earlier step."""
    best = 6
    model, allocator = adapted(method), make()
    trainer = trainer_of(
        tmp_path,
        allocator,
        model,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
    )
    trainer.compute_metrics = lambda _: {"score": -abs(trainer.state.global_step - best)}
    trainer.train()
    folder = tmp_path / f"checkpoint-{best}"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [folder.name]
    loaded = load_adapter(base(), folder)
    assert sizes(model) == sizes(loaded)
    torch.testing.assert_close(model.eval()(IDS).logits, loaded.eval()(IDS).logits)
    assert "the best checkpoint is of step 6, before the last event at step 9" in caplog.text
    if isinstance(allocator, AdaLoRA):
        assert 5 < sum(sizes(model).values()) < 9
        trainer.train()  # a second training goes on from the best weights
        assert allocator.events[-1]["total"] == 5


def test_fixed_ranks_have_small_checkpoints_too(tmp_path):
    def start():
        return trainer_of(tmp_path, AdapterCallback(), adapted([HyperAdapt, LoRA]), max_steps=3)

    whole = start()
    whole.train()
    stored = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    own = {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert own <= stored.keys()
    assert not any("embed" in key for key in stored)
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_equal(trained(resumed), trained(whole))


def test_a_copy_of_the_model_takes_part_in_no_run(tmp_path):
    model = adapted()
    trainer_of(tmp_path, Ela(), model, max_steps=4).train()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equal(dict(copied.state_dict()), dict(model.state_dict()))
        with pytest.raises(ValueError, match="holds adapters"):
            copied.save_pretrained(tmp_path / "out")


def test_weights_alone_are_saved_without_what_a_resume_needs(tmp_path):
    trainer_of(tmp_path, Ela(), max_steps=4, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1" / "optimizer.pt").exists()
    with pytest.raises(ValueError, match="step 1 holds no state of Ela,"):
        trainer_of(tmp_path, Ela(), max_steps=4).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-1")
        )


# ---- refusals


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer_of(tmp_path, Ela(), max_steps=4).train()
    folder = str(tmp_path / "checkpoint-1")
    other = adapt(base(), ["q_proj"], partial(SVD, rank=3))
    with pytest.raises(ValueError, match=r"checkpoint has an unexpected .*; call adapt\(\) as in"):
        trainer_of(tmp_path, Ela(), other, max_steps=4).train(resume_from_checkpoint=folder)
    with pytest.raises(ValueError, match=r"no state of AdaLoRA.*in the checkpoint: Ela\."):
        trainer_of(tmp_path, AdaLoRA(budget=5, **SCHEDULE), max_steps=12).train(
            resume_from_checkpoint=folder
        )


REFUSED = {
    "no adapter": (
        lambda out: trainer_of(out, ElaLoRA(), base()).train(),
        r"holds no adapter; call adaptrank\.adapt\(model, \.\.\.\)",
    ),
    "two that move": (
        lambda out: trainer_of(out, [ElaLoRA(), AdaLoRA(budget=5)]),
        "would both move the ranks of this model; keep one",
    ),
    "masks": (
        lambda out: trainer_of(
            out, LoRAPrune(), load_best_model_at_end=True, eval_strategy="steps", eval_steps=1
        ).train(),
        "LoRAPrune masks parts of the base for good",
    ),
    "memory": (
        lambda out: trainer_of(
            out,
            AdaLoRA(budget=5, **SCHEDULE),
            extra=[OutOfMemory(8)],
            auto_find_batch_size=True,
            save_strategy="no",
        ).train(),
        "auto_find_batch_size starts training again after AdaLoRA has moved ranks",
    ),
    "budget": (
        lambda out: trainer_of(out, AdaLoRA(budget=99, **SCHEDULE)).train(),
        "AdaLoRA.*99",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_work_is_refused(name, tmp_path):
    act, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        act(tmp_path)


def test_a_smaller_batch_is_found_before_ranks_move(tmp_path):
    allocators = [EVA(budget=8), AdaLoRA(budget=5, **SCHEDULE)]
    trainer = trainer_of(
        tmp_path, allocators, extra=[OutOfMemory(0)], auto_find_batch_size=True, save_strategy="no"
    )
    trainer.train()
    assert trainer.state.global_step == STEPS
    assert trainer.state.train_batch_size < 4
    assert sum(sizes(trainer.model).values()) == 5
    assert trainer.args.max_grad_norm == 1.0


def test_a_second_start_of_a_trained_adapter_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, EVA(budget=8), max_steps=2, save_strategy="no")
    trainer.train()
    with pytest.raises(ValueError, match=r"EVA would start the trained units .* anew at .*resume"):
        trainer.train()


def test_a_start_that_no_step_has_trained_may_be_set_again(tmp_path):
    trainer = trainer_of(
        tmp_path,
        GoRA(batches=2),
        adapted(**LOW_RANK),
        extra=[OutOfMemory(0)],
        auto_find_batch_size=True,
        save_strategy="no",
    )
    trainer.train()
    assert trainer.state.global_step == STEPS


def test_a_loss_that_the_model_does_not_compute_is_refused(tmp_path):
    data = [{"input_ids": row["input_ids"]} for row in rows()]
    trainer = trainer_of(tmp_path, EVA(budget=8), data=data, save_strategy="no")
    with pytest.raises(ValueError, match=r"EVA evaluates .*\(input_ids\) have no labels"):
        trainer.train()


class EarlierForm(TrainerCallback):
    """Rewrites a checkpoint as earlier versions wrote it."""

    def __init__(self, allocator):
        self.allocator = allocator

    def on_save(self, args, state, control, model, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink()
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
        torch.save(self.allocator.state_dict(), folder / "allocator.pt")


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path):
    """It holds the whole model, and the allocator's state in a file of its own."""
    allocator = AdaLoRA(budget=5, **SCHEDULE)
    whole = trainer_of(tmp_path, allocator, extra=[EarlierForm(allocator)])
    whole.train()
    resumed = trainer_of(tmp_path, AdaLoRA(budget=5, **SCHEDULE))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(trained(resumed), trained(whole))


class Holder(torch.nn.Module):
    """A module that is no transformers model."""

    def __init__(self):
        super().__init__()
        self.model = adapted()

    def forward(self, input_ids, labels):
        return {"loss": self.model(input_ids, labels=labels).loss}


def test_a_model_that_is_no_transformers_model_is_saved_whole_and_resumes(tmp_path):
    def start():
        return trainer_of(tmp_path, AdaLoRA(budget=5, **SCHEDULE), Holder())

    whole = start()
    whole.train()
    assert any("embed" in key for key in load_file(tmp_path / "checkpoint-6/model.safetensors"))
    resumed = start()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_equal(trained(resumed), trained(whole))


# ---- the learning rate


@pytest.mark.parametrize(("name", "theirs"), [
    ("linear", "linear"), ("cosine", "cosine"), ("constant", "constant_with_warmup"),
])  # fmt: skip
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 7), (7, 7)])
def test_schedules_are_those_of_transformers_to_the_last_bit(name, theirs, warmup, total):
    """A checkpoint of one is a checkpoint of the other."""
    rates, states = [], []
    for make in (partial(learning_schedule, name), partial(get_scheduler, theirs)):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.3)
        schedule = make(optimizer, warmup, total)
        rates.append([])
        for _ in range(total + 2):
            rates[-1] += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        states.append(schedule.state_dict())
    assert rates[0] == rates[1]
    assert states[0] == states[1]
