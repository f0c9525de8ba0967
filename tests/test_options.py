"""Every numeric option of every registered class refuses values that make no sense."""

import math
from functools import partial
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from conftest import METHODS
from lightning.pytorch import Trainer
from torch import nn

from adaptrank._errors import UserError
from adaptrank._options import Range, check_arguments, check_maker, check_number, numeric_options
from adaptrank.allocation import ALLOCATORS
from adaptrank.cli import main
from adaptrank.modules import (
    Adapter,
    CausalLM,
    ImageClassification,
    MultipleChoice,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)
from adaptrank.parameterizations import LoRA

TASKS = (
    CausalLM,
    ImageClassification,
    MultipleChoice,
    Seq2Seq,
    SequenceClassification,
    TokenClassification,
)

NEVER = (math.nan, math.inf, -math.inf, True, "8", [math.nan])
"""Values that no option takes."""

MAY_BE_ZERO = {
    "dropout", "orth", "depth", "encoder", "seed", "warmup", "final", "until", "swaps", "whole",
    "beta", "cooldown", "sparsity", "xi", "xi_end", "l1", "floor", "r_min", "thresholds",
}  # fmt: skip
NOT_ZERO = {("LoRAPrune", "sparsity")}
MAY_BE_MINUS_ONE = {"seed", ("Kronecker", "factor"), ("LoKr", "factor")}
"""Options, or options of a class, whose range includes the value."""

ALLOCATOR_CLASSES = [cls for cls in ALLOCATORS.values() if cls.__module__.startswith("adaptrank.")]


def wrong_values(owner, option, whole):
    yield from NEVER
    if whole:
        yield 2.5
    if not {option, (owner, option)} & MAY_BE_MINUS_ONE:
        yield -1
    if option not in MAY_BE_ZERO or (owner, option) in NOT_ZERO:
        yield 0


def refusal(build):
    """The sentence of a refusal, or None if there is none."""
    try:
        build()
    except UserError as error:
        return str(error)
    return None


def check_all(owner, build):
    """Each numeric option refuses each wrong value by a sentence that names the option."""
    options = numeric_options(owner)
    for option, (whole, _) in options.items():
        for value in wrong_values(owner.__name__, option, whole):
            text = refusal(partial(build, **{option: value}))
            assert text, f"{owner.__name__}({option}={value!r}) is accepted"
            assert option in text, f"{option}={value!r}: {text}"
            assert "\n" not in text
            assert text.endswith(".")
    return options


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_numbers_of_methods(cls):
    example = cls.example()
    check_all(cls, partial(cls, example))


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_numbers_of_methods_are_known_before_there_is_a_layer(cls):
    for option in numeric_options(cls):
        for value in NEVER:
            with pytest.raises(UserError, match=option):
                check_maker(partial(cls, **{option: value}))
    check_maker(cls)


def test_all_methods_but_those_without_numbers_are_walked():
    without = {cls.__name__ for cls in METHODS if not numeric_options(cls)}
    assert without == {"HyperAdapt", "LNTune", "ResidualOffset"}


@pytest.mark.parametrize("cls", ALLOCATOR_CLASSES, ids=lambda cls: cls.__name__)
def test_numbers_of_allocators(cls):
    assert check_all(cls, cls)
    cls()


@pytest.mark.parametrize("cls", TASKS, ids=lambda cls: cls.__name__)
def test_numbers_of_modules(cls):
    build = partial(cls, "there-is-no-such-backbone", [Adapter([LoRA])])
    options = {}
    for base in cls.__mro__:
        if base.__module__.startswith("adaptrank"):
            options |= numeric_options(base)
    assert set(options) >= {"warmup", "lora_plus_ratio", "seed"}
    for option, (whole, _) in options.items():
        for value in wrong_values(cls.__name__, option, whole):
            with pytest.raises(UserError, match=option):
                build(**{option: value})
    with pytest.raises(UserError, match="schedule='quadratic' is unknown"):
        build(schedule="quadratic")


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr": -1.0},
        {"weight_decay": -0.1},
        {"weight_decay": math.nan},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"eps": -1.0},
        {"eps": math.inf},
    ],
    ids=str,
)
def test_numbers_of_optimizers(wrong):
    with pytest.raises(UserError, match=next(iter(wrong)) + "|beta|learning rate|epsilon|optim"):
        CausalLM("none", [Adapter([LoRA])], optimizer=partial(torch.optim.AdamW, **wrong))


def test_an_optimizer_that_needs_a_real_model_is_left_to_the_run():
    def needs_names(groups):
        raise KeyError("names")

    CausalLM("none", [Adapter([LoRA])], optimizer=needs_names)
    CausalLM("none", [Adapter([LoRA])], optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9))


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, True])
def test_clip_values(value):
    module = CausalLM("none", [Adapter([LoRA])])
    module.trainer = SimpleNamespace(gradient_clip_val=value, precision="32-true", callbacks=[])
    with pytest.raises(UserError, match="gradient_clip_val="):
        module.setup("fit")


def test_a_clip_value_is_refused_before_the_backbone_is_looked_for():
    module = CausalLM("there-is-no-such-backbone", [Adapter([LoRA])])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", gradient_clip_val=-1.0, max_steps=1, **quiet)
    with pytest.raises(UserError, match=r"gradient_clip_val=-1\.0 makes no sense\. Give"):
        trainer.fit(module, [0])


@pytest.mark.parametrize(
    "adapter",
    [
        partial(LoRA, alpha=math.nan),
        partial(LoRA, dropout=1),
        partial(LoRA, rank=2.5),
        lambda layer: LoRA(layer, rank=True),
    ],
    ids=["alpha", "dropout", "rank", "function"],
)
def test_a_module_refuses_the_options_of_its_adapters(adapter):
    with pytest.raises(UserError, match="makes no sense"):
        CausalLM("there-is-no-such-backbone", [Adapter([adapter])])


def test_a_function_that_looks_at_its_layer_is_asked_later():
    check_maker(lambda layer: LoRA(layer, rank=layer.in_features))
    CausalLM("none", [Adapter([lambda layer: LoRA(layer, rank=min(4, layer.in_features))])])


def test_the_command_refuses_them_before_the_backbone_is_looked_for(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    for options, sentence in (
        ("{alpha: .nan}", "alpha=nan makes no sense. Give a number above 0."),
        ("{dropout: 1.0}", "dropout=1.0 makes no sense. Give a number from 0 and below 1."),
    ):
        file.write_text(
            "model:\n  class_path: CausalLM\n  init_args:\n"
            "    backbone: there-is-no-such-backbone\n    adapters:\n    - parameterization:\n"
            f"      - {{class_path: LoRA, init_args: {options}}}\n"
            "data: ArithmeticProblems\n"
        )
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(file), "--runs", str(tmp_path / "runs")])
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_key_is_named_once(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model", "CausalLM", "--model.lora_rate", "3"])
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("model.lora_rate") == 1
    assert "--model.lora_rate: Unknown key. Did you mean" in said


def test_ranges():
    assert 0 in Range(0)
    assert 0 not in Range(0, open_low=True)
    assert 1 not in Range(0, 1, open_high=True)
    assert str(Range(0, 1, open_high=True)) == "from 0 and below 1"
    check_number("rank", 3, Range(1), whole=True)
    check_number("alpha", 3, Range(1))
    with pytest.raises(UserError, match=r"rank=3\.0 makes no sense\. Give a whole number from 1\."):
        check_number("rank", 3.0, Range(1), whole=True)


def test_copies_need_no_arguments():
    import copy
    import pickle

    layer = LoRA(nn.Linear(4, 4), rank=2)
    assert copy.deepcopy(layer).init_args == layer.init_args
    assert pickle.loads(pickle.dumps(layer)).init_args == layer.init_args
    allocator = ALLOCATORS["AdaLoRA"](budget=3)
    assert copy.copy(allocator).budget == 3


def test_exponents_of_optimizers_may_be_negative():
    from transformers import Adafactor

    scaled = partial(Adafactor, scale_parameter=False, relative_step=False, lr=1e-3)
    for make in (scaled, torch.optim.Adafactor):
        CausalLM("none", [Adapter([LoRA])], optimizer=make)
    with pytest.raises(ValueError, match="decay_rate=nan"):
        CausalLM("none", [Adapter([LoRA])], optimizer=partial(scaled, decay_rate=float("nan")))


def test_words_beside_numbers_are_no_numbers():
    class Mixed:
        def __init__(self, scale: Literal["auto"] | float = "auto", flag: bool | int = 1):
            pass

    check_arguments(Mixed, {"scale": "auto", "flag": True})
    with pytest.raises(ValueError, match="scale=nan"):
        check_arguments(Mixed, {"scale": float("nan"), "flag": 1})
    with pytest.raises(ValueError, match="scale=True"):
        check_arguments(Mixed, {"scale": True, "flag": 1})
