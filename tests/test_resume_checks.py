"""A checkpoint of another run is refused, each difference by name, or accepted by a flag."""

import copy
import gzip
import io
import logging
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fixture_cases import ALLOCATOR_CASES, PHASES, STOP, TOTAL, Run
from fixture_cases import Module as Chained
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from adaptrank.allocation import EVA, AdaLoRA, BeamLoRA, ElaLoRA, SoRA
from adaptrank.checkpoints import compare_nests, describe_nests, plain, read_checkpoint
from adaptrank.checkpoints.accepted import accept_optimizers
from adaptrank.data import ArithmeticProblems
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import SVD, LoRA

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
DATA = Path(__file__).parent / "data"
SWAPPING = {"swaps": 2, "every": 2, "warmup": 1, "final": 1}
ADAM = partial(torch.optim.AdamW, lr=0.01)
SETTINGS = {"schedule": "constant", "warmup": 0, "dtype": "fp32", "generate": False}


# Layers of one shape, so that units which move never change the number of parameters.
TARGETS = ("q_proj", "o_proj")


def module(folder, optimizer=ADAM, targets=TARGETS, method=SVD, **arguments):
    nest = {key: arguments.pop(key) for key in ("alpha", "rank", "dropout") if key in arguments}
    nest = {"rank": 4, "alpha": 8, **nest}
    adapters = [Adapter([partial(method, **nest)], targets=list(targets))]
    return CausalLM(folder, adapters, optimizer=optimizer, **{**SETTINGS, **arguments})


def problems(**arguments):
    return ArithmeticProblems(**{"batch_size": 4, "train_size": 40, "val_size": 4, **arguments})


def fit(model, allocators, data=None, ckpt_path=None, callbacks=(), **arguments):
    settings = {"max_steps": 6, "accelerator": "cpu", "logger": False, **arguments}
    trainer = Trainer(
        callbacks=[*allocators, *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        num_sanity_val_steps=0,
        limit_val_batches=0,
        **settings,
    )
    trainer.fit(model, data or problems(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def swapping(**arguments):
    return ElaLoRA(**{**SWAPPING, **arguments})


@pytest.fixture(scope="module")
def checkpoint(tiny_llama, tmp_path_factory):
    """A run of 6 steps with ElaLoRA, stopped after 3."""
    folder = tmp_path_factory.mktemp("run")
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    fit(module(tiny_llama), [swapping()], callbacks=[saving])
    return folder / "step=3.ckpt"


# ---- what is refused


SGD = partial(torch.optim.SGD, lr=0.01)
CHANGES = {
    "alpha": ({"alpha": 80}, {}, r"alpha is 80 here and 8 in the checkpoint"),
    "rank": ({"rank": 8}, {}, r"rank is 8 here and 4 in the checkpoint"),
    "dropout": ({"dropout": 0.1}, {}, r"dropout is 0.1 here and 0.0 in the checkpoint"),
    "targets": ({"targets": ("q_proj",)}, {}, r"o_proj.* has none here and one in the checkpoint"),
    "method": ({"method": LoRA}, {}, r"the method is LoRA here and SVD in the checkpoint"),
    "swaps": ({}, {"allocators": [swapping(swaps=1)]}, r"swaps of ElaLoRA is 1 here and 2 in"),
    "beta": ({}, {"allocators": [swapping(beta=0.5)]}, r"beta of ElaLoRA is 0.5 here and 0.85"),
    "seed": ({}, {"allocators": [swapping(seed=1)]}, r"seed of ElaLoRA is 1 here and 0 in"),
    "every": ({}, {"allocators": [swapping(every=1)]}, r"every=2\), this run has Phases.*every=1"),
    "no allocator": ({}, {"allocators": []}, r"allocator is none here and ElaLoRA in the check"),
    "other allocator": (
        {},
        {"allocators": [AdaLoRA(budget=12, every=2, warmup=1, final=1)]},
        r"the allocator is AdaLoRA here and ElaLoRA in the checkpoint",
    ),
    "optimizer": ({"optimizer": SGD}, {}, r"the optimizer is SGD here and AdamW in the checkpoint"),
    "lr": ({"optimizer": partial(ADAM, lr=0.5)}, {}, r"lr of AdamW is 0.5 here and 0.01 in the"),
    "betas": (
        {"optimizer": partial(ADAM, betas=(0.5, 0.9))},
        {},
        r"betas of AdamW is \[0.5, 0.9\]",
    ),
    "schedule": ({"schedule": "cosine"}, {}, r"schedule is 'cosine' here and 'constant' in the"),
    "ratio": ({"lora_plus_ratio": 4.0}, {}, r"lora_plus_ratio is 4.0 here and 1.0 in the"),
    "accumulation": (
        {},
        {"accumulate_grad_batches": 2},
        r"accumulate_grad_batches is 2 here and 1",
    ),
    "clipping": ({}, {"gradient_clip_val": 0.5}, r"gradient_clip_val is 0.5 here and None in the"),
    "precision": ({}, {"precision": "bf16-mixed"}, r"precision is 'bf16-mixed' here and '32-true'"),
    "data seed": ({}, {"data": problems(seed=1)}, r"seed of the data is 1 here and 0 in the"),
    "data size": ({}, {"data": problems(train_size=44)}, r"examples of the data is 44 here and 40"),
    "batch size": ({}, {"data": problems(batch_size=2)}, r"batch_size of the data is 2 here and 4"),
    "base": ({}, {}, r"the frozen weights are those of .* here .* and of .* in the checkpoint"),
}
BEYOND_ACCEPTING = ("targets", "method", "every", "schedule", "ratio", "precision", "base")
"""Changes that either do not fit the tensors, or are shown to be accepted by another change."""


@pytest.fixture(scope="module")
def other_base(tiny_llama, tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("other") / "llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return str(folder)


def changed(name, tiny_llama, other_base):
    of_module, of_run, sentence = CHANGES[name]
    of_run = {"allocators": [swapping()], **copy.deepcopy(of_run)}
    folder = other_base if name == "base" else tiny_llama
    return module(folder, **of_module), of_run, sentence


@pytest.mark.parametrize("name", CHANGES)
def test_each_difference_is_named(name, checkpoint, tiny_llama, other_base):
    model, of_run, sentence = changed(name, tiny_llama, other_base)
    with pytest.raises(ValueError, match=sentence) as refused:
        fit(model, ckpt_path=checkpoint, **of_run)
    assert "accept_changes" in str(refused.value) or name in ("targets", "method")


@pytest.mark.filterwarnings("ignore:The checkpoint was written in the middle of an epoch")
@pytest.mark.parametrize("name", [name for name in CHANGES if name not in BEYOND_ACCEPTING])
def test_each_difference_is_accepted_on_request(name, checkpoint, tiny_llama, other_base, caplog):
    model, of_run, sentence = changed(name, tiny_llama, other_base)
    model.accept_changes = True
    with caplog.at_level("WARNING", "adaptrank"):
        trainer = fit(model, ckpt_path=checkpoint, **of_run)
    assert trainer.global_step == 6
    (line,) = (line for line in caplog.messages if line.startswith("Resuming with changes: "))
    assert re.search(sentence, line)


SEED = "seed of the data is 3"


def test_all_differences_are_named_at_once(checkpoint, tiny_llama):
    model = module(tiny_llama, alpha=80, optimizer=partial(ADAM, weight_decay=0.5))
    with pytest.raises(
        ValueError, match=r"alpha is 80.*swaps of ElaLoRA is 1|weight_decay"
    ) as error:
        fit(model, [swapping(swaps=1)], problems(seed=3), ckpt_path=checkpoint)
    for clause in ("alpha is 80", "swaps of ElaLoRA is 1", "weight_decay of AdamW is 0.5", SEED):
        assert clause in str(error.value)


def test_what_does_not_change_the_run_is_no_difference(checkpoint, tiny_llama, tmp_path, caplog):
    data = problems(num_workers=1, val_size=6, eval_batch_size=2)
    with caplog.at_level("WARNING", "adaptrank"):
        fit(
            module(tiny_llama, gradient_checkpointing=True),
            [swapping()],
            data,
            ckpt_path=checkpoint,
            default_root_dir=tmp_path,
            log_every_n_steps=1,
        )
    assert not caplog.messages


def test_a_changed_learning_rate_holds_once_it_is_accepted(checkpoint, tiny_llama):
    model = module(tiny_llama, optimizer=partial(ADAM, lr=0.5, weight_decay=0.25))
    model.accept_changes = True
    trainer = fit(model, [swapping()], ckpt_path=checkpoint)
    (group, *_) = trainer.optimizers[0].param_groups
    assert group["lr"] == group["initial_lr"] == 0.5
    assert group["weight_decay"] == 0.25
    assert int(trainer.optimizers[0].state[group["params"][0]]["step"]) == 6


@pytest.mark.parametrize("count", [3, 2])
def test_each_group_of_a_new_optimizer_takes_its_place_in_the_schedule(count):
    """A head's group listed first has a schedule of its own, or a learning rate of 0."""
    fresh = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": 8.0} for _ in range(count)])
    for group in fresh.param_groups:
        group["initial_lr"] = group["lr"]
    stored = [(0.0, 0.0), (0.5, 1.0), (0.1, 1.0)]
    groups = [{"lr": rate, "initial_lr": start, "params": []} for rate, start in stored]
    checkpoint = {
        "optimizer_states": [{"state": {}, "param_groups": groups}],
        "lr_schedulers": [],
    }
    trainer = SimpleNamespace(optimizers=[fresh], lr_scheduler_configs=[])
    here = {"optimizers": [{"class": "SGD", "groups": [{}] * count}]}
    there = {"optimizers": [{"class": "AdamW", "groups": [{}] * 3}]}
    accept_optimizers(trainer, here, there, checkpoint)
    rates = [group["lr"] for group in checkpoint["optimizer_states"][0]["param_groups"]]
    assert rates == pytest.approx([4.0, 4.0, 0.8] if count == 3 else [4.0, 4.0])


def test_a_rank_initializer_does_not_reset_a_run_that_has_begun(checkpoint, tiny_llama):
    model = module(tiny_llama)
    model.accept_changes = True
    with pytest.raises(
        ValueError, match="EVA chooses the ranks that a run starts from, and the run"
    ):
        fit(model, [swapping(), EVA(max_batches=1)], ckpt_path=checkpoint)


def test_a_longer_run_is_legitimate_and_a_schedule_is_named(tiny_llama, tmp_path, caplog):
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2)
    fit(module(tiny_llama), [], callbacks=[saving], max_steps=2)
    with caplog.at_level("WARNING", "adaptrank"):
        fit(module(tiny_llama), [], ckpt_path=tmp_path / "step=2.ckpt", max_steps=4)
    assert not caplog.messages
    falling = {"schedule": "linear"}
    saving = ModelCheckpoint(tmp_path / "falling", "{step}", every_n_train_steps=2)
    fit(module(tiny_llama, **falling), [], callbacks=[saving], max_steps=2)
    with caplog.at_level("WARNING", "adaptrank"):
        path = tmp_path / "falling" / "step=2.ckpt"
        fit(module(tiny_llama, **falling), [], ckpt_path=path, max_steps=4)
    assert "schedule of the learning rate runs over 4 steps here and over 2 in" in caplog.text


def test_an_evaluation_under_another_alpha_is_refused(checkpoint, tiny_llama):
    def validate(model):
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
        trainer.validate(model, problems(), ckpt_path=checkpoint, weights_only=True, verbose=False)

    validate(module(tiny_llama))
    with pytest.raises(ValueError, match="alpha is 80 here and 8 in the checkpoint"):
        validate(module(tiny_llama, alpha=80))
    accepting = module(tiny_llama, alpha=80)
    accepting.accept_changes = True
    validate(accepting)


# ---- loops of one's own


OTHER_ARGUMENTS = {
    "elalora": (lambda: ElaLoRA(swaps=1, **PHASES), r"swaps is 1 here and 3 in"),
    "adalora_soft": (
        lambda: AdaLoRA(budget=6, soft=False, **PHASES),
        r"soft is False here and True",
    ),
    "sora": (lambda: SoRA(budget=7, l1=0.5, **PHASES), r"l1 is 0.5 here and"),
    "beamlora": (lambda: BeamLoRA(p0=0.7, **PHASES), r"p0 is 0.7 here and 0.6"),
}


def stopped(case):
    run = Run(case)
    run.start()
    run.train(until=STOP)
    return run.checkpoint()


@pytest.mark.parametrize("case", OTHER_ARGUMENTS)
def test_other_arguments_are_named_in_a_loop_of_ones_own(case):
    make, sentence = OTHER_ARGUMENTS[case]
    stored = stopped(case)
    for accepts in (False, True):
        run = Run(case)
        run.allocators = [make()]
        run.restore(copy.deepcopy(stored), STOP)
        run.allocators[0].accept_changes = accepts
        if accepts:
            run.start()
            run.train(until=TOTAL)
        else:
            with pytest.raises(ValueError, match=sentence):
                run.start()


def test_an_argument_that_the_stored_run_did_not_know_has_its_earlier_value():
    """DyLoRA stepped the drawn units alone before it had a `rule`."""
    stored = stopped("dylora")
    del stored["allocators"][0]["run"]["init_args"]["rule"]
    run = Run("dylora")
    run.restore(copy.deepcopy(stored), STOP)
    run.start()
    other = Run("dylora_published")
    other.restore(copy.deepcopy(stored), STOP)
    with pytest.raises(ValueError, match="rule is 'published' here and 'drawn' in the checkpoint"):
        other.start()


def test_other_adapters_and_another_class_are_named_in_a_loop_of_ones_own():
    stored = stopped("elalora")
    run = Run("elalora")
    run.model.layers[0][0].init_args["alpha"] = 99
    run.restore(copy.deepcopy(stored), STOP)
    with pytest.raises(ValueError, match=r"alpha is 99 here and .* \(at layers.0.0\)"):
        run.start()
    other = Run("adalora_soft")
    other.restore(copy.deepcopy(stored), STOP)
    with pytest.raises(ValueError, match="the allocator is AdaLoRA here and ElaLoRA there"):
        other.start()


@pytest.mark.parametrize("case", ALLOCATOR_CASES)
def test_the_same_run_has_no_difference_and_its_state_is_plain(case):
    stored = stopped(case)
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    buffer.seek(0)
    run = Run(case)
    run.restore(torch.load(buffer, weights_only=True), STOP)
    run.start()


def test_every_method_is_described_and_each_argument_compared(method):
    layer = method(method.example())
    model = nn.ModuleDict({"layer": layer})
    here = describe_nests(model)
    assert compare_nests(here, copy.deepcopy(here)) == []
    for name in layer.init_args:
        stored = copy.deepcopy(here)
        stored[0]["nest"][0]["init_args"][name] = "something else"
        (difference,) = compare_nests(here, stored)
        assert difference.name == name
        # An option that the version of the checkpoint did not have is no difference at its default.
        del stored[0]["nest"][0]["init_args"][name]
        assert compare_nests(here, stored) == []


def test_plain_values_hold_no_object():
    value = {"a": (1, 2.5), "b": torch.float32, "c": len, "d": partial(int, base=2), 3: {None}}
    described = plain(value)
    buffer = io.BytesIO()
    torch.save(described, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=True) == described
    assert described["a"] == [1, 2.5]
    assert "0x" not in str(plain(object()))


# ---- checkpoints of earlier versions


def recorded_checkpoint(case, folder):
    path = folder / "run.ckpt"
    path.write_bytes(gzip.decompress((DATA / "checkpoints" / f"{case}.ckpt.gz").read_bytes()))
    return path


class Numbers(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(TOTAL), batch_size=1)


@pytest.mark.filterwarnings("ignore")
def test_an_old_checkpoint_resumes_with_one_warning(tmp_path, caplog):
    path = recorded_checkpoint("lightning_elalora", tmp_path)
    with caplog.at_level("WARNING", "adaptrank"):
        fit(Chained(), [ElaLoRA(swaps=3, **PHASES)], Numbers(), path, max_steps=TOTAL)
    (message,) = caplog.messages
    assert "without a record of its run, by an earlier version" in message
    assert "alpha" in message
    other = AdaLoRA(budget=6, **PHASES)
    with pytest.raises(ValueError, match="allocator is AdaLoRA here and ElaLoRA in the checkpoint"):
        fit(Chained(), [other], Numbers(), path, max_steps=TOTAL)


def test_an_old_state_in_a_loop_of_ones_own_warns_once(caplog):
    stored = stopped("elalora")
    del stored["allocators"][0]["run"]
    run = Run("elalora")
    run.restore(stored, STOP)
    with caplog.at_level("WARNING", "adaptrank"):
        run.start()
    (message,) = caplog.messages
    assert message.startswith("The state of ElaLoRA was stored by an earlier version")


# ---- damage


def damaged(kind, path, folder):
    """Write a damaged copy of a checkpoint, and return its path."""
    file, content = folder / "damaged.ckpt", path.read_bytes()
    if kind == "empty":
        file.write_bytes(b"")
    elif kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "text":
        file.write_text("model: what is this?\n")
    elif kind == "zip":
        import zipfile

        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("readme.txt", "nothing")
    else:
        stored = torch.load(path, weights_only=True)
        DAMAGES[kind](stored)
        torch.save(stored.get("all", stored), file)
    return file


def _wrong_tracked(stored):
    tracked = stored["callbacks"]["ElaLoRA"]["tracked"]
    entry = next(e for tensors in tracked.values() for e in tensors.values() if e["dims"])
    entry["tensor"] = torch.zeros(17, *entry["tensor"].shape[1:])


def _wrong_moment(stored):
    stored["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(3, 5)


DAMAGES = {
    "no state_dict": lambda stored: stored.pop("state_dict"),
    "no version": lambda stored: stored.pop("pytorch-lightning_version"),
    "no loops": lambda stored: stored.pop("loops"),
    "no fit loop": lambda stored: stored["loops"].pop("fit_loop"),
    "weights only": lambda stored: stored.pop("optimizer_states"),
    "no groups": lambda stored: stored["optimizer_states"][0].pop("param_groups"),
    "no tensor": lambda stored: stored["state_dict"].update(x=3),
    "a list": lambda stored: stored.update(all=[1, 2]),
    "no tracked": lambda stored: stored["callbacks"]["ElaLoRA"].pop("tracked"),
    "wrong tracked": _wrong_tracked,
    "wrong phases": lambda stored: stored["callbacks"]["ElaLoRA"].update(phases=[1]),
    "wrong moment": _wrong_moment,
    "wrong record": lambda stored: stored.update(adaptrank={"format": 1}),
    "later record": lambda stored: stored["adaptrank"].update(format=9),
}


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "zip", *DAMAGES])
def test_a_damaged_checkpoint_gets_one_sentence(kind, checkpoint, tiny_llama, tmp_path):
    path = damaged(kind, checkpoint, tmp_path)
    with pytest.raises(
        ValueError, match=r"damaged|no Lightning checkpoint|empty|weights|format"
    ) as e:
        fit(module(tiny_llama), [swapping()], ckpt_path=path)
    assert "\n" not in str(e.value).strip()


def test_a_pickled_object_is_not_loaded(tmp_path):
    path = tmp_path / "pickled.ckpt"
    torch.save({"state_dict": {}, "x": Numbers}, path)
    with pytest.raises(ValueError, match=r"holds a pickled object, .*Numbers.*weights_only"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        read_checkpoint(tmp_path / "none.ckpt")


def test_the_record_tells_how_to_build_the_adapter_again(checkpoint):
    record = read_checkpoint(checkpoint)["adaptrank"]
    (entry,) = record["adapter"]["adapters"]
    assert entry["nest"][0]["class"] == "SVD"
    assert entry["nest"][0]["init_args"]["alpha"] == 8
    assert record["adapter"]["base"]["fingerprint"]
    assert record["allocators"][0]["init_args"]["swaps"] == 2
    assert record["training"]["optimizers"][0]["class"] == "AdamW"
