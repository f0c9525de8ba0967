"""Adapters that nothing trains in a run: allocators and initializers leave them as they are."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import PHASES, Toy, fit
from torch import nn

from adaptrank._errors import UserError
from adaptrank.allocation import (
    EVA,
    AdaLoRA,
    ElaLoRA,
    GoRA,
    PRILoRA,
    SoRA,
    UniformRanks,
)
from adaptrank.axes import cost_model, rank_axes
from adaptrank.injection import adapt, delete_adapter, set_enabled
from adaptrank.parameterizations import DecoupledLoRA, HyperAdapt, LoRA, wrappers
from adaptrank.strategies import ChainOfLoRA, ReLoRA, SDLoRA, XGBLoRA
from adaptrank.testing import perturb

LORA4, TOTAL = partial(LoRA, rank=4), 24


class Two(Toy):
    """A trained adapter `old`, and a fresh adapter `new`, which alone is on and trains."""

    def __init__(self, method=LORA4, on="new", deleted=()):
        super().__init__(method)
        delete_adapter(self.maps)
        if "old" not in deleted:
            adapt(self.maps, "all-linear", LORA4, name="old")
            for wrapper in wrappers(self.maps):
                perturb(wrapper)
        adapt(self.maps, "all-linear", method, name="new", seed=1)
        set_enabled(self.maps, on)

    def of(self, name):
        return [wrapper for wrapper in wrappers(self.maps) if wrapper.name == name]

    def tensors(self, name):
        return [tensor for wrapper in self.of(name) for _, tensor in wrapper.own_parameters()]


def units(model, name):
    axes = rank_axes(model).values()
    return [len(axis) for axis in axes if axis.adapters == [name]]


def train(model, participant, optimizer, steps=TOTAL, **data):
    """Train in a plain loop."""
    participant.start(model, optimizer, steps, **data)
    for step in range(steps):
        model.zero_grad()
        model.loss(step).backward()
        participant.before_step()
        optimizer.step()
        participant.step()
    participant.finish()


def all_trained(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def data_of(model):
    return {"batches": range(4), "loss": model.loss}


ALLOCATORS = {
    "AdaLoRA": lambda: AdaLoRA(budget=6, **PHASES),
    "AdaLoRA parameters": lambda: AdaLoRA(budget=28 * 6, unit="parameters", **PHASES),
    "ElaLoRA": lambda: ElaLoRA(**PHASES),
    "SoRA": lambda: SoRA(**PHASES),
}
INITIALIZERS = {
    "EVA": EVA,
    "EVA parameters": lambda: EVA(unit="parameters"),
    "GoRA": lambda: GoRA(batches=4),
    "PRILoRA": lambda: PRILoRA(first=2, last=4, every=4),
    "UniformRanks": lambda: UniformRanks(budget=9),
}
ALL = ALLOCATORS | INITIALIZERS
"""Each of them scores, resizes, gates or starts units in another way."""


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_that_is_off_stays_to_the_last_bit(name):
    model = Two()
    before = copy.deepcopy(model.tensors("old"))
    participant = ALL[name]()
    train(model, participant, all_trained(model), **data_of(model))
    for tensor, value in zip(model.tensors("old"), before, strict=True):
        assert torch.equal(tensor, value)
    assert all(not wrapper.gates for wrapper in model.of("old"))
    assert [axis.adapters for axis in participant.run.axes.values()] == [["new"]] * 3


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_that_is_off_changes_nothing_in_the_run_of_another(name):
    alone, beside = Two(deleted=["old"]), Two()
    for mine, theirs in zip(alone.tensors("new"), beside.tensors("new"), strict=True):
        theirs.data.copy_(mine.data)
    for model in (alone, beside):
        train(model, ALL[name](), all_trained(model), **data_of(model))
    assert units(alone, "new") == units(beside, "new")


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_that_no_optimizer_holds_stays(name):
    model = Two(on=True)
    before = copy.deepcopy(model.tensors("old"))
    optimizer = torch.optim.Adam(model.tensors("new"), lr=1e-2)
    train(model, ALL[name](), optimizer, **data_of(model))
    for tensor, value in zip(model.tensors("old"), before, strict=True):
        assert torch.equal(tensor, value)


def test_a_budget_in_parameters_counts_the_adapter_that_trains():
    model = Two()
    train(model, ALLOCATORS["AdaLoRA parameters"](), all_trained(model))
    counted = sum(tensor.numel() for tensor in model.tensors("new"))
    assert counted == 28 * 6
    adapt(model.maps, "all-linear", HyperAdapt, name="scales")
    set_enabled(model.maps, "new")
    again = AdaLoRA(budget=28 * 3, unit="parameters", **PHASES)
    again.start(model, all_trained(model), TOTAL)
    assert again.run.start_total == 28 * 6
    delete_adapter(model.maps, "scales")
    both = [wrapper for name in ("old", "new") for wrapper in model.of(name)]
    whole = cost_model(model)
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    assert whole.total(sizes) == sum(p.numel() for w in both for _, p in w.own_parameters())
    assert cost_model(model, model.of("old")).fixed == 0


def test_an_adapter_that_is_off_stays_in_lightning_and_the_run_resumes(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=11, save_top_k=-1)
    model = Two()
    before = copy.deepcopy(model.tensors("old"))
    fit(model, ALLOCATORS["AdaLoRA"](), checkpoint)
    assert sum(units(model, "new")) == 6
    for tensor, value in zip(model.tensors("old"), before, strict=True):
        assert torch.equal(tensor, value)
    resumed = Two()
    fit(resumed, ALLOCATORS["AdaLoRA"](), ckpt_path=tmp_path / "step=11.ckpt")
    for tensor, value in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(tensor, value)


def test_a_run_with_both_adapters_is_not_resumed_with_one(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=11, save_top_k=-1)
    fit(Two(), ALLOCATORS["AdaLoRA"](), checkpoint)
    with pytest.raises(UserError, match="its axes are not those of this model"):
        fit(Two(on=True), ALLOCATORS["AdaLoRA"](), ckpt_path=tmp_path / "step=11.ckpt")


def test_a_run_goes_on_with_the_axes_that_it_began_with():
    """Earlier versions began with the axes of adapters that were off, too."""
    model = Two(on=True)
    allocator = AdaLoRA(budget=12, **PHASES)
    allocator.start(model, all_trained(model), TOTAL)
    stored = allocator.state_dict()
    set_enabled(model.maps, "new")
    again = AdaLoRA(budget=12, **PHASES)
    again.load_state_dict(stored)
    again.start(model, all_trained(model), TOTAL)
    assert len(again.run.axes) == 6


def test_an_axis_of_tied_layers_takes_part_if_one_layer_is_on():
    first, second = LoRA(nn.Linear(8, 6), rank=2), LoRA(nn.Linear(8, 6), rank=2)
    second.A, second.B = first.A, first.B
    model = nn.Sequential(first, second)
    assert len(rank_axes(model)) == 1
    first.enabled = False
    assert rank_axes(model)["0:rank"].enabled
    second.enabled = False
    assert not rank_axes(model)["0:rank"].enabled


# ---- nothing is left


@pytest.mark.parametrize("name", ALL)
def test_a_run_of_adapters_that_are_all_off_is_refused(name):
    model = Two(on=False)
    says = (
        r"has nothing to allocate: the adapters 'old', 'new' are switched off; switch on the one "
        r"to train, as in adaptrank.set_enabled\(model, 'old'\)\."
    )
    with pytest.raises(UserError, match=says):
        ALL[name]().start(model, all_trained(model), TOTAL, **data_of(model))
    model = Two(on=False, deleted=["old"])
    with pytest.raises(UserError, match=r"'new' is switched off.*set_enabled\(model, 'new'\)\."):
        ALL[name]().start(model, all_trained(model), TOTAL, **data_of(model))


@pytest.mark.parametrize("name", ALL)
def test_an_optimizer_of_other_tensors_is_refused(name):
    model, other = Two(), torch.optim.Adam(nn.Linear(2, 2).parameters())
    says = r"no optimizer holds a tensor of the adapter 'new'; make the optimizer after adapt\(\)"
    with pytest.raises(UserError, match=says):
        ALL[name]().start(model, other, TOTAL, **data_of(model))


def test_an_initializer_may_start_before_there_is_an_optimizer():
    model = Two()
    before = copy.deepcopy(model.tensors("old"))
    EVA().start(model, [], TOTAL, **data_of(model))
    for tensor, value in zip(model.tensors("old"), before, strict=True):
        assert torch.equal(tensor, value)


# ---- training strategies


@pytest.mark.parametrize(
    "strategy",
    [
        ReLoRA(every=8, restart_warmup=1),
        ChainOfLoRA(),
        XGBLoRA(every=8, blocks=1),
        SDLoRA(steps_per_task=[8, 16]),
    ],
    ids=lambda strategy: strategy.label,
)
def test_a_strategy_does_not_start_an_adapter_anew_that_is_off(strategy):
    method = partial(DecoupledLoRA if isinstance(strategy, SDLoRA) else LoRA, rank=4)
    model = Toy()
    delete_adapter(model.maps)
    adapt(model.maps, ["0"], method, name="old")
    perturb(model.maps[0])
    adapt(model.maps, ["1", "2"], method, name="new")
    set_enabled(model.maps, "new")
    says = (
        f"{strategy.label} starts every adapter of the model anew, and 'old' is switched off and "
        r"would be lost; .*delete_adapter\(model, 'old'\), or switch it on"
    )
    with pytest.raises(UserError, match=says):
        strategy.start(model, all_trained(model), TOTAL)
    set_enabled(model.maps, True)
    strategy.start(model, all_trained(model), TOTAL)
    strategy.finish()
