"""Studies.

Files are read and checked. Budgets are solved exactly. Learning rates are selected on other data.
No run is done twice. The report says what came out.
"""

import contextlib
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_cli import cli, here, write  # noqa: F401

from adaptrank._errors import UserError
from adaptrank.cli import main
from adaptrank.cli.verbs.compare import counting
from adaptrank.reports.comparison import pareto, rows
from adaptrank.reports.study import markdown, page, write_study
from adaptrank.studies import (
    find_place,
    on_this_machine,
    read_study,
    reported_points,
    run_study,
    set_place,
    solve_budget,
    solve_settings,
    trial_points,
)
from adaptrank.studies.inputs import read_inputs
from adaptrank.studies.overlays import map_texts, merge, set_at

STUDIES = sorted(Path(__file__).parents[1].joinpath("configs/studies").glob("*.yaml"))


# ---- what a file asks for


def study(tmp_path, **changes):
    said = {
        "config": {
            "model": {"init_args": {"rank": 8, "optimizer": {"init_args": {"lr": 0.1}}}},
            "trainer": {"max_steps": 4},
        },
        "methods": {
            "A": {"model": {"init_args": {"rank": "$budget"}}},
            "B": {"model": {"init_args": {"rank": 3}}},
        },
        "budgets": [100, 250],
        "lrs": [0.1, 0.01],
        "seeds": [0, 1],
        "selection": {"overlay": {"data": {"slice": True}}, "metric": "loss"},
        "metric": "accuracy",
        "baseline": "A",
    }
    said |= changes
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in said.items() if v is not None}))
    return file


def linear(config):
    """Return 30 parameters for each unit."""
    return 30 * config["model"]["init_args"]["rank"]


def test_places_are_solved_to_the_largest_not_above_the_budget(tmp_path):
    found = list(solve_settings(read_study(study(tmp_path)), linear))
    assert [(p.method, p.budget, p.units, p.parameters) for p in found] == [
        ("A", 100, 3, 90),
        ("A", 250, 8, 240),
        ("B", 100, None, 90),  # fixed: once, at the smallest budget it fits
    ]
    assert found[1].config["model"]["init_args"]["rank"] == 8
    assert found[1].config["model"]["init_args"]["optimizer"] == {"init_args": {"lr": 0.1}}


@given(st.integers(1, 50), st.integers(0, 40), st.integers(1, 5000), st.integers(1, 300))
def test_solving(slope, fixed, budget, ceiling):
    def count(config):
        if config["k"] > ceiling:
            raise ValueError("too large")
        return fixed + slope * config["k"]

    found = solve_budget({"k": "$budget"}, budget, count)
    fits = [k for k in range(1, ceiling + 1) if fixed + slope * k <= budget]
    if fits:
        assert found[0] == min(max(fits), 1 << 14)
        assert found[1] == fixed + slope * found[0]
    else:
        assert "already 1 takes" in found


def test_what_no_integer_fits_is_said(tmp_path):
    found = list(solve_settings(read_study(study(tmp_path, budgets=[20])), linear))
    assert found == [
        "A, none, 20: already 1 takes 30 parameters",
        "B has 90 parameters at any budget, above all of them",
    ]


def test_trials_and_reported_runs(tmp_path):
    asked = read_study(study(tmp_path))
    place = next(iter(solve_settings(asked, linear)))
    tried = trial_points(asked, place)
    assert [(p.lr, p.seed, p.trial) for p in tried] == [(0.1, 0, True), (0.01, 0, True)]
    assert all(p.config["data"]["slice"] for p in tried)
    assert tried[1].config["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.01
    final = reported_points(asked, place, 0.01)
    found = [
        (p.seed, p.config["seed_everything"], p.config["data"]["init_args"]["seed"]) for p in final
    ]
    assert found == [(0, 0, 0), (1, 1, 1)]
    assert len({p.key for p in [*tried, *final]}) == 4
    assert trial_points(replace(asked, lrs=[0.1]), place) == []


def test_overlays():
    base = {"a": {"class_path": "X", "init_args": {"p": 1, "q": [1, 2]}}, "b": 1}
    assert merge(base, {"a": {"init_args": {"p": 2}}}) == {
        "a": {"class_path": "X", "init_args": {"p": 2, "q": [1, 2]}},
        "b": 1,
    }
    assert merge(base, {"a": {"class_path": "Y"}})["a"] == {"class_path": "Y"}
    assert merge(base, {"a": {"init_args": {"q": [3]}}})["a"]["init_args"]["q"] == [3]
    assert base["a"]["init_args"] == {"p": 1, "q": [1, 2]}
    assert set_at(base, "c.d", 1)["c"] == {"d": 1}
    assert map_texts({"x": ["$data/a", 1]}, lambda text: text.replace("$data", "/d")) == {
        "x": ["/d/a", 1]
    }


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budget": [1]}, r"'budget' is no key of a study. Did you mean 'budgets'"),
        ({"metric": None}, "a study needs the key 'metric'"),
        ({"mode": "up"}, "mode is 'max' or 'min', not 'up'"),
        ({"lrs": ["1e-3"]}, "lrs is a list of numbers. YAML reads 1e-3 as a text"),
        ({"baseline": "C"}, "baseline 'C' is none of the methods"),
        ({"selection": None}, "several lrs are selected by trials: selection needs an overlay"),
        ({"selection": {"mod": "max"}}, "selection: 'mod' is none of overlay, metric, mode"),
        ({"selection": {"mode": "up"}}, "selection: mode is 'max' or 'min', not 'up'"),
        ({"selection": {"seeds": []}}, "selection: seeds is a list of whole numbers"),
        ({"selection": {"seeds": [1, 1]}}, "selection: seeds has the same number twice"),
        ({"selection": [1]}, "selection is a table with overlay, metric, mode, name, seeds"),
        ({"budgets": None}, r"A has \$budget, and the study no budgets"),
        (
            {"overlay": {"data": "$data/x"}},
            r"reads data from \$data. Say where they are with --data.root",
        ),
        ({"config": "missing.yaml"}, "there is no configuration"),
        ({"methods": {}}, "methods names none"),
        ({"grid": {"trainer.max_steps": 3}}, "grid: trainer.max_steps needs a list of values"),
        ({"grid": {"trainer.max_steps": [3, 3]}}, "has the same value twice"),
        ({"search": {"trials": 2, "low": 0.1, "high": 1}}, "lrs and search both choose"),
        ({"lrs": None, "search": {"trials": 0}}, "trials is a number of runs, 1 or more"),
        ({"lrs": None, "search": {"trials": 2, "low": 1, "high": 0.1}}, "low 1 is not below high"),
        ({"lrs": None, "search": {"trails": 2}}, "'trails' is none of trials, low, high, seed"),
        ({"sums": {"S": {"of": ["A"]}}}, "of names two methods or more"),
        ({"sums": {"S": {"of": ["A", "C"]}}}, "'C' is none of the methods"),
        ({"sums": {"A": {"of": ["A", "B"]}}}, "is the name of a method as well"),
        ({"sums": {"S": {"of": ["A", "B"], "weights": [1]}}}, "one number for each of 2"),
    ],
)
def test_a_wrong_study_says_what_is_wrong(tmp_path, changes, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as said:
        read_study(study(tmp_path, **changes))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize("file", STUDIES, ids=lambda f: f.stem)
def test_the_studies_of_the_folder_are_studies(file, tmp_path):
    asked = read_study(file, data=str(tmp_path))
    assert asked.limits
    assert asked.baseline in (None, *asked.methods)
    for setting in solve_settings(asked, lambda config: 1):
        fixed = setting.config["model"]["init_args"].get("dtype")
        assert fixed in ("bf16", "fp32")  # two machines may take "auto" for two dtypes


# ---- running


class Counted:
    """Engine that makes up results and counts the runs."""

    def __init__(self, fail=()):
        self.ran, self.fail = [], fail

    def __call__(self, function, points, out):
        for point in points:
            self.ran.append(point.key)
            failed = point.method in self.fail
            value = (
                0.5
                + 0.1 * point.seed
                + (0.2 if point.method == "A" else 0)
                + (point.budget or 0) / 10**4
            )
            result = {
                "key": point.key,
                "method": point.method,
                "allocator": point.allocator,
                "budget": point.budget,
                "units": point.units,
                "lr": point.lr,
                "seed": point.seed,
                "trial": point.trial,
                "adapter_params_at_start": point.parameters,
                "status": "failed" if failed else "success",
                "error": "it broke" if failed else "",
                "metrics": {}
                if failed
                else {"accuracy": value, "loss": abs(math.log10(point.lr or 0.01) + 2)},
                "num_trainable_params": point.parameters,
                "num_total_params": 1000,
                "train_time": 2.0,
                "units_final": 3,
                "units_peak": 4,
                "accelerator_memory_max": 2**30,
                "file_size": 1000,
                "ranks": {"layers.0.q:rank": 2, "layers.1.q:rank": 1},
            }
            folder = out / "points" / point.key
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text(json.dumps(result))
            yield result


def test_nothing_that_is_finished_runs_twice_and_what_failed_does(tmp_path):
    asked = read_study(study(tmp_path))
    engine = Counted(fail=("B",))
    record = run_study(asked, tmp_path / "out", linear, engine, lambda line: None)
    assert len(engine.ran) == 3 * 2 + 3 * 2
    assert {r["lr"] for r in record["results"] if r["method"] == "A"} == {0.01}, (
        "the better of the trials"
    )
    assert {r["lr"] for r in record["results"] if r["method"] == "B"} == {0.1}, (
        "all trials failed: the middle one"
    )
    assert sum(r["status"] == "failed" for r in record["results"]) == 2
    again = Counted()
    record = run_study(asked, tmp_path / "out", linear, again, lambda line: None)
    assert all(key.startswith("B") for key in again.ran)
    assert not any(r["status"] == "failed" for r in record["results"])
    last = Counted()
    run_study(asked, tmp_path / "out", linear, last, lambda line: None)
    assert not last.ran
    more = Counted()
    run_study(replace(asked, seeds=[0, 1, 2]), tmp_path / "out", linear, more, lambda line: None)
    assert len(more.ran) == 3, "a further seed"


def made(tmp_path, fail=(), **changes):
    return run_study(
        read_study(study(tmp_path, **changes)),
        tmp_path / "out",
        linear,
        Counted(fail),
        lambda line: None,
    )


def test_rows_have_means_deviations_and_paired_tests(tmp_path):
    found = rows(made(tmp_path, seeds=[0, 1, 2]))
    first = found[0]
    assert first["method"] == "A"
    assert math.isclose(first["metric"], statistics.mean([0.71, 0.81, 0.91]))
    assert math.isclose(first["deviation"], statistics.stdev([0.71, 0.81, 0.91]))
    other = next(row for row in found if row["method"] == "B")
    assert math.isclose(other["difference"], -0.2)
    assert first["p"] is None
    assert [row["seeds"] for row in found] == [3, 3, 3]


def test_finished_runs_are_compared_with_another_baseline(tmp_path, cli):  # noqa: F811
    made(tmp_path, seeds=[0, 1, 2])
    call = ("compare", tmp_path / "study.yaml", "--out", tmp_path / "out", "--report")
    differences = {}
    for baseline in ("A", "B"):
        code, _, err = cli(*call, "--baseline", baseline)
        assert code == 0, err
        table = json.loads((tmp_path / "out/report/table.json").read_text())
        differences[baseline] = {(row["method"], row["budget"]): row["difference"] for row in table}
    (budget,) = {budget for method, budget in differences["A"] if method == "B"}
    difference = differences["A"]["B", budget]
    assert difference == pytest.approx(-0.2)
    assert differences["B"]["A", budget] == pytest.approx(-difference)
    assert differences["A"]["A", budget] is differences["B"]["B", budget] is None
    code, _, err = cli(*call, "--baseline", "b")
    assert code == 2
    assert "baseline 'b' is none of the methods, which are 'A', 'B'." in err


def grid_study(tmp_path, **changes):
    said = {
        "methods": {"A": {}},
        "grid": {"model.rank": [4, 8], "trainer.max_steps": [1, 2, 3]},
        "budgets": None,
        "lrs": None,
        "selection": None,
        "baseline": None,
    }
    return study(tmp_path, **{**said, **changes})


def test_a_grid_is_every_combination_and_tells_the_edge_of_its_best(tmp_path):
    asked = read_study(grid_study(tmp_path))
    found = list(solve_settings(asked, linear))
    pairs = [
        (s.config["model"]["init_args"]["rank"], s.config["trainer"]["max_steps"]) for s in found
    ]
    assert pairs == [(rank, steps) for rank in (4, 8) for steps in (1, 2, 3)]
    assert [s.parameters for s in found] == [120] * 3 + [240] * 3
    record = run_study(asked, tmp_path / "out", linear, Graded(), lambda line: None)
    table = rows(record)
    assert len(table) == 6
    assert all(row["seeds"] == 2 for row in table)
    text = markdown(record, table)
    assert "| A, rank=8, max_steps=2 | - |" in text
    assert "the best of 6 points by accuracy is rank=8, max_steps=2" in text
    assert "rank=8 is the largest that was tried. Try larger ones." in text
    assert "max_steps=2 is" not in text
    assert "chosen on the data that is reported on" in text
    again = Graded()
    run_study(asked, tmp_path / "out", linear, again, lambda line: None)
    assert not again.ran


def test_a_selected_rate_at_the_edge_of_those_tried_is_told(tmp_path):
    edge = made(tmp_path, lrs=[0.01, 0.001])
    assert "the chosen learning rate 0.01 is the largest that was tried." in markdown(
        edge, rows(edge)
    )
    inside = made(tmp_path, lrs=[0.1, 0.01, 0.001])
    assert "that was tried" not in markdown(inside, rows(inside))


class Unsteady(Counted):
    """Rate 0.1 is better with the first seed, and fails or is worse with the second one."""

    losses = {(0.1, 0): 0.1, (0.1, 1): 0.9, (0.01, 0): 0.3, (0.01, 1): 0.3}
    missing = ()

    def __call__(self, run, points, out):
        for result in super().__call__(run, points, out):
            if result["trial"]:
                tried = (result["lr"], result["seed"])
                result["metrics"] = {"loss": self.losses[tried]}
                if tried in self.missing:
                    result |= {"metrics": {}, "status": "failed", "error": "broken"}
                (out / "points" / result["key"] / "result.json").write_text(json.dumps(result))
            yield result


class Failing(Unsteady):
    losses = {**Unsteady.losses, (0.1, 1): 0.1}
    missing = ((0.1, 1),)


def test_the_report_has_the_trials_by_rate(tmp_path):
    asked = read_study(study(tmp_path, lrs=[0.01, 0.1]))
    asked = replace(asked, selection={**asked.selection, "seeds": [0, 1]})
    record = run_study(asked, tmp_path / "out", linear, Failing(), lambda line: None)
    text = markdown(record, rows(record))
    assert "| method | 0.01 | 0.1 |\n|---|---:|---:|\n" in text
    assert "| A, 100 | **0.300** | 0.100 (1 failed) |" in text
    html = page(record, rows(record), {})
    assert '<td>A, 100</td><td class="n"><b>0.300</b></td>' in html
    many = [{**record["trials"][0], "lr": 0.001 * (k + 1)} for k in range(20)]
    assert "| method | 0.001" not in markdown(record | {"trials": many}, rows(record))


@pytest.mark.parametrize("engine", [Unsteady, Failing])
def test_several_seeds_of_the_trials_see_what_one_does_not(tmp_path, engine):
    def chosen(name, **selection):
        said = {"overlay": {"data": {"slice": True}}, "metric": "loss", **selection}
        asked = read_study(study(tmp_path, methods={"A": {}}, budgets=None, selection=said))
        record = run_study(asked, tmp_path / name, linear, engine(), lambda line: None)
        return record, {result["lr"] for result in record["results"]}

    one, lrs = chosen("one")
    assert lrs == {0.1}
    assert len(one["trials"]) == 2
    several, lrs = chosen("several", seeds=[0, 1])
    assert lrs == {0.01}
    assert len(several["trials"]) == 4
    text = markdown(several, rows(several))
    assert "by 2 trials for each row (0.1, 0.01) with each of the seeds 0, 1." in text
    assert "with each of the seeds" not in markdown(one, rows(one))


@pytest.mark.parametrize("key", ["model.rnak.x", "model.rank.x", "nothing.at.all.0", ""])
def test_a_key_of_a_grid_that_leads_nowhere(tmp_path, key):
    asked = read_study(grid_study(tmp_path, grid={key: [1, 2]}))
    with contextlib.suppress(UserError):
        for setting in solve_settings(asked, lambda config: 1):
            assert setting.config["model"]["init_args"]["rank"] == 8


def test_short_keys_find_their_place():
    lora = {"class_path": "LoRA", "init_args": {"rank": 2}}
    arguments = {"adapters": [{"parameterization": ["HyperAdapt", lora]}], "seed": 1}
    config = {"model": {"class_path": "CausalLM", "init_args": arguments}, "data": "Problems"}
    rank = ("model", "init_args", "adapters", 0, "parameterization", 1, "init_args", "rank")
    for key in ("model.adapters.0.parameterization.1.rank", "model.adapters.0.rank", "model.rank"):
        assert find_place(config, key) == rank, key
    takes = {("HyperAdapt", "init"), ("CausalLM", "warmup")}
    place = find_place(config, "model.init", lambda *pair: pair in takes)
    changed = set_place(config, place, 1)
    nest = changed["model"]["init_args"]["adapters"][0]["parameterization"]
    assert nest == [{"class_path": "HyperAdapt", "init_args": {"init": 1}}, lora]
    place = find_place(config, "model.warmup", lambda *pair: pair in takes)
    assert place == ("model", "init_args", "warmup")
    assert find_place(config, "trainer.max_steps") == ("trainer", "max_steps")
    assert set_place(config, ("data", "init_args", "x"), 1)["data"] == {
        "class_path": "Problems",
        "init_args": {"x": 1},
    }
    two = set_place(config, ("model", "init_args", "adapters", 0, "parameterization", 0), lora)
    with pytest.raises(UserError, match=r"may be .*Write one of them"):
        find_place(two, "model.rank")
    with pytest.raises(UserError, match="the list there has 1 item"):
        find_place(config, "model.adapters.1.rank")


def test_a_search_is_seeded_equal_for_all_and_goes_on(tmp_path):
    pytest.importorskip("optuna")
    search = {"trials": 5, "low": 0.0001, "high": 1.0, "seed": 3}
    file = study(tmp_path, lrs=None, search=search)
    engine = Counted()
    record = run_study(read_study(file), tmp_path / "out", linear, engine, lambda line: None)
    assert len(record["trials"]) == 3 * 5
    rates = {}
    for trial in record["trials"]:
        rates.setdefault((trial["method"], trial["budget"]), []).append(trial["lr"])
    assert all(len(set(tried)) == 5 for tried in rates.values())
    assert all(0.0001 <= rate <= 1 for tried in rates.values() for rate in tried)
    best = min(rates["A", 100], key=lambda rate: abs(math.log10(rate) + 2))
    assert {r["lr"] for r in record["results"] if r["budget"] == 100} == {best}
    assert "5 trials for each row, which Optuna proposed" in markdown(record, rows(record))
    # What is gone is proposed again, and nothing else runs.
    keys = [trial["key"] for trial in record["trials"] if trial["method"] == "A"]
    (tmp_path / "out" / "points" / keys[3] / "result.json").unlink()
    again = Counted()
    run_study(read_study(file), tmp_path / "out", linear, again, lambda line: None)
    assert again.ran == [keys[3]]


def test_sums_are_of_one_seed_and_compared_with_their_like(tmp_path):
    sums = {"S": {"of": ["A", "B"], "like": "B", "weights": [1, -1], "options": {"rank": 2}}}
    file = grid_study(tmp_path, methods={"A": {}, "B": {}}, grid=None, sums=sums)
    record = run_study(read_study(file), tmp_path / "out", linear, Graded(), lambda line: None)
    summed = [result for result in record["results"] if result["method"] == "S"]
    assert [result["seed"] for result in summed] == [0, 1]
    (row,) = [row for row in rows(record) if row["method"] == "S"]
    assert row["difference"] is not None
    missing = Counted(fail=("B",))
    record = run_study(read_study(file), tmp_path / "other", linear, missing, lambda line: None)
    assert record["left_out"] == [f"S, seed {seed}: there is no run of B" for seed in (0, 1)]


class Graded(Counted):
    """The best are the largest rank and the middle number of steps."""

    def __call__(self, function, points, out):
        for point, result in zip(points, super().__call__(function, points, out), strict=True):
            steps = point.config["trainer"]["max_steps"]
            rank = point.config["model"]["init_args"]["rank"]
            result["metrics"]["accuracy"] = rank / 100 - abs(steps - 2) / 1000 + point.seed / 10**5
            result["grid"] = dict(point.grid)
            result["against"] = getattr(point, "like", None)
            file = out / "points" / point.key / "result.json"
            file.write_text(json.dumps(result))
            yield result


def test_the_paired_test_is_scipys(tmp_path):
    from scipy.stats import ttest_rel

    record = made(tmp_path, seeds=[0, 1, 2])
    for result, noise in zip(
        [r for r in record["results"] if r["method"] == "B"], (0.01, -0.02, 0.05), strict=True
    ):
        result["metrics"]["accuracy"] += noise
    found = rows(record)
    one, other = found[2]["values"], found[0]["values"]
    want = ttest_rel([one[s] for s in (0, 1, 2)], [other[s] for s in (0, 1, 2)]).pvalue
    assert math.isclose(found[2]["p"], want)


def test_differences_have_the_interval_of_students_t(tmp_path):
    """It is the mean ± t s / sqrt(n), with the quantile t of n - 1 degrees of freedom."""
    record = made(tmp_path, seeds=[0, 1, 2])
    others = [r for r in record["results"] if r["method"] == "B"]
    for result, noise in zip(others, (0.01, -0.02, 0.05), strict=True):
        result["metrics"]["accuracy"] += noise
    table = rows(record)
    one, other = table[2]["values"], table[0]["values"]
    differences = [one[s] - other[s] for s in (0, 1, 2)]
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    half = 4.302652729911275 * spread / math.sqrt(3)  # the quantile 0.975 for 2 degrees of freedom
    low, high = table[2]["interval"]
    assert math.isclose(low, mean - half, rel_tol=1e-9)
    assert math.isclose(high, mean + half, rel_tol=1e-9)
    assert math.isclose(table[2]["difference_deviation"], spread)
    text = markdown(record, table)
    assert f"{mean:+.4f} ± {spread:.4f} | {low:+.4f} to {high:+.4f} |" in text
    single = rows({**record, "results": [r for r in record["results"] if not r["seed"]]})
    assert single[2]["interval"] is single[2]["difference_deviation"] is None


@pytest.mark.parametrize("noise", [0.0, 3e-8])
def test_equal_differences_are_no_certainty(tmp_path, noise):
    """One question of 120 more with each seed: a t-test would say that p is 0."""
    record = made(tmp_path, seeds=[0, 1, 2])
    baseline = rows(record)[0]["values"]
    for result in record["results"]:
        if result["method"] == "B":
            seed = result["seed"]
            result["metrics"]["accuracy"] = baseline[seed] + 1 / 120 + noise * seed
    row = rows(record)[2]
    assert row["difference"] == pytest.approx(1 / 120, abs=1e-6)
    assert row["interval"] is row["p"] is None
    assert "| +0.0083 ± 0.0000 | - | - |" in markdown(record, rows(record))


def test_parameters_at_the_peak_and_spectra_are_shown(tmp_path):
    record = made(tmp_path)
    record["spectra"] = True
    for result in record["results"]:
        result["num_trainable_params_peak"] = 2 * result["num_trainable_params"]
        layer = {"rank": 2, "effective_rank": 1.5, "stable_rank": 1.2, "relative": None}
        result["spectra"] = {"a.b": layer, "a.c": {**layer, "rank": 4, "relative": 0.25}}
    text = markdown(record, rows(record))
    assert "| 90 | 180 | 3 | 4 |" in text
    assert text.count("| 3 | 1.5 | 0.25 |") == 3
    assert "| method | b | c |\n|---|---:|---:|\n| A, 100 | 1.5 | 1.5 (0.25) |\n" in text
    assert "Effective rank" not in markdown(made(tmp_path), rows(record))
    write_study(record, tmp_path / "report")
    html = (tmp_path / "report" / "index.html").read_text()
    assert '<td>A, 100</td><td class="n">1.5</td><td class="n">1.5 (0.25)</td>' in html
    table = (tmp_path / "report" / "layers.csv").read_text().splitlines()
    measures = "rank,effective_rank,stable_rank,relative"
    assert table[0] == f"method,allocator,budget,grid,seed,layer,{measures}"
    assert table[1] == "A,none,100,{},0,a.b,2,1.5,1.2,"
    assert len(table) == 1 + 2 * len(record["results"])


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1),
    st.sampled_from(["max", "min"]),
)
def test_nothing_beats_the_front(points, mode):
    front = pareto(points, mode)
    better = (lambda a, b: a > b) if mode == "max" else (lambda a, b: a < b)
    for cost, metric in front:
        assert not any(c <= cost and better(m, metric) for c, m in points)
    assert front


def test_the_report(tmp_path):
    record = made(tmp_path, fail=("B",), title="Some <title>", limits="Small & quick.")
    files = {file.name for file in write_study(record, tmp_path / "report")}
    assert files == {
        "pareto.png",
        "learning_rates.png",
        "ranks.png",
        "report.md",
        "index.html",
        "table.json",
    }
    text = (tmp_path / "report" / "report.md").read_text()
    for words in (
        "# Some &lt;title&gt;",
        "Small &amp; quick.",
        "selected by `loss` on a slice of train",
        "Reported on `accuracy`",
        "| A | - | 100 | 90 | 90 | 3 | 4 | 0.01 | a slice of train | validation | 0.7600 ± 0.0707",
    ):
        assert words in text
    assert "2 failed" in text
    assert "it broke" in text
    html = (tmp_path / "report" / "index.html").read_text()
    assert "Some &lt;title&gt;" in html
    assert not re.search(r"<script|src=\"(?!data:)|href=", html)
    assert markdown(record, rows(record)) == text
    assert page(record, rows(record), {}).count("<img") == 0


@pytest.fixture
def fit_here(monkeypatch):
    """Runs of a study in this process, which has imported the packages: the commands they had."""
    commands = []

    def run(folder, command):
        commands.append(command)
        with (
            (folder / "log.txt").open("a", encoding="utf-8") as log,
            contextlib.redirect_stdout(log),
            contextlib.redirect_stderr(log),
        ):
            try:
                main(command)
            except SystemExit as leaving:
                return leaving.code
        return 0

    for module in ("point_run", "sum_run"):
        monkeypatch.setattr(f"adaptrank.studies.{module}.run_verb", run)
    return commands


def test_a_real_study_of_four_runs_through_fit(here, cli, tiny_llama, fit_here):  # noqa: F811
    write(
        here,
        tiny_llama,
        "base.yaml",
        allocator=None,
        trainer={"max_steps": 2, "accelerator": "cpu", "check_val_every_n_epoch": 1000},
    )

    def adapters(rank):
        return [
            {
                "targets": ["q_proj"],
                "parameterization": [{"class_path": "LoRA", "init_args": {"rank": rank}}],
            }
        ]

    (here / "study.yaml").write_text(
        yaml.safe_dump(
            {
                "config": "base.yaml",
                "overlay": {
                    "model": {"init_args": {"generate": False}},
                    "data": {"init_args": {"train_size": 8, "val_size": 4}},
                },
                "methods": {
                    "LoRA": {"model": {"init_args": {"adapters": adapters("$budget")}}},
                    "RAC-LoRA": {
                        "model": {"init_args": {"adapters": adapters("$budget")}},
                        "training_strategy": "RACLoRA",
                    },
                    "broken": {
                        "model": {
                            "init_args": {"adapters": adapters(2), "backbone": "nowhere/at-all"}
                        }
                    },
                },
                "allocators": {"none": {}},
                "spectra": True,
                "budgets": [300],
                "lrs": [0.001, 0.01],
                "selection": {"overlay": {"data": {"init_args": {"seed": 99}}}, "metric": "loss"},
                "metric": "loss",
                "mode": "min",
                "baseline": "LoRA",
            }
        )
    )
    code, out, err = cli("compare", "study.yaml", "--plan", "--methods", "LoRA", "RAC-LoRA")
    assert code == 0, err
    assert "  LoRA: 256 of 300 parameters, $budget = 2; 3 runs" in out
    assert "RAC-LoRA: 256 of 300 parameters before the training strategy, $budget = 2;" in out
    code, out, err = cli("compare", "study.yaml", "--methods", "LoRA")
    assert code == 0, err
    assert "2 trials, 0 of them finished" in out
    assert "1 runs, 0 of them finished" in out
    record = json.loads((here / "runs/studies/study/results.json").read_text())
    (result,) = record["results"]
    assert result["num_trainable_params"] == 256
    assert result["dtype"] in ("float32", "bfloat16")
    assert result["units_final"] == 4
    assert result["file_size"] > 1000
    assert (here / "runs/studies/study/report/index.html").is_file()
    assert [verb for verb, *_ in fit_here] == [*["fit"] * 3, "inspect"]
    assert {layer["rank"] for layer in result["spectra"].values()} <= {0, 1, 2}
    assert len(result["spectra"]) == 2
    assert (here / "runs/studies/study/report/layers.csv").is_file()
    code, out, _ = cli("compare", "study.yaml", "--methods", "LoRA")
    assert "1 runs, 1 of them finished" in out
    code, _, err = cli("compare", "study.yaml", "--methods", "LoRa")
    assert code == 2
    assert "Did you mean 'LoRA'" in err


def test_a_grid_without_a_study_file(here, cli, tiny_llama, fit_here):  # noqa: F811
    write(here, tiny_llama, "base.yaml", allocator=None)
    grid = ["--grid", "model.adapters.0.rank=2,4", "--grid", "model.optimizer.lr=1e-3,3e-3"]
    code, out, err = cli("compare", "--config", "base.yaml", *grid, "--seeds", "0,1", "--plan")
    assert code == 0, err
    assert "base, rank=2, lr=0.001: 448 parameters; 2 runs" in out
    assert "8 runs in all" in out
    for wrong, sentence in (
        (["--grid", "model.rank"], "names no values. Write KEY=A,B"),
        (["--grid", "model.adapters.5.rank=1"], "the list there has 1 item"),
        (["--seeds", "a"], "give whole numbers"),
        (["study.yaml"], "compare needs a study file, or a configuration"),
    ):
        code, _, err = cli("compare", "--config", "base.yaml", *wrong, "--plan")
        assert code == 2
        assert sentence in err


def test_results_of_files_that_changed_are_not_reported_as_new(here, cli, tiny_llama, fit_here):  # noqa: F811
    data = here / "rows.jsonl"
    rows = [{"prompt": f"{number}:", "completion": " one"} for number in range(8)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(
        here,
        tiny_llama,
        "base.yaml",
        allocator=None,
        trainer={"max_steps": 1, "accelerator": "cpu", "check_val_every_n_epoch": 1000},
        data={"class_path": "CausalLMData", "init_args": {"sources": str(data), "batch_size": 4}},
    )
    call = ("compare", "--config", "base.yaml", "--grid", "model.optimizer.lr=0.1", "--seeds", "0")
    call = (*call, "--metric", "loss")
    for finished in (0, 1):
        code, out, err = cli(*call)
        assert code == 0, err
        assert f"1 runs, {finished} of them finished before" in out
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    code, out, err = cli(*call)
    assert code == 2
    assert f"{data} has changed since finished runs read it (1, such as" in err
    code, out, err = cli(*call, "--out", str(here / "again"))
    assert code == 0, err
    assert "1 runs, 0 of them finished before" in out


def test_inputs_are_the_files_that_a_configuration_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.csv", "data/deep/b.csv", "out/ranks.json", "logs/old.csv", "one.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    config = {
        "model": {"rank_pattern": "out/ranks.json", "backbone": "nowhere", "dtype": ""},
        "data": {"sources": [{"path": "data"}, "one.csv", "data/*.csv"], "prompt": "x" * 5000},
        "trainer": {"default_root_dir": "logs"},
    }
    inputs = read_inputs(config, tmp_path / "out")
    assert set(inputs) == {"data", "one.csv", "data/*.csv"}
    (tmp_path / "data/deep/b.csv").write_text("DATA/deep/b.csv")
    again = read_inputs(config, tmp_path / "out")
    assert [path for path in inputs if inputs[path] != again[path]] == ["data"]


def test_adapters_of_a_study_are_summed_and_evaluated(here, cli, tiny_llama, fit_here):  # noqa: F811
    trainer = {"max_steps": 1, "accelerator": "cpu", "check_val_every_n_epoch": 1000}
    write(here, tiny_llama, "base.yaml", allocator=None, trainer=trainer)
    said = {
        "config": "base.yaml",
        "overlay": {
            "model": {"init_args": {"generate": False}},
            "data": {"init_args": {"train_size": 8, "val_size": 4}},
        },
        "methods": {"one": {}, "two": {"data": {"init_args": {"val_size": 2}}}},
        "sums": {"both": {"of": ["one", "two"], "like": "one"}},
        "metric": "loss",
        "mode": "min",
    }
    (here / "study.yaml").write_text(yaml.safe_dump(said))
    code, out, err = cli("compare", "study.yaml")
    assert code == 0, err + out
    assert [verb for verb, *_ in fit_here] == ["fit", "fit", "compose", "validate"]
    record = json.loads((here / "runs/studies/study/results.json").read_text())
    both = record["results"][-1]
    assert both["method"] == "both"
    assert both["metrics"]["loss"] > 0
    assert both["similarity"]["rms_cos"] is not None
    assert "| both | - |" in out
    adapter = Path(both["run"]) / "adapter"
    code, out, _ = cli(
        "validate",
        "--config",
        "base.yaml",
        "--model.generate",
        "false",
        "--data.val_size",
        "4",
        "--model.adapters",
        "null",
        "--model.adapter",
        adapter,
    )
    assert f"{both['metrics']['loss']:.4f}" in out


def test_a_failed_point_says_why(tmp_path, tiny_llama):
    write(tmp_path, tiny_llama, "base.yaml")
    config = yaml.safe_load((tmp_path / "base.yaml").read_text())
    asked = read_study(
        study(
            tmp_path,
            config=config,
            methods={"A": {"trainer": {"max_stps": 3}}},
            budgets=None,
            lrs=None,
            seeds=[0],
        )
    )
    record = run_study(
        asked, tmp_path / "out", lambda config: 1, on_this_machine(), lambda line: None
    )
    assert record["results"][0]["status"] == "failed"
    assert "max_stps" in record["results"][0]["error"]


def test_counts_are_those_of_plan_and_kept(tmp_path, tiny_llama):
    write(tmp_path, tiny_llama, "base.yaml")
    config = yaml.safe_load((tmp_path / "base.yaml").read_text())
    count = counting(tmp_path / "counts.json")
    assert count(config) == 2 * 8 * ((32 + 32) + (32 + 16))
    assert list(json.loads((tmp_path / "counts.json").read_text()).values()) == [count(config)]
    config["model"]["init_args"]["adapters"][0]["parameterization"][0]["init_args"] = {"rank": 0}
    with pytest.raises(ValueError, match="rank=0"):
        count(config)


def test_a_pattern_that_a_run_found_is_replayed_by_another_after_it(tmp_path):
    methods = {"replay": {"model": {"init_args": {"rank_pattern": "$ranks:found"}}}, "found": {}}
    asked = read_study(
        study(tmp_path, methods=methods, budgets=None, lrs=None, selection=None, baseline="found")
    )
    engine = Ordered()
    run_study(asked, tmp_path / "out", lambda config: 1, engine, lambda line: None)
    assert [method for method, _ in engine.ran] == ["found", "found", "replay", "replay"]
    patterns = [
        config["model"]["init_args"]["rank_pattern"]
        for method, config in engine.ran
        if method == "replay"
    ]
    assert patterns == [str(Path("run of 0") / "ranks.json"), str(Path("run of 1") / "ranks.json")]


def test_a_replay_is_selected_by_trials_that_replay_the_best_trial(tmp_path):
    """Trials follow a trial of the other row, and runs a run: with the seed of their own."""
    methods = {
        "replay": {"allocator": {"run": "$run:found", "seed": "$seed"}},
        "found": {},
        "other": {"model": {"init_args": {"rank_pattern": "$ranks:found"}}},
    }
    asked = read_study(study(tmp_path, methods=methods, budgets=None, baseline="found"))
    engine = Replaying()
    record = run_study(asked, tmp_path / "out", lambda config: 1, engine, lambda line: None)
    assert [(method, trial) for method, trial, _ in engine.ran] == [
        *[("found", True)] * 2,
        *[("other", True)] * 2,
        *[("replay", True)] * 2,
        *[("found", False)] * 2,
        *[("other", False)] * 2,
        *[("replay", False)] * 2,
    ]
    followed = [config["allocator"] for method, _, config in engine.ran if method == "replay"]
    best = "found, 0.01, 0, True"
    assert followed == [
        {"run": best, "seed": 0},
        {"run": best, "seed": 0},
        {"run": "found, 0.01, 0, False", "seed": 0},
        {"run": "found, 0.01, 1, False", "seed": 1},
    ]
    patterns = [
        config["model"]["init_args"]["rank_pattern"]
        for method, _, config in engine.ran
        if method == "other"
    ]
    assert patterns[0] == str(Path(best) / "ranks.json")
    assert {r["status"] for r in record["trials"]} == {"success"}
    again = Replaying()
    run_study(asked, tmp_path / "out", lambda config: 1, again, lambda line: None)
    assert not again.ran


@pytest.mark.tables
def test_controls_follow_a_real_run(here, cli, tiny_llama, fit_here):  # noqa: F811
    """Through `fit`: random moves, the found pattern, the same ranks elsewhere, equal ranks."""
    write(here, tiny_llama, "base.yaml", allocator=None)
    said = {
        "config": "base.yaml",
        "overlay": {
            "model": {"init_args": {"generate": False}},
            "data": {"init_args": {"train_size": 8, "val_size": 4}},
        },
        "methods": {
            "found": {
                "allocator": {
                    "class_path": "ElaLoRA",
                    "init_args": {"swaps": 4, "every": 2, "warmup": 2, "final": 2, "floor": 0},
                }
            },
            "random": {
                "allocator": {
                    "class_path": "RandomMoves",
                    "init_args": {"run": "$run:found", "seed": "$seed"},
                }
            },
            "replayed": {"model": {"init_args": {"rank_pattern": "$ranks:found"}}},
            "shuffled": {
                "initial_ranks": {
                    "class_path": "ShuffledRanks",
                    "init_args": {"run": "$run:found", "seed": "$seed"},
                }
            },
            "uniform": {
                "initial_ranks": {
                    "class_path": "UniformRanks",
                    "init_args": {"run": "$run:found", "unit": "parameters"},
                }
            },
        },
        "metric": "loss",
        "mode": "min",
        "seeds": [1],
    }
    (here / "study.yaml").write_text(yaml.safe_dump(said, sort_keys=False))
    code, out, err = cli("compare", "study.yaml")
    assert code == 0, out + err
    record = json.loads((here / "runs/studies/study/results.json").read_text())
    results = {result["method"]: result for result in record["results"]}
    found = results["found"]
    assert results["random"]["units_final"] == found["units_final"]
    assert results["replayed"]["ranks"] == found["ranks"] != results["random"]["ranks"]
    assert sorted(results["shuffled"]["ranks"].values()) == sorted(found["ranks"].values())
    trained = {name: result["num_trainable_params"] for name, result in results.items()}
    assert trained["replayed"] == trained["shuffled"] == trained["found"] >= trained["uniform"]
    assert (
        max(results["uniform"]["ranks"].values()) - min(results["uniform"]["ranks"].values()) <= 1
    )


class Replaying(Counted):
    """The loss of a trial is best at a rate of 0.01."""

    def __call__(self, function, points, out):
        for point, result in zip(points, super().__call__(function, points, out), strict=True):
            self.ran[-1] = (point.method, point.trial, point.config)
            result["run"] = f"{point.method}, {point.lr:g}, {point.seed}, {point.trial}"
            file = out / "points" / point.key / "result.json"
            file.write_text(json.dumps(result))
            yield result


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("$ranks:fuond", r"'fuond' is none of the methods. Did you mean 'found'"),
        ("$run:found:EVA", r"'EVA' is none of the allocators. Write \$run:found:NAME"),
        ("$ranks:chained", r"chain refers to \$ranks:chained, which refers to another row itself"),
    ],
)
def test_a_reference_that_leads_nowhere_is_refused(tmp_path, reference, sentence):
    methods = {"chain": {"x": reference}, "found": {}, "chained": {"x": ["$run:found"]}}
    said = {"methods": methods, "budgets": None, "lrs": None, "selection": None}
    with pytest.raises(UserError, match=sentence) as refused:
        read_study(study(tmp_path, **said, baseline="found"))
    assert "\n" not in str(refused.value)


def test_a_choice_of_methods_takes_those_that_they_refer_to(tmp_path, cli):  # noqa: F811
    methods = {"replay": {"x": "$ranks:found"}, "found": {}}
    said = {"methods": methods, "budgets": None, "lrs": None, "selection": None}
    file = study(tmp_path, **said, baseline="found")
    code, _, err = cli("compare", str(file), "--plan", "--methods", "replay")
    assert code == 2
    assert "--methods: replay refers to $ranks:found, and 'found' is none of the methods." in err


def test_names_with_a_comma_are_quoted_for_the_shell(tmp_path, cli):  # noqa: F811
    methods = {"query, value and output": {}, "LoRA": {}}
    said = {"methods": methods, "budgets": None, "lrs": None, "selection": None}
    file = study(tmp_path, **said, baseline="LoRA")
    code, _, err = cli("compare", str(file), "--plan", "--methods", "query, key")
    assert code == 2
    assert "--methods 'query, key' is none of the study's." in err
    assert "It has LoRA, 'query, value and output'." in err


class Ordered(Counted):
    def __call__(self, function, points, out):
        for point in points:
            self.ran.append((point.method, point.config))
            result = {
                "key": point.key,
                "method": point.method,
                "allocator": "none",
                "budget": None,
                "seed": point.seed,
                "lr": None,
            }
            result |= {
                "status": "success",
                "metrics": {"accuracy": 1.0},
                "run": f"run of {point.seed}",
                "error": "",
            }
            (out / "points" / point.key).mkdir(parents=True)
            (out / "points" / point.key / "result.json").write_text(json.dumps(result))
            yield result


@pytest.mark.tables
def test_points_on_a_ray_of_two_workers(tmp_path, tiny_llama, monkeypatch):
    """Run each point in a process of the cluster, all at once."""
    import ray

    from adaptrank.studies import on_ray

    write(
        tmp_path,
        tiny_llama,
        "base.yaml",
        allocator=None,
        trainer={"max_steps": 1, "accelerator": "cpu", "check_val_every_n_epoch": 1000},
    )
    config = yaml.safe_load((tmp_path / "base.yaml").read_text())
    config["model"]["init_args"]["generate"] = False
    asked = read_study(
        study(
            tmp_path,
            config=config,
            methods={"A": {}},
            budgets=None,
            lrs=None,
            selection=None,
            metric="loss",
        )
    )
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        record = run_study(asked, tmp_path / "out", lambda config: 1, on_ray(), lambda line: None)
    finally:
        ray.shutdown()
    assert [(r["seed"], r["status"]) for r in record["results"]] == [(0, "success"), (1, "success")]


def test_a_report_says_the_dtype_of_the_frozen_weights(tmp_path):
    record = made(tmp_path)
    assert "Frozen weights" not in markdown(record, rows(record))
    for result in record["results"]:
        result["dtype"] = "bfloat16"
    assert "Frozen weights were held in bfloat16." in markdown(record, rows(record))
    record["results"][0]["dtype"] = "float32"
    assert "Frozen weights were held in bfloat16 and float32." in markdown(record, rows(record))
