"""Rank initializers on a trained adapter: refused where its function would be lost."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import Toy, fit
from torch import nn
from training_cases import method_cases

from adaptrank import testing
from adaptrank._errors import UserError
from adaptrank.allocation import EVA, AdaLoRA, GoRA, PRILoRA, RankInitializer, UniformRanks
from adaptrank.allocation.participant import Choice
from adaptrank.allocation.trained_units import trained_layer
from adaptrank.artifacts import load_adapter, save_adapter
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt, set_enabled
from adaptrank.parameterizations import LoKr, LoRA, TensorTrain

LORA4, TOTAL = partial(LoRA, rank=4), 24

INITIALIZERS = {
    "EVA": lambda: EVA(max_batches=2),
    "GoRA": lambda: GoRA(batches=2),
}


def begin(model, participant):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    participant.start(model, optimizer, TOTAL, batches=range(2), loss=model.loss)
    return participant


def trained(method=LORA4):
    model = Toy(method)
    testing.perturb(model.maps)
    return model


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def outputs(model):
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    return torch.cat([layer(x) for layer in model.maps], 1).detach()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_the_start_of_a_trained_adapter_is_refused_and_nothing_changes(name, tmp_path):
    saved = trained()
    save_adapter(saved.maps, tmp_path)
    model = Toy()
    model.maps = load_adapter(nn.ModuleList(layer.innermost for layer in Toy().maps), tmp_path)
    before = everything(model)
    says = (
        f"^{name} would start the trained units of adapter 'default' anew at maps.0:rank, and what "
        f"they have learned would be lost; leave {name} out to train on, resume from a checkpoint "
        r"to go on with its own run, or start from a fresh adapter\.$"
    )
    with pytest.raises(UserError, match=says):
        begin(model, INITIALIZERS[name]())
    assert same(everything(model), before)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_second_fit_is_refused_and_a_resume_is_not(name, tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=11, save_top_k=-1)
    model, participant = Toy(LORA4), INITIALIZERS[name]()
    fit(model, participant, checkpoint)
    before = everything(model)
    for again in (participant, INITIALIZERS[name]()):
        with pytest.raises(UserError, match="would start the trained units"):
            fit(model, again)
    assert same(everything(model), before)
    resumed = Toy(LORA4)
    fit(resumed, INITIALIZERS[name](), ckpt_path=tmp_path / "step=11.ckpt")
    assert same(everything(resumed), before)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_start_before_the_first_step_may_be_set_again(name):
    model = Toy(LORA4)
    participant = begin(model, INITIALIZERS[name]())
    begin(model, participant)
    testing.perturb(model.maps)
    with pytest.raises(UserError, match="would start the trained units"):
        begin(model, participant)


@pytest.mark.parametrize("name", INITIALIZERS)
def test_a_trained_adapter_beside_a_fresh_one_has_to_be_off(name):
    model = trained()
    adapt(model.maps, "all-linear", LORA4, name="fresh")
    with pytest.raises(UserError, match="trained units of adapter 'default'"):
        begin(model, INITIALIZERS[name]())
    set_enabled(model.maps, "fresh")
    begin(model, INITIALIZERS[name]())


# ---- ranks alone


CHOOSERS = {
    "UniformRanks": lambda: UniformRanks(budget=9),
    "PRILoRA": lambda: PRILoRA(first=2, last=4, sparsity=0),
    "EVA": lambda: EVA(init=False, max_batches=2, budget=9),
    "GoRA": lambda: GoRA(init=False, batches=2, r_max=3),
}


@pytest.mark.parametrize("name", CHOOSERS)
def test_ranks_that_would_remove_trained_units_are_refused(name):
    model = trained()
    before = everything(model)
    says = rf"{name} would keep \d of 4 units of adapter 'default' at maps.\d:rank, and what"
    with pytest.raises(UserError, match=says):
        begin(model, CHOOSERS[name]())
    assert same(everything(model), before)
    begin(Toy(LORA4), CHOOSERS[name]())


class Grown(RankInitializer, registered=False):
    """Gives every axis two further units."""

    def choose(self, axes, batches):
        return Choice({key: len(axis) + 2 for key, axis in axes.items()})


class Set(RankInitializer, registered=False):
    """Keeps the ranks, and sets tensors."""

    def choose(self, axes, batches):
        return Choice({key: len(axis) for key, axis in axes.items()})

    def initialize(self, axes, evidence):
        for axis in axes.values():
            axis.slots()[0].tensor.data.fill_(1)


def test_ranks_that_keep_all_trained_units_are_allowed():
    model = trained()
    before = outputs(model)
    begin(model, Grown())
    assert [len(axis) for axis in rank_axes(model).values()] == [6, 6, 6]
    torch.testing.assert_close(outputs(model), before)
    begin(model, UniformRanks(budget=21))
    begin(model, UniformRanks(budget=21))


def test_closed_units_of_a_trained_adapter_may_be_removed():
    model = trained()
    for axis in rank_axes(model).values():
        axis.close([3])
    before = outputs(model)
    begin(model, UniformRanks(budget=9))
    assert [len(axis) for axis in rank_axes(model).values()] == [3, 3, 3]
    torch.testing.assert_close(outputs(model), before)
    with pytest.raises(UserError, match="would keep 2 of 3 units"):
        begin(model, UniformRanks(budget=6))


def test_a_class_of_ones_own_that_sets_tensors_is_asked_as_well():
    with pytest.raises(UserError, match="Set would start the trained units"):
        begin(trained(), Set())
    begin(Toy(LORA4), Set())


def test_an_allocator_that_moves_ranks_goes_on_from_a_trained_adapter():
    begin(trained(), AdaLoRA(budget=6, every=4, warmup=6, final=6))


# ---- what counts as trained


@pytest.mark.parametrize("case", method_cases(), ids=lambda case: case.name)
def test_fresh_and_trained_units_are_told_apart_in_every_method(case):
    layer = case.methods[0](copy.deepcopy(case.base), **case.arguments)
    model = nn.Sequential(layer)
    axes = rank_axes(model).values()
    assert all(trained_layer(axis) is None for axis in axes)
    testing.perturb(layer)
    for axis in axes:
        assert trained_layer(axis) is (layer if layer.starts_at_base else None)


@pytest.mark.parametrize(
    "method",
    [partial(TensorTrain, init="released"), partial(LoKr, rank=4)],
    ids=["TensorTrain", "LoKr"],
)
def test_a_fresh_adapter_whose_closing_factors_are_not_zero_may_be_resized(method):
    model = Toy(method)
    sizes = [len(axis) for axis in rank_axes(model).values()]
    assert any(axis.closing()[0].tensor.any() for axis in rank_axes(model).values())

    class Halved(RankInitializer, registered=False):
        def choose(self, axes, batches):
            return Choice({key: (len(axis) + 1) // 2 for key, axis in axes.items()})

    begin(model, Halved())
    assert [len(axis) for axis in rank_axes(model).values()] == [(size + 1) // 2 for size in sizes]
