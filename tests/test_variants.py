"""A rule that decides otherwise than the published one carries a name of its own."""

import json

import pytest
from fixture_cases import STOP, TOTAL, Run
from jsonargparse import ArgumentParser

from adaptrank.allocation import (
    ALLOCATORS,
    AdaLoRA,
    DyLoRA,
    DynamicRank,
    ElaLoRA,
    GoRA,
    Participant,
    SubLoRA,
)
from adaptrank.allocation.initial.eva import EVA
from adaptrank.artifacts.run import RunFiles
from adaptrank.checkpoints.other_runs import compare_allocators
from adaptrank.cli.verbs.methods import describe_allocator
from adaptrank.reports.history import read_history
from adaptrank.reports.ranks import page

TITLES = {
    "ElaLoRA (two pools)": lambda: ElaLoRA(),
    "ElaLoRA": lambda: ElaLoRA(rule="published"),
    "SubLoRA (Fisher)": lambda: SubLoRA(),
    "SubLoRA": lambda: SubLoRA(rule="published"),
    "SubLoRA (Fisher within each axis)": lambda: SubLoRA(rule="block"),
    "AdaLoRA": lambda: AdaLoRA(),
    "GoRA (exact total)": lambda: GoRA(),
    "GoRA": lambda: GoRA(share="reference"),
    "DyLoRA": lambda: DyLoRA(),
    "DyLoRA (drawn units only)": lambda: DyLoRA(rule="drawn"),
    "DynamicRank": lambda: DynamicRank(),
    "DynamicRank (early)": lambda: DynamicRank(rule="early"),
}
EARLIER = {
    "ElaLoRA": ({"two_pools": False}, {"rule": "published"}),
    "SubLoRA": ({"estimator": "exact"}, {"rule": "published"}),
}
"""Class -> an argument under its earlier name, and the same as it is named now."""


@pytest.mark.parametrize("title", TITLES)
def test_a_title_says_which_rule_it_is(title):
    allocator = TITLES[title]()
    assert allocator.title == title
    assert allocator.label == type(allocator).__name__, "the name in errors and checkpoints"


@pytest.mark.parametrize("name", ALLOCATORS)
def test_the_table_of_methods_has_the_title_of_the_default(name):
    described = describe_allocator(ALLOCATORS[name])
    assert described["name"] == name
    if ALLOCATORS[name].__module__.startswith("adaptrank."):
        assert described["title"] == ALLOCATORS[name]().title


@pytest.mark.parametrize("name", EARLIER)
def test_an_earlier_name_warns_and_means_the_same(name):
    earlier, now = EARLIER[name]
    with pytest.warns(FutureWarning, match=rf"{name}\(.*\) is {name}\(rule='published'\) now"):
        old = ALLOCATORS[name](**earlier)
    assert old.init_args == ALLOCATORS[name](**now).init_args
    assert old.title == name


@pytest.mark.parametrize("name", EARLIER)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_configuration_may_have_the_earlier_name(name):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Participant, "allocator")
    class_path = f"{ALLOCATORS[name].__module__}.{name}"
    text = json.dumps({"allocator": {"class_path": class_path, "init_args": EARLIER[name][0]}})
    allocator = parser.instantiate(parser.parse_string(text)).allocator
    assert allocator.init_args == ALLOCATORS[name](**EARLIER[name][1]).init_args


@pytest.mark.parametrize("name", EARLIER)
def test_a_record_with_the_earlier_name_is_compared_by_its_meaning(name):
    earlier, now = EARLIER[name]
    cls = ALLOCATORS[name]
    arguments = {key: value for key, value in cls().init_args.items() if key != "rule"}
    stored = [{"class": name, "init_args": {**arguments, **earlier}}]
    assert compare_allocators([cls(**now).describe_allocator()], stored) == []
    (difference,) = compare_allocators([cls().describe_allocator()], stored)
    assert difference.clause.startswith("rule of")
    assert "'published' in the checkpoint" in difference.clause


def test_a_dynamic_rank_that_was_stored_before_it_had_rules_is_early_and_hard():
    arguments = DynamicRank().init_args
    arguments = {name: arguments[name] for name in arguments if name not in ("rule", "soft")}
    stored = [{"class": "DynamicRank", "init_args": arguments}]
    same = DynamicRank(rule="early", soft=False)
    assert compare_allocators([same.describe_allocator()], stored) == []
    names = {d.name for d in compare_allocators([DynamicRank().describe_allocator()], stored)}
    assert names == {"rule", "soft"}


def stored_run(rule):
    """Return the checkpoint of a run of an earlier version, which recorded `two_pools`."""
    run = Run("elalora")
    run.allocators = [ElaLoRA(swaps=3, every=2, warmup=2, final=2, rule=rule)]
    run.start()
    run.train(until=STOP)
    checkpoint = run.checkpoint()
    arguments = checkpoint["allocators"][0]["run"]["init_args"]
    arguments["two_pools"] = arguments.pop("rule") == "two_pools"
    return checkpoint


@pytest.mark.parametrize("rule", ["two_pools", "published"])
def test_a_stored_run_goes_on_under_the_rule_that_it_had(rule):
    checkpoint = stored_run(rule)
    for now in ("two_pools", "published"):
        run = Run("elalora")
        run.allocators = [ElaLoRA(swaps=3, every=2, warmup=2, final=2, rule=now)]
        run.restore(checkpoint, STOP)
        if now == rule:
            run.start()
            run.train(until=TOTAL)
        else:
            with pytest.raises(ValueError, match=f"rule is '{now}' here and '{rule}' in"):
                run.start()


def test_the_event_of_a_rank_initializer_has_its_title():
    run = Run("eva")
    run.allocators = [EVA(max_batches=2)]
    run.start()
    assert run.allocators[0].events[0]["reason"].endswith("by EVA")


class _Trainer:
    """What `RunFiles` reads of a trainer when training starts."""

    global_step, is_global_zero = 0, True

    def __init__(self, *callbacks):
        self.callbacks = list(callbacks)


def test_the_first_line_of_ranks_and_the_report_name_the_variant(tmp_path):
    run = Run("elalora")
    run.start()
    files = RunFiles(tmp_path)
    files.on_train_start(_Trainer(*run.allocators, files), run.model)
    first = json.loads((tmp_path / "ranks.jsonl").read_text().splitlines()[0])
    assert first["allocators"] == ["ElaLoRA (two pools)"]
    text = page(read_history(tmp_path), {}, "a command")
    assert text.count("ElaLoRA (two pools)") >= 2, "the heading and the title of the window"
    del first["allocators"]
    (tmp_path / "ranks.jsonl").write_text(json.dumps(first) + "\n")
    assert "ElaLoRA" not in page(read_history(tmp_path), {}, "a command")


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (ElaLoRA, {"rule": "published", "two_pools": True}),
        (SubLoRA, {"rule": "published", "estimator": "fisher"}),
    ],
)
def test_a_previous_name_does_not_override_another_rule(cls, arguments):
    with pytest.raises(
        ValueError, match=r"and rule='published' was given as well; leave \w+=\S+ out"
    ):
        cls(**arguments)
