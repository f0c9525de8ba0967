"""Reports of files that are damaged, hostile or large."""

import json
import math
from html.parser import HTMLParser

import pytest

from adaptrank.cli import main
from adaptrank.reports.card import card
from adaptrank.reports.comparison import rows
from adaptrank.reports.escaping import code_span, fence, in_picture, visible
from adaptrank.reports.escaping import markdown as escape
from adaptrank.reports.figures import LayerMap, Scale, draw_run, heat_maps
from adaptrank.reports.history import SNAPSHOTS, read_history
from adaptrank.reports.ranks import MOST_ROWS, page, write_report
from adaptrank.reports.records import read_study_results
from adaptrank.reports.study import markdown, write_study

START = {"step": 0, "reason": "the start", "sizes": {"m.0.q:rank": 4, "m.1.q:rank": 4}}
EVENT = {
    "step": 5, "budget": 6, "unit": "ranks", "reason": "budget 6", "total": 6, "active": 6,
    "allocated": 6, "sizes": {"m.0.q:rank": 2}, "pruned": {"m.0.q:rank": [1, 3]}, "grown": {},
    "closed": {}, "scores": {"min": 0.1, "median": 0.2, "max": 0.3},
}  # fmt: skip
SUMMARY = {
    "base": {"name": "m"}, "trainable": 10, "parameters": 100, "ranks": 6, "steps": 5,
    "seconds": 1.5, "before": {"loss": 2.0}, "after": {"loss": 1.0},
    "layers": [{"kind": "q", "count": 2, "method": "LoRA", "trainable": 10}],
}  # fmt: skip
HOSTILE = "</td><script>alert('x')</script>\"&\x1b[2J\u202e|`$\\frac{\n# x"


def write_run(folder, events=(START, EVENT), summary=SUMMARY, ranks=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    (folder / "ranks.jsonl").write_text("".join(line + "\n" for line in lines))
    for name, content in (("summary", summary), ("ranks", ranks)):
        if content is not None:
            text = content if isinstance(content, str) else json.dumps(content)
            (folder / f"{name}.json").write_text(text)
    return folder


DAMAGED_EVENTS = [
    ('{"step": 5', "this is no JSON"),
    ("[" * 100_000, "this is no JSON"),
    ("9" * 5000, "this is no JSON"),
    ("[1, 2]", "[1, 2] is no mapping"),
    ("null", "None is no mapping"),
    ({"reason": "x"}, "the key 'step' is missing"),
    ({**EVENT, "step": "5"}, "step is '5'. It must be a whole number"),
    ({**EVENT, "step": True}, "step is True"),
    ({**EVENT, "step": -1}, "step is -1"),
    ({**EVENT, "step": 10**400}, "step is 1000"),
    ({**EVENT, "step": 1.5}, "step is 1.5"),
    ({**EVENT, "reason": {"a": 1}}, "reason is {'a': 1}. It must be a text"),
    ({**EVENT, "budget": "6"}, "budget is '6'"),
    ({**EVENT, "total": [6]}, "total is [6]"),
    ({**EVENT, "active": math.nan}, "active is nan"),
    ({**EVENT, "sizes": [4]}, "sizes is [4]. It must be whole numbers by axis"),
    ({**EVENT, "sizes": {"a": -4}}, "sizes is {'a': -4}"),
    ({**EVENT, "sizes": {"a": "4"}}, "sizes is {'a': '4'}"),
    ({**EVENT, "sizes": {"a": 1e300}}, "sizes is {'a': 1e+300}"),
    ({**EVENT, "pruned": {"a": 3}}, "pruned is {'a': 3}. It must be lists of units"),
    ({**EVENT, "closed": {"a": ["x"]}}, "closed is {'a': ['x']}"),
    ({**EVENT, "grown": {"a": [1]}}, "grown is {'a': [1]}"),
    ({**EVENT, "scores": {"median": "high"}}, "scores is {'median': 'high'}"),
    ({**EVENT, "scores": 3}, "scores is 3"),
]


@pytest.mark.parametrize(
    ("event", "sentence"), DAMAGED_EVENTS, ids=[sentence for _, sentence in DAMAGED_EVENTS]
)
def test_a_damaged_line_is_named_by_file_line_and_key(event, sentence, tmp_path, capsys):
    run = write_run(tmp_path / "run", (START, event, EVENT))
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    said = " ".join(capsys.readouterr().err.split())
    assert ended.value.code == 2
    assert f"ranks.jsonl, line 2: {sentence}" in said
    assert "Traceback" not in said
    assert not (run / "report").exists()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("summary", "{", "summary.json, line 1: this is no JSON"),
        ("summary", "[]", "summary.json holds no JSON mapping"),
        ("summary", {**SUMMARY, "layers": 3}, "layers is 3"),
        ("summary", {**SUMMARY, "layers": [{"method": 3}]}, "It must be a list of kind"),
        ("summary", {**SUMMARY, "before": {"loss": "x"}}, "before is {'loss': 'x'}"),
        ("summary", {**SUMMARY, "base": "m"}, "base is 'm'. It must be a mapping"),
        ("summary", {**SUMMARY, "trainable": "many"}, "trainable is 'many'"),
        ("ranks", "}", "ranks.json, line 1: this is no JSON"),
        ("ranks", {"a": 2.5}, "ranks is {'a': 2.5}"),
        ("ranks", {"a": [2]}, "ranks is {'a': [2]}"),
    ],
)
def test_other_damaged_files_of_a_run(name, content, sentence, tmp_path, capsys):
    run = write_run(tmp_path / "run", **{name: content})
    with pytest.raises(SystemExit):
        main(["report", str(run)])
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_bytes_that_are_no_text(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "ranks.jsonl").write_bytes(json.dumps(START).encode() + b"\n\xff\xfe\n{}\n")
    with pytest.raises(ValueError, match=r"ranks\.jsonl, line 2: this is no JSON"):
        read_history(run)
    # A line separator of Unicode ends no line of JSON.
    event = json.dumps({**EVENT, "reason": "a\u2028b\x85c"}, ensure_ascii=False)
    assert len(read_history(write_run(run, (START, event))).events) == 2


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text.append(data)


def hostile_run(folder):
    axis = f"{HOSTILE}:{HOSTILE}"
    start = {**START, "reason": HOSTILE, "sizes": {axis: 4, f"{HOSTILE}.1.q:r": 2}}
    event = {**EVENT, "reason": HOSTILE, "unit": HOSTILE, "sizes": {axis: 7}, "pruned": {}}
    layer = {"kind": HOSTILE, "count": 1, "method": HOSTILE, "trainable": 1}
    summary = {**SUMMARY, "base": {"name": HOSTILE}, "layers": [layer]}
    summary |= {"before": {HOSTILE: 1.0}, "after": {HOSTILE: 2.0}}
    return write_run(folder, (start, event), summary)


def test_whatever_a_run_says_is_shown_and_not_obeyed(tmp_path, capsys):
    run = hostile_run(tmp_path / "run")
    main(["report", str(run)])
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert r"most gained: </td><script>" in said
    page_text = (run / "report" / "index.html").read_text()
    parsed = Tags(page_text)
    assert "script" not in parsed.tags
    assert "<script" not in page_text
    assert "alert('x')" in "".join(parsed.text)


def cells_of(text):
    """The cells of all tables of a Markdown text, split at bars that are not escaped."""
    import re

    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]


def test_a_card_of_hostile_names(tmp_path):
    layer = {"kind": HOSTILE, "count": 1, "method": HOSTILE, "trainable": 1}
    summary = {**SUMMARY, "base": {"name": HOSTILE, "auto_class": "os; import x"}}
    summary |= {"layers": [layer], "before": {HOSTILE: 1.0}, "after": {HOSTILE: 2.0}}
    text = card(summary, {f"a.0.{HOSTILE}:r": 3}, "a: 1\n```\n# b\n````")
    assert "import AutoModel\n" in text
    assert "\x1b" not in text
    assert {len(cells) for cells in cells_of(text)} == {2, 3, 4}
    body = text.partition("\n---\n")[2]
    assert "<script" not in body.partition("```python")[0]
    assert body.count("`````") == 2
    assert not [line for line in body.splitlines() if line.startswith("# x")]


STUDY = {
    "study": "s", "title": "t", "limits": "", "metric": "accuracy", "mode": "max",
    "baseline": "LoRA", "selected_on": None, "selected_by": None, "reported_on": "validation",
    "lrs": [0.1], "seeds": [0, 1], "left_out": ["x"], "trials": [],
}  # fmt: skip
RESULT = {
    "key": "k", "status": "success", "method": "LoRA", "allocator": "none", "budget": 100,
    "seed": 0, "lr": 0.1, "metrics": {"accuracy": 0.5}, "num_trainable_params": 100,
    "train_time": 1.0, "accelerator_memory_max": 10, "file_size": 10, "units_final": 4,
    "units_peak": 4, "adapter_params_at_start": 100, "ranks": {"a.0.q:rank": 4},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"title": 3}, "title is 3. It must be a text"),
        ({"mode": "best"}, "mode is 'best'"),
        ({"seeds": 3}, "seeds is 3"),
        ({"results": [3]}, r"results is \[3\]"),
        ({"results": [{**RESULT, "status": "fine"}]}, "results, number 1: status is 'fine'"),
        ({"results": [{**RESULT, "metrics": {"accuracy": "x"}}]}, "metrics is {'accuracy': 'x'}"),
        ({"results": [{**RESULT, "ranks": {"a": "x"}}]}, "ranks is {'a': 'x'}"),
        ({"results": [{**RESULT, "seed": "0"}]}, "seed is '0'"),
        ({"results": [{k: v for k, v in RESULT.items() if k != "lr"}]}, "'lr' is missing"),
        ({"results": [{**RESULT, "status": "failed"}]}, "'error' is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_results_of_a_study(change, sentence, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**STUDY, "results": [RESULT], **change}))
    with pytest.raises(ValueError, match=sentence):
        read_study_results(file)


def test_a_study_of_hostile_names(tmp_path):
    names = dict.fromkeys(("title", "limits", "metric", "baseline", "reported_on"), HOSTILE)
    result = {**RESULT, "method": HOSTILE, "metrics": {HOSTILE: 0.5}, "ranks": {HOSTILE: 2}}
    second = {**result, "seed": 1, "ranks": {HOSTILE: 3, f"1.{HOSTILE}": 4}}
    failed = {**RESULT, "key": HOSTILE, "status": "failed", "error": HOSTILE, "method": "x"}
    record = {**STUDY, **names, "left_out": [HOSTILE], "results": [result, second, failed]}
    (tmp_path / "results.json").write_text(json.dumps(record))
    record = read_study_results(tmp_path / "results.json")
    write_study(record, tmp_path / "report")
    html = (tmp_path / "report" / "index.html").read_text()
    assert "script" not in Tags(html).tags
    text = markdown(record, rows(record))
    assert "\x1b" not in text
    assert "<script" not in text
    assert {len(cells) for cells in cells_of(text)} == {17}


def test_escapes():
    assert visible("a\x1b[2J\u202eb\nc") == "a\\x1b[2J\\u202eb\\x0ac"
    assert visible("é 漢 q_proj") == "é 漢 q_proj"
    assert escape("q_proj") == "q_proj"
    assert escape("a|b<c>`d`&") == "a\\|b&lt;c&gt;\\`d\\`&amp;"
    assert code_span("org/model-1.5") == "`org/model-1.5`"
    assert code_span("a`<b") == "a\\`&lt;b"
    assert fence("```\n````") == "`````"
    assert in_picture("$x$") == r"\$x\$"


AXES = 20_000


def large_run(folder, events=200):
    """A run of 20,000 axes of 1,000 layers and of 20 kinds, and many events that name them all."""
    axes = [f"model.layers.{i // 20}.block.kind_{i % 20}:rank" for i in range(AXES)]
    lines = [{**START, "sizes": dict.fromkeys(axes, 8)}]
    for step in range(1, events + 1):
        moved = axes[step::500]
        sizes = dict.fromkeys(moved, 8 - step % 7)
        pruned = {axis: [0] for axis in moved}
        lines.append({**EVENT, "step": step, "sizes": sizes, "pruned": pruned})
    return write_run(folder, lines)


def test_a_report_of_20_000_axes_stays_small(tmp_path):
    run = large_run(tmp_path / "run", events=MOST_ROWS + 100)
    history = read_history(run)
    assert len(history.sizes) == SNAPSHOTS
    text = page(history, {}, "replay")
    assert len(text) < 300_000
    assert text.count("<tr>") < 2 * MOST_ROWS + 100
    assert "19,500 others are in ranks.json" in text
    assert "101 earlier ones are in ranks.jsonl" in text
    assert '<td>kind_3</td><td class="n">1000</td><td class="n">8000</td>' in text
    *_, with_pictures = write_report(history, tmp_path / "report", "replay")
    assert with_pictures.stat().st_size < 1_000_000


def test_pictures_of_20_000_kinds_stay_small(tmp_path):
    """Each axis has a name of its own, and no number: one row of 20,000 columns."""
    axes = {f"module_{i}_{'x' * 500}:rank": 4 for i in range(AXES)}
    run = write_run(tmp_path / "run", [{**START, "sizes": axes}, {**EVENT, "sizes": {}}])
    files = write_report(read_history(run), tmp_path / "report", "replay")
    assert sum(file.stat().st_size for file in files) < 3_000_000
    values = dict.fromkeys(list(axes)[:3000], 1.0)
    heat_maps([LayerMap("map", Scale("one"), values)], tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size < 1_000_000


def test_a_run_whose_axes_have_no_units_is_drawn(tmp_path):
    run = write_run(tmp_path / "run", [{**START, "sizes": {"a:rank": 0}}])
    (tmp_path / "out").mkdir()
    assert set(draw_run(read_history(run), tmp_path / "out")) == {"ranks", "budget"}
