"""Own learning rates of parts of what trains: keys, groups, schedules, rank changes, resuming."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import METHODS
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from training_cases import NUMBERS

from adaptrank import adapt, parameter_groups, save_adapter
from adaptrank._errors import UserError
from adaptrank.allocation import ElaLoRA
from adaptrank.axes import rank_axes
from adaptrank.checkpoints.other_runs import same_groups
from adaptrank.cli import main
from adaptrank.cli.unusual_rates import unusual_rates
from adaptrank.data import ArithmeticProblems
from adaptrank.modules import (
    Adapter,
    CausalLM,
    SequenceClassification,
    TokenClassification,
    build_optimizer,
)
from adaptrank.modules.learning_rates import STUDIED_HEAD, check_rates, trained_names
from adaptrank.parameterizations import (
    SVD,
    DecoupledLoRA,
    DoRA,
    HyperAdapt,
    LoRA,
    TensorKind,
    on_example,
)

ROOT = Path(__file__).parents[1]
ADAM = partial(torch.optim.AdamW, lr=1e-3)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


def toy(*nest, name="default"):
    """Two linear layers with a nest around the first, and a norm that trains whole."""
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    return adapt(model, ["0"], list(nest), name=name, train_modules=["1"])


def rates_by_name(model, groups):
    """Return the learning rate of each tensor, {name in its layer: rate or None}."""
    names = {id(p): n.replace("base.", "") for n, p in model.named_parameters()}
    return {names[id(p)]: group.get("lr") for group in groups for p in group["params"]}


NEST = (HyperAdapt, partial(SVD, rank=3))


def module(folder, nest=NEST, optimizer=ADAM, **arguments):
    settings = {"schedule": "constant", "warmup": 0, "dtype": "fp32", "generate": False}
    adapters = [Adapter(list(nest), targets=["q_proj", "v_proj"])]
    return CausalLM(folder, adapters, optimizer=optimizer, **{**settings, **arguments})


def fit(model, callbacks=(), ckpt_path=None, **arguments):
    data = ArithmeticProblems(batch_size=4, train_size=40, val_size=4)
    trainer = Trainer(**{**QUIET, **arguments}, callbacks=list(callbacks))
    trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


# ---- keys


MAGNITUDES = (HyperAdapt, partial(DoRA, rank=2))


@pytest.mark.parametrize(
    ("learning_rates", "expected"),
    [
        ({"DoRA": 0.1}, {"0.A": 0.1, "0.B": 0.1, "0.m": 0.1}),
        ({"HyperAdapt": 0.1}, {"0.da": 0.1, "0.dc": 0.1}),
        ({"factors": 0.1}, {"0.A": 0.1, "0.B": 0.1}),
        ({"scales": 0.1, "magnitudes": 0.2}, {"0.da": 0.1, "0.dc": 0.1, "0.m": 0.2}),
        ({"DoRA.B": 0.1, "HyperAdapt.dc": 0}, {"0.B": 0.1, "0.dc": 0.0}),
        ({"1": 0.1}, {"1.weight": 0.1, "1.bias": 0.1}),
        ({"modules": 0.1}, {"1.weight": 0.1, "1.bias": 0.1}),
        (
            # Tensors before methods before adapters before kinds.
            {"style": 0.3, "DoRA.B": 0.1, "DoRA": 0.2},
            {"0.da": 0.3, "0.dc": 0.3, "0.A": 0.2, "0.m": 0.2, "0.B": 0.1},
        ),
        ({"factors": 0.4, "DoRA.B": 0.1}, {"0.A": 0.4, "0.B": 0.1}),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_the_most_specific_key_decides(learning_rates, expected):
    model = toy(*MAGNITUDES, name="style")
    groups = parameter_groups(model, learning_rates=learning_rates)
    rates = rates_by_name(model, groups)
    assert {name: rate for name, rate in rates.items() if rate is not None} == expected
    assert len(rates) == 7, "every trained tensor is in one group"
    names = [group["name"] for group in groups]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("nest", [(HyperAdapt, LoRA), (LoRA, HyperAdapt)], ids=["inside", "around"])
def test_members_of_a_nest_have_rates_wherever_they_stand(nest):
    model = toy(*nest)
    groups = parameter_groups(model, learning_rates={"HyperAdapt": 1e-2, "LoRA": 1e-3})
    expected = {"0.da": 1e-2, "0.dc": 1e-2, "0.A": 1e-3, "0.B": 1e-3}
    rates = rates_by_name(model, groups)
    assert rates == expected | {"1.weight": None, "1.bias": None}
    optimizer = ADAM(groups, lr=0.5)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "HyperAdapt": 1e-2,
        "LoRA": 1e-3,
        "others": 0.5,
    }


def test_what_is_exempt_from_decay_stays_so():
    groups = parameter_groups(toy(*MAGNITUDES), learning_rates={"DoRA": 0.1})
    assert {group["name"]: group.get("weight_decay") for group in groups} == {
        "DoRA": None,
        "DoRA-no_decay": 0.0,
        "others": 0.0,
    }


@pytest.mark.parametrize(
    ("learning_rates", "sentence"),
    [
        (
            {"Lora": 0.1},
            r"'Lora' names nothing that trains here. Did you mean 'LoRA'\? There are HyperAdapt, "
            r"LoRA, 1, scales, factors, modules, default, HyperAdapt.da, HyperAdapt.dc, LoRA.A, "
            r"LoRA.B.",
        ),
        ({"LoRA.C": 0.1}, "'LoRA.C' names nothing that trains here. Did you mean 'LoRA.[AB]'"),
        ({"magnitudes": 0.1}, "'magnitudes' names nothing that trains here"),
        (
            {"default": 1, "scales": 1},
            "'scales' decides nothing here.*all of its tensors: default.",
        ),
        ({"LoRA": -1}, "learning_rates: LoRA=-1 makes no sense. Give a number from 0"),
        ({"LoRA": math.nan}, "learning_rates: LoRA=nan makes no sense"),
        ({"LoRA": [1]}, r"learning_rates: LoRA=\[1\] makes no sense"),
        ({"LoRA": {}}, "learning_rates: LoRA={} makes no sense"),
        ({"LoRA": None}, "learning_rates: LoRA=None makes no sense"),
        ({"LoRA": True}, "learning_rates: LoRA=True makes no sense"),
        ({"LoRA": {"B": {"C": 1}}}, "learning_rates: LoRA.B={'C': 1} makes no sense"),
        ({"LoRA.B": 1, "LoRA": {"B": 1}}, "learning_rates gives LoRA.B two rates. Keep one."),
        ({"LoRA": "1e-3x"}, "learning_rates: LoRA='1e-3x' makes no sense"),
        ({3: 0.1}, "learning_rates: 3 is no name"),
        (0.1, "learning_rates=0.1 makes no sense. Give names and their rates, such as"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_key_or_rate_that_fits_nothing_is_one_sentence(learning_rates, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        parameter_groups(toy(HyperAdapt, LoRA), learning_rates=learning_rates)
    assert "\n" not in str(refused.value)


def test_ways_to_write_the_same():
    rates = {"LoRA.A": 1e-3, "LoRA.B": 4e-3, "HyperAdapt": 1.0}
    nested = {"LoRA": {"A": "1e-3", "B": 4e-3}, "HyperAdapt": 1}
    assert check_rates(nested) == check_rates(rates) == rates
    assert check_rates(None) == {}


def test_a_name_with_two_meanings_is_refused():
    with pytest.raises(UserError, match="'LoRA' names different tensors in two ways"):
        parameter_groups(toy(HyperAdapt, LoRA, name="LoRA"), learning_rates={"LoRA": 0.1})
    # A method and an adapter that have the same tensors mean the same.
    parameter_groups(toy(LoRA, name="LoRA"), learning_rates={"LoRA": 0.1})


def test_rates_are_checked_before_a_backbone_is_looked_for():
    with pytest.raises(UserError, match=r"learning_rates: LoRA=-1\.0 makes no sense"):
        module("there-is-no-such-backbone", learning_rates={"LoRA": -1.0})


def test_a_wrong_key_is_found_when_the_model_is_built(tiny_llama):
    with pytest.raises(UserError, match=r"'LoRA' names nothing that trains here.*HyperAdapt, SVD"):
        module(tiny_llama, learning_rates={"LoRA": 0.1}).configure_model()


def test_modules_that_train_whole(tiny_bert, tiny_llama):
    model = SequenceClassification(
        tiny_bert,
        [Adapter([LoRA])],
        num_labels=3,
        dtype="fp32",
        train_modules=["pooler"],
        learning_rates={"head": 0.1, "pooler": 0.2},
    )
    model.configure_model()
    groups = parameter_groups(model.model, learning_rates=model.learning_rates)
    rates = rates_by_name(model.model, groups)
    whole = {name: rate for name, rate in rates.items() if not name.endswith((".A", ".B"))}
    assert whole == {
        "bert.pooler.dense.weight": 0.2,
        "bert.pooler.dense.bias": 0.2,
        "classifier.weight": 0.1,
        "classifier.bias": 0.1,
    }
    paths = {names.tensor for names in trained_names(model.model).values()}
    assert paths == {"LoRA.A", "LoRA.B", "bert.pooler", "classifier"}

    tokens = module(tiny_llama, added_tokens=["<call>"], learning_rates={"embed_tokens": 0.1})
    tokens.configure_model()
    rates = rates_by_name(tokens.model, parameter_groups(tokens.model, 1.0, tokens.learning_rates))
    assert [name.rpartition(".")[2] for name, rate in rates.items() if rate == 0.1] == ["rows"]


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
def test_a_method_names_the_kinds_of_its_own_tensors(cls):
    variants = [cls(cls.example(), **arguments) for arguments in NUMBERS.get(cls.__name__, [])]
    names = {
        name.partition(".")[0]
        for layer in [on_example(cls), *variants]
        for name, _ in layer.own_parameters()
    }
    assert set(cls.kinds) <= names
    assert set(cls.kinds.values()) <= set(TensorKind)
    # Tensors that weight decay would pull to zero are no factors.
    assert all(cls.kind_of(name) != "factors" for name in cls.no_decay)


# ---- LoRA+


def test_without_rates_the_groups_are_those_of_before():
    model = toy(*MAGNITUDES)
    first, second = parameter_groups(model)
    assert [*first] == ["params"]
    assert [*second] == ["params", "weight_decay"]
    fast = {id(dict(model.named_parameters())["0.B"])}
    groups = parameter_groups(model, lora_plus_ratio=4.0)
    assert [group["closing"] for group in groups].count(True) == 1
    assert {id(p) for group in groups if group["closing"] for p in group["params"]} == fast
    assert not any({"name", "lr"} & group.keys() for group in groups)


def test_lora_plus_multiplies_the_rate_of_a_method():
    model = toy(HyperAdapt, LoRA)
    optimizer = build_optimizer(model, ADAM, 4.0, {"LoRA": 0.5})
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
        "LoRA": 0.5,
        "LoRA-closing": 2.0,
        "others": 1e-3,
    }
    assert not any("closing" in group for group in optimizer.param_groups)
    with pytest.raises(UserError, match=r"gives LoRA\.B a rate, which lora_plus_ratio would mult"):
        parameter_groups(model, 4.0, {"LoRA.B": 0.5})
    parameter_groups(model, 4.0, {"LoRA.A": 0.5})


def test_rates_are_lora_plus_and_one_rate_to_the_last_bit(tiny_llama):
    nest = (partial(LoRA, rank=2),)
    runs = [
        {},
        {"learning_rates": {"LoRA": 1e-3}},
        {"lora_plus_ratio": 4.0},
        {"learning_rates": {"LoRA.B": 4e-3}},
    ]
    weights = []
    for arguments in runs:
        torch.manual_seed(0)
        model = module(tiny_llama, nest, **arguments)
        fit(model, max_steps=2)
        weights.append(trained(model))
    plain, same, plus, by_tensor = weights
    assert_same(plain, same)
    assert_same(plus, by_tensor)
    assert any(not torch.equal(value, plus[name]) for name, value in plain.items())


# ---- optimizers


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (torch.optim.LBFGS, "needs an optimizer with parameter groups, and this one says: LBFGS"),
        ("Adafactor", "Adafactor with relative_step=True sets its own learning rate"),
    ],
    ids=str,
)
def test_an_optimizer_that_would_not_follow_the_rates_is_refused(make, sentence):
    if make == "Adafactor":
        from transformers.optimization import Adafactor as make
    with pytest.raises(UserError, match=sentence):
        build_optimizer(toy(LoRA), make, learning_rates={"LoRA": 0.1})


# ---- training


class Steps(Callback):
    """Compares each step of SGD with rate times gradient, and notes the rates and the sizes."""

    def __init__(self):
        self.rates, self.sizes, self.groups = [], [], None

    def on_train_start(self, trainer, pl_module):
        (optimizer,) = trainer.optimizers
        self.groups = {g["name"]: [id(p) for p in g["params"]] for g in optimizer.param_groups}
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, optimizer, *_):
        groups = optimizer.param_groups
        self.start = {id(p): p.detach().clone() for group in groups for p in group["params"]}

    def after(self, optimizer, *_):
        # The backward pass is a part of the step, and the gradients are still there.
        for group in optimizer.param_groups:
            for p in group["params"]:
                expected = self.start[id(p)] - group["lr"] * p.grad
                torch.testing.assert_close(p.detach(), expected)
        now = {g["name"]: [id(p) for p in g["params"]] for g in optimizer.param_groups}
        assert now == self.groups
        self.rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.sizes.append([len(axis) for axis in rank_axes(pl_module.model).values()])


SWAPPING = {"swaps": 2, "every": 2, "warmup": 1, "final": 1}


def test_rates_keep_their_ratio_and_their_tensors_while_ranks_move(tiny_llama, tmp_path):
    model = module(
        tiny_llama,
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        learning_rates={"HyperAdapt": 1e-2, "SVD.l": 5e-2},
        schedule="linear",
        warmup=2,
    )
    steps, monitor = Steps(), LearningRateMonitor()
    logger = CSVLogger(tmp_path)
    fit(
        model,
        [ElaLoRA(**SWAPPING), steps, monitor],
        max_steps=6,
        logger=logger,
        log_every_n_steps=1,
    )
    assert len({tuple(sizes) for sizes in steps.sizes}) > 1, "ranks moved"
    assert max(max(sizes) for sizes in steps.sizes) > 3, "an axis grew"
    for share, rates in zip([0, 1 / 2, 1, 3 / 4, 1 / 2, 1 / 4], steps.rates, strict=True):
        expected = {"HyperAdapt": 1e-2 * share, "SVD.l": 5e-2 * share, "others": 1e-3 * share}
        assert rates == pytest.approx(expected)
    assert {*monitor.lrs} == {"lr-SGD/HyperAdapt", "lr-SGD/SVD.l", "lr-SGD/others"}


def test_a_run_with_rates_resumes_to_the_last_bit(tiny_llama, tmp_path):
    rates = {"learning_rates": {"HyperAdapt": 1e-2, "SVD.l": 5e-2}}
    save = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
    torch.manual_seed(0)
    whole = module(tiny_llama, **rates)
    fit(whole, [ElaLoRA(**SWAPPING), save], max_steps=6, enable_checkpointing=True)
    resumed = module(tiny_llama, **rates)
    fit(resumed, [ElaLoRA(**SWAPPING)], tmp_path / "step=3.ckpt", max_steps=6)
    assert_same(trained(whole), trained(resumed))

    changed = module(tiny_llama, learning_rates={"HyperAdapt": 1e-2})
    with pytest.raises(UserError, match=r"learning_rates is \{'HyperAdapt': 0.01\} here and \{.*"):
        fit(changed, [ElaLoRA(**SWAPPING)], tmp_path / "step=3.ckpt", max_steps=6)


def test_groups_of_other_names_do_not_share_state():
    groups = [{"name": "LoRA", "lr": 0.1}, {"name": "others", "lr": 0.2}]
    other = [{"name": "HyperAdapt", "lr": 0.1}, {"name": "others", "lr": 0.2}]
    here = {"class": "AdamW", "groups": groups}
    assert same_groups(here, here)
    assert not same_groups(here, {"class": "AdamW", "groups": other})
    assert not same_groups(here, {"class": "AdamW", "groups": groups[:1]})
    unnamed = {"class": "AdamW", "groups": [{"lr": 0.1}]}
    assert same_groups(unnamed, unnamed)


# ---- rates far from those that studies chose


@pytest.mark.parametrize(
    ("make", "rates", "methods"),
    [
        (partial(torch.optim.AdamW, lr=1e-3), {}, []),
        (partial(torch.optim.AdamW, lr=0.5), {}, ["HyperAdapt", "LoRA"]),
        (partial(torch.optim.AdamW, lr=1e-6), {"HyperAdapt": 0.01}, ["LoRA"]),
        (partial(torch.optim.AdamW, lr=0.05), {"LoRA.B": 0.5, "LoRA.A": 0.6}, ["LoRA", "LoRA"]),
        (partial(torch.optim.SGD, lr=0.5), {}, []),
        (partial(torch.optim.AdamW, lr=0.0), {}, []),
    ],
)
def test_a_rate_far_from_the_one_that_a_study_chose_is_told(make, rates, methods):
    model = toy(HyperAdapt, LoRA)
    optimizer = build_optimizer(model, make, learning_rates=rates)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    sentences = list(unusual_rates(model, [optimizer]))
    named = {"HyperAdapt": HyperAdapt, "LoRA": LoRA}
    assert [sentence.split()[0] for sentence in sentences] == methods
    for sentence in sentences:
        assert sentence.endswith(f"({named[sentence.split()[0]].studied_rate.page}).")
        assert f"chose {named[sentence.split()[0]].studied_rate.rate:g} with AdamW" in sentence


def test_the_rates_are_those_that_the_pages_say():
    studied = [cls for cls in METHODS if "studied_rate" in vars(cls)]
    assert studied
    for cls in studied:
        text = (ROOT / cls.studied_rate.page).read_text(encoding="utf-8")
        lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        header = next(line for line in lines if "lr" in line)
        chosen = [
            line[header.index("lr")]
            for line in lines
            if line[0].split()[1] == cls.__name__ and len(line) == len(header)
        ]
        assert f"{cls.studied_rate.rate:g}" in chosen


def test_the_rate_of_a_head_is_that_of_its_page():
    text = (ROOT / STUDIED_HEAD.page).read_text(encoding="utf-8")
    assert f"The head has {STUDIED_HEAD.rate:g} in all rows but one" in " ".join(text.split())


def test_a_head_of_words_keeps_the_rate_of_the_optimizer(tiny_bert):
    fresh = {"adapters": [Adapter([LoRA])], "dtype": "fp32", "num_labels": 3}
    module = TokenClassification(tiny_bert, learning_rates="studied", **fresh)
    module.configure_model()
    assert module.rates_of(module.model) == {"LoRA": LoRA.studied_rate.rate}
    assert module.studied_head_rate(module.model) is None


UNSTUDIED = partial(DecoupledLoRA, rank=2)


def test_studied_rates_are_those_that_the_studies_chose():
    model = toy(HyperAdapt, LoRA, UNSTUDIED)
    optimizer = build_optimizer(model, partial(torch.optim.AdamW, lr=2e-4), 1.0, "studied")
    rates = {group["name"].split("-")[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == {
        "HyperAdapt": HyperAdapt.studied_rate.rate,
        "LoRA": LoRA.studied_rate.rate,
        "others": 2e-4,
    }
    named = {"HyperAdapt": HyperAdapt.studied_rate.rate, "LoRA": LoRA.studied_rate.rate}
    stated = build_optimizer(
        toy(HyperAdapt, LoRA, UNSTUDIED), partial(torch.optim.AdamW), 1.0, named
    )
    assert [group["name"] for group in stated.param_groups] == [
        group["name"] for group in optimizer.param_groups
    ]


def classifier(folder, make=ADAM, **arguments):
    """Return a task with a head that it has made, and its optimizer."""
    module = SequenceClassification(folder, dtype="fp32", num_labels=3, **arguments)
    module.configure_model()
    return module, build_optimizer(module.model, make, 1.0, module.rates_of(module.model))


def rates_of_head(module, optimizer):
    head = {id(parameter) for parameter in module.model.classifier.parameters()}
    return {
        group["lr"]
        for group in optimizer.param_groups
        if head & {id(parameter) for parameter in group["params"]}
    }


def test_a_fresh_head_has_its_studied_rate_and_a_trained_one_has_not(tiny_bert, tmp_path):
    fresh = {"adapters": [Adapter([LoRA])], "learning_rates": "studied"}
    module, optimizer = classifier(tiny_bert, **fresh)
    assert rates_of_head(module, optimizer) == {STUDIED_HEAD.rate}
    assert {group["lr"] for group in optimizer.param_groups} == {
        STUDIED_HEAD.rate,
        LoRA.studied_rate.rate,
    }
    save_adapter(module.model, tmp_path / "adapter", base=module.describe_base())
    trained, optimizer = classifier(
        tiny_bert, adapter=str(tmp_path / "adapter"), learning_rates="studied"
    )
    assert trained.studied_head_rate(trained.model) is None
    assert rates_of_head(trained, optimizer) == {ADAM.keywords["lr"]}


@pytest.mark.parametrize(("rate", "said"), [(1e-3, 1), (5e-3, 0), (5.0, 1)])
def test_a_rate_that_does_not_suit_a_fresh_head_is_told(tiny_bert, rate, said):
    rates = {"LoRA": LoRA.studied_rate.rate}
    make = partial(torch.optim.AdamW, lr=rate)
    module, optimizer = classifier(
        tiny_bert, make, adapters=[Adapter([LoRA])], learning_rates=rates
    )
    head = module.studied_head_rate(module.model)
    sentences = list(unusual_rates(module.model, [optimizer], head))
    assert len(sentences) == said
    for sentence in sentences:
        assert f"The head is new, and trains at a learning rate of {rate:g}." in sentence
        assert sentence.endswith("learning_rates: {head: 0.05}.")
    assert not list(unusual_rates(module.model, [optimizer]))


def test_studied_rates_need_a_method_with_a_study():
    class Own(LoRA, listed=False):
        """A method that no study tried."""

    with pytest.raises(
        UserError, match=r"learning_rates: studied .* this model has DecoupledLoRA, Own\."
    ):
        parameter_groups(toy(UNSTUDIED, Own), learning_rates="studied")
    with pytest.raises(UserError, match="learning_rates='best' makes no sense"):
        parameter_groups(toy(LoRA), learning_rates="best")


# ---- from the command line


def configuration(folder, rates):
    nest = ["HyperAdapt", {"class_path": "LoRA", "init_args": {"rank": 2}}]
    return {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "backbone": folder,
                "adapters": [{"parameterization": nest}],
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.002}},
                "learning_rates": rates,
                "dtype": "fp32",
            },
        },
        "data": {
            "class_path": "ArithmeticProblems",
            "init_args": {"batch_size": 4, "train_size": 8, "val_size": 4},
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
    }


def test_the_plan_of_a_configuration_shows_the_rates(tiny_llama, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(configuration(tiny_llama, {"HyperAdapt": 0.01})))
    main(["plan", "--config", str(file), "--json", "--model.learning_rates.LoRA.B", "4e-3"])
    groups = json.loads(capsys.readouterr().out)["learning_rates"]
    assert {name: group["lr"] for name, group in groups.items()} == {
        "HyperAdapt": 0.01,
        "LoRA.B": 0.004,
        "others": 0.002,
    }
    sizes = {name: group["parameters"] for name, group in groups.items()}
    layers = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)] * 2
    assert sizes == {
        "HyperAdapt": sum(map(sum, layers)),
        "LoRA.B": 2 * sum(m for m, _ in layers),
        "others": 2 * sum(n for _, n in layers),
    }


def test_the_command_names_a_wrong_key(tiny_llama, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(configuration(tiny_llama, {"HypeAdapt": 0.01})))
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(file)])
    said = capsys.readouterr().err
    assert "'HypeAdapt' names nothing that trains here. Did you mean 'HyperAdapt'?" in said
    assert "Traceback" not in said


def test_studied_rates_from_the_command_line(tiny_llama, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(configuration(tiny_llama, "studied")))
    main(["plan", "--config", str(file), "--json"])
    in_file = json.loads(capsys.readouterr().out)["learning_rates"]
    chosen = {cls.__name__: cls.studied_rate.rate for cls in (HyperAdapt, LoRA)}
    assert {name: group["lr"] for name, group in in_file.items()} == chosen
    file.write_text(yaml.safe_dump(configuration(tiny_llama, None)))
    main(["plan", "--config", str(file), "--json", "--model.learning_rates", "studied"])
    assert json.loads(capsys.readouterr().out)["learning_rates"] == in_file
    with pytest.raises(SystemExit):
        main(["plan", "--config", str(file), "--model.learning_rates", "studed"])
    said = capsys.readouterr().err
    assert "It must be one of 'studied', or a mapping. Did you mean 'studied'?" in said
