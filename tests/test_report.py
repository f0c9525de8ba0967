"""The report of a run, and its pattern replayed by itself."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from test_configs import CONFIGS, short

from adaptrank import load_adapter
from adaptrank.axes import rank_axes
from adaptrank.cli import main
from adaptrank.reports.history import History, read_history
from adaptrank.reports.layer_grid import layer_grid
from adaptrank.reports.ranks import page


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    """Return the folder of a tiny run with ElaLoRA."""
    folder = tmp_path_factory.mktemp("report")
    llama, bert = request.getfixturevalue("tiny_llama"), request.getfixturevalue("tiny_bert")
    file = next(file for file in CONFIGS if file.stem == "elalora_llama")
    config = short(
        yaml.safe_load(file.read_text()), {"CausalLM": llama, "SequenceClassification": bert}
    )
    (folder / "ela.yaml").write_text(yaml.safe_dump(config))
    main(
        [
            "fit",
            "--config",
            str(folder / "ela.yaml"),
            "--runs",
            str(folder / "runs"),
            "--evaluate",
            "false",
        ]
    )
    return folder / "runs" / "ela" / "0"


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.outside, self.images, self.tags = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href"):
                (
                    self.images if value.startswith("data:image/png;base64,") else self.outside
                ).append(value)
        if tag == "img":
            assert dict(attributes)["alt"]


def test_a_report_of_a_run(run, capsys):
    capsys.readouterr()
    main(["report", str(run)])
    said = capsys.readouterr().out
    text = (run / "report" / "index.html").read_text()
    links = Links(text)
    assert not links.outside, "it needs nothing from elsewhere"
    assert len(links.images) == 4
    assert "script" not in links.tags
    assert 'name="viewport"' in text
    assert {file.name for file in (run / "report").iterdir()} == {
        "index.html",
        "ranks.png",
        "over_time.png",
        "budget.png",
        "scores.png",
    }
    final = json.loads((run / "ranks.json").read_text())
    history = read_history(run)
    assert history.end == final
    assert history.sizes[0][0] == 0
    assert (
        f"units {sum(history.start.values()):,} -> {sum(final.values()):,} on {len(final)} axes"
        in said
    )
    for axis, size in final.items():
        assert re.search(
            rf'<td>{re.escape(axis)}</td><td class="n">4</td><td class="n">{size}</td>', text
        )
    main(["report", str(run), "--json"])
    assert json.loads(capsys.readouterr().out)["end"] == final


def test_a_pattern_replayed_has_the_final_ranks_from_the_first_step(run):
    parent = run.parents[1]
    pattern = ["--model.rank_pattern", str(run / "ranks.json"), "--allocator", "null"]
    main(
        [
            "fit",
            "--config",
            str(run / "config.yaml"),
            *pattern,
            "--runs",
            str(parent / "again"),
            "--evaluate",
            "false",
        ]
    )
    (again,) = (parent / "again").glob("*/0")
    assert json.loads((again / "ranks.json").read_text()) == json.loads(
        (run / "ranks.json").read_text()
    )
    assert not (again / "ranks.jsonl").exists()
    from transformers import AutoModelForCausalLM

    backbone = yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["backbone"]
    model = load_adapter(AutoModelForCausalLM.from_pretrained(backbone), again / "adapter")
    assert {key: len(axis) for key, axis in rank_axes(model).items()} == json.loads(
        (run / "ranks.json").read_text()
    )


def test_the_start_is_told_backwards_where_no_line_has_it(run, tmp_path):
    lines = [json.loads(line) for line in (run / "ranks.jsonl").read_text().splitlines()]
    (tmp_path / "ranks.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines if line["step"])
    )
    (tmp_path / "ranks.json").write_text((run / "ranks.json").read_text())
    assert read_history(tmp_path).start == read_history(run).start


def test_half_a_last_line_is_left_out_and_any_other_is_named(run, tmp_path, capsys):
    whole = (run / "ranks.jsonl").read_text()
    (tmp_path / "ranks.jsonl").write_text(whole + '{"step": 9')
    assert read_history(tmp_path).start == read_history(run).start
    (tmp_path / "ranks.jsonl").write_text("{\n" + whole)
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "ranks.jsonl, line 1: this is no JSON. The file is damaged." in capsys.readouterr().err


def test_folders_without_a_history(tmp_path, capsys):
    for folder, sentence in (
        (tmp_path, "no allocator moved a rank in this run"),
        (tmp_path / "x", "is no folder. Name the folder"),
    ):
        with pytest.raises(SystemExit):
            main(["report", str(folder)])
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_page_escapes_whatever_a_run_says():
    word = "<script>&'"
    event = {"step": 0, "reason": word, "total": word, "sizes": {word: 4}}
    summary = {"base": {"name": word}, "layers": [{"method": word}]}
    summary |= {"before": {word: 1.0}, "after": {word: 2.0}}
    history = History(word, [event], [(0, {word: 4})], summary)
    text = page(history, {}, word)
    assert "script" not in Links(text).tags
    assert text.count("&lt;script&gt;&amp;&#39;") == 9


def test_layers_and_kinds():
    layers, kinds, places = layer_grid(
        ["m.layers.0.attn.q:rank", "m.layers.10.attn.q:rank", "m.layers.2.mlp.up:rank", "head:rank"]
    )
    assert layers == ["0", "2", "10", "-"]
    assert kinds == ["q", "up", "head"]
    assert places["m.layers.10.attn.q:rank"] == (2, 0)
    _, kinds, _ = layer_grid(["m.layers.0.q:a1", "m.layers.0.q:b1"])
    assert kinds == ["q a1", "q b1"]
