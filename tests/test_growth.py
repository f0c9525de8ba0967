"""Parameters under a budget in ranks, and ElaLoRA's cool-down."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import PHASES, Toy, fit, sizes

from adaptrank.allocation import AdaLoRA, ElaLoRA, parameter_growth, possible_growth
from adaptrank.allocation.plans import exchange
from adaptrank.axes import rank_cost

WIDTHS = (12, 12, 40)
"""Outputs of three layers. A unit of the last one costs twice as much."""


class ToTheLast(ElaLoRA):
    """Scores that grow with the position of the axis, so that units go to the last one."""

    def score_units(self, state, axes):
        return {key: torch.full((len(a),), float(i)) for i, (key, a) in enumerate(axes.items())}


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_warning_has_both_figures_where_parameters_grew(caplog):
    model, allocator = Toy(widths=WIDTHS), ToTheLast(swaps=2, **PHASES)
    before = trained(model)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        fit(model, allocator)
    after = trained(model)
    assert after > before
    (sentence,) = [r.getMessage() for r in caplog.records if "grew" in r.getMessage()]
    assert f"from {before:,} to {after:,} ({after / before - 1:+.1%})" in sentence
    assert "ends with 12 units of 12" in sentence
    assert sentence == parameter_growth(allocator)


@pytest.mark.parametrize(
    "allocator",
    [ToTheLast(swaps=2, unit="parameters", **PHASES), AdaLoRA(budget=6, **PHASES)],
    ids=["parameters", "pruned"],
)
def test_there_is_none_where_they_did_not(allocator, caplog):
    with caplog.at_level(logging.WARNING, "adaptrank"):
        fit(Toy(widths=WIDTHS), allocator)
    assert "grew" not in caplog.text
    assert parameter_growth(allocator) == ""


def test_events_have_the_parameters_beside_the_ranks():
    model, allocator = Toy(widths=WIDTHS), AdaLoRA(budget=6, **PHASES)
    start = trained(model)
    fit(model, allocator)
    first, *_, last = allocator.events
    assert first["allocated_parameters"] == start > first["parameters"]  # closed units
    assert last["parameters"] == last["allocated_parameters"] == trained(model)
    change = f"{start:,} -> {first['parameters']:,} parameters"
    assert first["reason"].endswith(change)


def test_the_bound_that_is_foreseen_holds():
    model, allocator = Toy(widths=WIDTHS), ToTheLast(swaps=2, **PHASES)
    allocator.foresee(model, 24)
    sentence = possible_growth(allocator)
    start = trained(model)
    fit(model, allocator)
    # Two layers of 12 outputs and one of 40, with 16 inputs: a unit has in + out + 1 numbers.
    bound = 2 * (16 + 12 + 1) + 10 * (16 + 40 + 1)
    assert f"from {start:,} to at most {bound:,}" in sentence
    assert trained(model) <= bound
    pruner = AdaLoRA(budget=6, **PHASES)
    pruner.foresee(Toy(widths=WIDTHS), 24)
    assert possible_growth(pruner) == ""


# ---- ElaLoRA's cool-down


def test_a_held_unit_is_in_no_pool():
    scores = {"a": torch.tensor([0.0, 1.0, 2.0]), "b": torch.tensor([5.0, 6.0, 7.0])}
    free = exchange(scores, rank_cost(scores), 6, 1)
    held = exchange(scores, rank_cost(scores), 6, 1, held={"a": [0], "b": [0]})
    assert free["a"].keep == (1, 2)
    assert held["a"].keep == (0, 2)
    assert free["b"].grow == held["b"].grow == 1
    every = {"a": [0, 1, 2], "b": [0, 1, 2]}
    assert exchange(scores, rank_cost(scores), 6, 1, held=every) == {}


class Fresh(ElaLoRA):
    """Fresh units have the lowest score, and the axes take turns."""

    def init_state(self, axes):
        state = super().init_state(axes)
        for number, axis in enumerate(axes.values()):
            state.track(axis, "worth", torch.arange(len(axis)) + 10.0 * number + 1)
        return state

    def score_units(self, state, axes):
        return {key: state.track(axis, "worth", torch.zeros(0)) for key, axis in axes.items()}


@pytest.mark.parametrize(("cooldown", "renewed"), [(0, True), (1, True), (9, False)])
def test_a_fresh_unit_stays_for_as_many_events(cooldown, renewed):
    """Units that were grown stand last in their axis."""
    allocator = Fresh(swaps=1, every=2, warmup=2, final=2, cooldown=cooldown)
    fit(Toy(widths=(12, 12, 12)), allocator, steps=20)
    age: dict[str, list[int]] = {}
    lost = []
    for event in allocator.events:
        for key, units in event["pruned"].items():
            ages = age.setdefault(key, [100] * 4)
            lost += [ages[unit] for unit in units]
            age[key] = [a for unit, a in enumerate(ages) if unit not in units]
        age = {key: [a + 1 for a in ages] for key, ages in age.items()}
        for key, count in event["grown"].items():
            age.setdefault(key, [100] * 4).extend([0] * count)
    # A unit that lived through no event before this one has the age 0.
    assert all(a >= cooldown for a in lost)
    assert any(a < 100 for a in lost) == renewed


def test_without_a_cooldown_nothing_is_kept_and_with_one_a_resume_is_exact(tmp_path):
    def make():
        return ElaLoRA(swaps=2, cooldown=1, **PHASES)

    whole, allocator = Toy(), make()
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=12, save_top_k=-1)
    fit(whole, allocator, saver)
    resumed = Toy()
    fit(resumed, make(), ckpt_path=str(tmp_path / "epoch=0-step=12.ckpt"))
    assert sizes(resumed) == sizes(whole)
    for have, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(have, want)
    model, plain = Toy(), ElaLoRA(swaps=2, **PHASES)
    plain.start(model, torch.optim.Adam(model.parameters()), 24)
    assert not plain.engine.state
    with pytest.raises(ValueError, match="cooldown=-1"):
        ElaLoRA(cooldown=-1)
