"""Controls: random moves, shuffled and uniform ranks, beside a recorded run or by themselves."""

import json
from collections import Counter
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import PHASES, TOTAL, Toy, fit, sizes
from test_planted_ranks import RANKS, Planted, ela, phases

from adaptrank._errors import UserError
from adaptrank.allocation import (
    ALLOCATORS,
    CONTROLS,
    AdaLoRA,
    ElaLoRA,
    RandomMoves,
    ShuffledRanks,
    UniformRanks,
)
from adaptrank.allocation.controls.random_moves import exchange_at_random, shuffled_units
from adaptrank.allocation.controls.recorded_run import Move
from adaptrank.allocation.plans import Resize
from adaptrank.artifacts.run import RunFiles
from adaptrank.axes import cost_model, rank_axes, rank_cost
from adaptrank.injection import apply_rank_pattern
from adaptrank.modules.settings import read_rank_pattern
from adaptrank.parameterizations import SVD

WIDTHS = (12, 12, 20)
"""Outputs of three layers. A unit of the last one costs more."""


def record(folder, allocator, model=None, steps=TOTAL):
    """Train with an allocator, and leave the files of the run."""
    folder.mkdir()
    model = Toy(widths=WIDTHS) if model is None else model
    fit(model, allocator, RunFiles(folder), steps=steps)
    return str(folder)


def counts(allocator):
    """(step, pruned, grown, closed, open units) of each event."""
    return [
        (
            event["step"],
            sum(map(len, event["pruned"].values())),
            sum(event["grown"].values()),
            sum(map(len, event["closed"].values())),
            event["active"],
        )
        for event in allocator.events
        if event["step"]
    ]


@pytest.fixture(scope="module")
def ela_run(tmp_path_factory):
    """Folder of a run with ElaLoRA."""
    return record(tmp_path_factory.mktemp("recorded") / "run", ElaLoRA(swaps=2, **PHASES))


RECORDED = {
    "ElaLoRA": lambda: ElaLoRA(swaps=2, **PHASES),
    "AdaLoRA": lambda: AdaLoRA(budget=6, **PHASES),
    "AdaLoRA hard": lambda: AdaLoRA(budget=6, soft=False, **PHASES),
}


@pytest.mark.parametrize("name", RECORDED)
def test_random_moves_are_as_many_at_the_same_steps(name, tmp_path):
    recorded = RECORDED[name]()
    folder = record(tmp_path / "run", recorded)
    control = RandomMoves(folder, floor=recorded.floor)
    fit(Toy(widths=WIDTHS), control)
    assert counts(control) == counts(recorded)


def test_the_seed_decides_where_to(ela_run):
    patterns = []
    for seed in (0, 0, 1):
        control = RandomMoves(ela_run, seed=seed)
        model = Toy(widths=WIDTHS)
        control.foresee(model, TOTAL)
        cost = rank_cost(control.run.axes)
        patterns.append(control.plan({}, cost, 12, 10))
    assert patterns[0] == patterns[1] != patterns[2]


def test_without_a_run_they_follow_the_schedule_of_elalora():
    control = RandomMoves(swaps=2, **PHASES)
    fit(Toy(), control)
    assert [event[:3] for event in counts(control)] == [(10, 2, 2), (14, 1, 1), (18, 0, 0)]
    assert {event["active"] for event in control.events} == {12}


def test_units_move_at_an_equal_cost_where_parameters_are_to_stay():
    control = RandomMoves(swaps=3, unit="parameters", **PHASES)
    model = Toy(widths=WIDTHS)
    before = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fit(model, control)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == before
    assert {event["parameters"] for event in control.events} == {before}
    # The layer whose units cost most has no other one to exchange with.
    assert sizes(model)["2:rank" if "2:rank" in sizes(model) else "maps.2:rank"] == 4
    assert any("found no axis" in event["reason"] for event in control.events)


def test_every_axis_has_the_same_chance():
    """1,200 draws: a share is off by less than four standard errors."""
    start = dict.fromkeys("abcd", 3)
    cost = rank_cost(start)
    lost, won = Counter(), Counter()
    for seed in range(1200):
        random = torch.Generator().manual_seed(seed)
        order = shuffled_units(start, {}, random)
        move = Move(1, 1, 1, 0, 12)
        plan = exchange_at_random(start, cost, 12, move, order, 0, {}, random).plan
        for axis, change in plan.items():
            assert isinstance(change, Resize)
            assert sum((len(change.keep) < 3, change.grow > 0)) == 1, "moved within an axis"
            lost[axis] += 3 - len(change.keep)
            won[axis] += change.grow
    bound = 4 * (1200 * 0.25 * 0.75) ** 0.5
    for axis in start:
        assert abs(lost[axis] - 300) < bound
        assert abs(won[axis] - 300) < bound


def test_random_moves_resume_bit_by_bit(tmp_path):
    def control():
        return RandomMoves(swaps=2, **PHASES)

    whole = Toy()
    saver = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=12, save_top_k=-1)
    fit(whole, control(), saver)
    resumed = Toy()
    ckpt = tmp_path / "epoch=0-step=12.ckpt"
    fit(resumed, control(), ckpt_path=str(ckpt))
    assert sizes(resumed) == sizes(whole)
    for have, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(have, want)


# ---- ranks to start from


def test_shuffled_ranks_keep_the_histogram_and_the_parameters(tmp_path):
    widths = (12,) * 5 + (20,) * 3
    found = dict(zip(sizes(Toy(widths=widths)), (0, 1, 2, 5, 7, 1, 4, 6), strict=True))
    (tmp_path / "ranks.json").write_text(json.dumps(found))
    patterns = set()
    for seed in range(4):
        model = Toy(widths=widths)
        fit(model, ShuffledRanks(str(tmp_path), seed=seed), steps=1)
        have = list(sizes(model).values())
        assert sorted(have[:5]) == [0, 1, 2, 5, 7]
        assert sorted(have[5:]) == [1, 4, 6]
        cost = cost_model(model)
        assert cost.total(sizes(model)) == cost.total(found)
        patterns.add(tuple(have))
    assert len(patterns) > 1


def test_uniform_ranks_are_as_equal_as_the_budget_allows(tmp_path):
    model = Toy(widths=WIDTHS)
    fit(model, UniformRanks(7), steps=1)
    assert sorted(sizes(model).values()) == [2, 2, 3]
    found = dict(zip(sizes(model), (1, 1, 6), strict=True))
    (tmp_path / "ranks.json").write_text(json.dumps(found))
    of_ranks, of_parameters = Toy(widths=WIDTHS), Toy(widths=WIDTHS)
    fit(of_ranks, UniformRanks(run=str(tmp_path)), steps=1)
    assert sorted(sizes(of_ranks).values()) == [2, 3, 3]
    fit(of_parameters, UniformRanks(run=str(tmp_path), unit="parameters"), steps=1)
    total = cost_model(of_parameters).total(sizes(of_parameters))
    assert 277 - 37 < total <= 277  # a unit costs 37 at most
    assert set(sizes(of_parameters).values()) <= {2, 3}


def test_scarce_uniform_units_are_drawn_by_the_seed():
    places = []
    for seed in (0, 0, 1, 2, 3):
        model = Toy(widths=(12,) * 6)
        fit(model, UniformRanks(2, seed=seed), steps=1)
        ranks = list(sizes(model).values())
        assert sorted(ranks) == [0, 0, 0, 0, 1, 1]
        places.append(tuple(ranks))
    assert places[0] == places[1]
    assert len(set(places)) > 2


def test_a_rank_pattern_is_read_from_the_folder_of_a_run(ela_run, tmp_path):
    assert read_rank_pattern(ela_run) == read_rank_pattern(f"{ela_run}/ranks.json")
    with pytest.raises(FileNotFoundError, match=r"ranks.json.*a run's folder"):
        read_rank_pattern(str(tmp_path))


# ---- planted ranks


def error_of(steps, *callbacks, pattern=None):
    """The error of a fit of planted targets, with ranks of 3 or of a pattern."""
    model = Planted("SVD", 0, 3)
    if pattern is not None:
        apply_rank_pattern(model, read_rank_pattern(pattern))
    fit(model, *callbacks, steps=steps)
    return model.error()


def test_planted_ranks_fit_better_than_the_same_ranks_elsewhere(tmp_path):
    planted = dict(zip(sizes(Planted("SVD", 0, 1)), RANKS, strict=True))
    (tmp_path / "ranks.json").write_text(json.dumps(planted))
    replayed = error_of(50, pattern=str(tmp_path))
    assert replayed < 0.95 * error_of(50, ShuffledRanks(str(tmp_path)))


@pytest.mark.tables
def test_what_elalora_finds_is_no_accident(tmp_path):
    """ElaLoRA's pattern fits planted targets. Shuffled, or found by random moves, it does not."""
    folder = record(tmp_path / "run", ela("sensitivity"), Planted("SVD", 0, 3), 1500)
    replayed = error_of(1500, pattern=folder)
    assert replayed < 0.6 * error_of(1500, ShuffledRanks(folder))
    assert replayed < 0.6 * error_of(1500, RandomMoves(folder, floor=1))


@pytest.mark.tables
@pytest.mark.parametrize("seed", range(5))
def test_random_moves_find_no_planted_rank(seed):
    model = Planted("SVD", seed, 3)
    fit(model, RandomMoves(swaps=4, seed=seed, **phases(25, 1)), steps=1500)
    found = list(sizes(model.maps).values())
    assert sum(found) == 18
    assert sum(abs(a - b) for a, b in zip(found, RANKS, strict=True)) >= 6


# ---- what is refused


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda run: RandomMoves("nowhere/0"), r"run='nowhere/0' is no folder. Name the folder"),
        (lambda run: RandomMoves(run, every=3, swaps=1), r"Leave swaps, every out, or leave"),
        (lambda run: RandomMoves(swaps=0), r"swaps=0: move at least 1 unit"),
        (lambda run: ShuffledRanks(run + "/adapter"), r"holds no ranks.json: no rank axis"),
        (lambda run: UniformRanks(), r"budget=None, run=None: give one of the two"),
        (lambda run: UniformRanks(6, run), r"budget=6, run='.*': give one of the two"),
        (lambda run: RandomMoves(run, floor=-1), r"floor is at least 0"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(make, sentence, ela_run):
    with pytest.raises(UserError, match=sentence) as said:
        make(ela_run)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("make", "model", "steps", "sentence"),
    [
        (RandomMoves, lambda: Toy(partial(SVD, rank=3)), 24, "starts with 12 units, and this one"),
        (RandomMoves, Toy, 15, "moved units up to step 18, and this one has 15 steps"),
        (ShuffledRanks, lambda: Toy(widths=(12, 12)), 24, "has 3 axes, and this model has 2"),
    ],
)
def test_a_recorded_run_of_another_kind_is_refused(make, model, steps, sentence, ela_run):
    with pytest.raises(UserError, match=sentence) as said:
        fit(model(), make(ela_run), steps=steps)
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "does not begin with the sizes at the start"),
        ("[1]\n", "line 1: this is no JSON mapping"),
        ('{"step": 0, "active": "x"}\n{"step": 1, "active": 3, "grown": {"a": 1}}\n', "active is"),
        ('{"step": 0, "active": 3}\n{"step": 1, "active": 3}\n', "No unit moved in the run"),
        ('{"step": 0, "active": 3}\n{"step": 1, "active": 3, "grown": 1}\n', "grown is 1"),
    ],
)
def test_a_damaged_record_is_named(text, sentence, tmp_path):
    (tmp_path / "ranks.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence):
        RandomMoves(str(tmp_path))


def test_controls_are_no_methods():
    assert set(CONTROLS) == {"RandomMoves", "ShuffledRanks", "UniformRanks"}
    assert not set(CONTROLS) & set(ALLOCATORS)
    assert all(not cls.source for cls in CONTROLS.values())
    assert rank_axes(Toy())  # the toy has what they move
