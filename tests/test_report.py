"""The report of a run, and its pattern replayed by itself."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from test_configs import CONFIGS, short

from adaptrank import load_adapter
from adaptrank.axes import rank_axes
from adaptrank.cli import main
from adaptrank.reports.figures import LayerMap, Scale, layer_maps, run_figures
from adaptrank.reports.history import History, read_history
from adaptrank.reports.layer_grid import in_grid_order, layer_grid
from adaptrank.reports.ranks import page
from adaptrank.reports.run_words import captions, headline


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
    assert text.count("&lt;script&gt;&amp;&#39;") == 10


def test_layers_and_kinds():
    layers, kinds, places = layer_grid(
        ["m.layers.0.attn.q:rank", "m.layers.10.attn.q:rank", "m.layers.2.mlp.up:rank", "head:rank"]
    )
    assert layers == ["0", "2", "10", "-"]
    assert kinds == ["q", "up", "head"]
    assert places["m.layers.10.attn.q:rank"] == (2, 0)
    _, kinds, _ = layer_grid(["m.layers.0.q:a1", "m.layers.0.q:b1"])
    assert kinds == ["q a1", "q b1"]


def test_layers_of_one_name_in_a_block_have_kinds_of_their_own():
    """BERT has three layers named "dense" in a block, and T5 two numbers in a path."""
    bert = [
        f"bert.encoder.layer.{i}.{path}:rank"
        for i in range(2)
        for path in (
            "output.dense",
            "attention.output.dense",
            "intermediate.dense",
            "attention.self.value",
            "attention.self.query",
        )
    ]
    layers, kinds, places = layer_grid(bert)
    assert layers == ["0", "1"]
    assert kinds == [
        "query",
        "value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    ]
    assert len(set(places.values())) == len(bert), "no two axes share a cell"
    t5 = [
        f"{stack}.block.{i}.layer.{part}:rank"
        for stack in ("encoder", "decoder")
        for i in range(2)
        for part in ("0.SelfAttention.q", "1.DenseReluDense.wo")
    ]
    layers, kinds, places = layer_grid(t5)
    assert layers == ["0", "1"]
    assert len(set(places.values())) == len(t5)


def test_columns_have_one_order():
    for names in (
        "mlp.down_proj mlp.up_proj mlp.gate_proj self_attn.o_proj self_attn.v_proj "
        "self_attn.k_proj self_attn.q_proj",
        "fc2 fc1 attn.out_proj attn.value attn.key attn.query",
        "mlp.c_proj mlp.c_fc attn.c_proj attn.c_attn",
    ):
        backwards = names.split()
        kinds = layer_grid([f"layers.0.{name}:rank" for name in sorted(backwards)]).kinds
        expected = [name if name.endswith("c_proj") else name.split(".")[-1] for name in backwards]
        assert kinds == expected[::-1]
    paths = ["layers.1.k_proj", "layers.0.v_proj", "layers.1.q_proj", "layers.0.q_proj"]
    assert in_grid_order(paths) == sorted(paths, key=lambda path: (path[7], "qkv".index(path[9])))


def test_a_report_opens_with_what_moved_what_it_cost_and_what_it_gave():
    start = {"layers.0.q_proj:rank": 4, "layers.0.k_proj:rank": 4, "layers.0.v_proj:rank": 4}
    end = {"layers.0.q_proj:rank": 0, "layers.0.k_proj:rank": 3, "layers.0.v_proj:rank": 6}
    summary = {
        "trainable": 50,
        "parameters": 1000,
        "steps": 20,
        "seconds": 61.2,
        "before": {"loss": 2.0, "accuracy": 0.5},
        "after": {"loss": 1.5, "accuracy": 0.75},
    }
    events = [{"step": 0, "allocators": ["ElaLoRA"], "sizes": start}]
    history = History("a run", events, [(0, start), (10, end)], summary)
    assert headline(history) == [
        "ElaLoRA took 5 of 12 units from 2 of 3 axes and gave 2 to 1 axes, and 1 axes have none "
        "left.",
        "50 of 1,000 parameters are trained (5.00%), in 20 steps and 1:01 minutes.",
        "From before to after the training, loss fell from 2 to 1.5 and accuracy rose from 0.5 to "
        "0.75.",
    ]
    said = captions(history)["ranks"]
    assert "v_proj has 150% at the end, the largest share, and q_proj has 0%, the smallest" in said
    unmoved = History("a run", events, [(0, start), (10, start)], {})
    assert headline(unmoved) == [
        "No rank moved: ElaLoRA left the 12 units where they were.",
    ]


def figures_of(history):
    """Return the figures of a run as objects of matplotlib."""
    figures = {}

    def keep(figure, file):
        figure.draw_without_rendering()
        figures[file.stem] = figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_figures, "save", keep)
        run_figures.draw_run(history, Path("none"))
    return figures


def luminance(color):
    return sum(part * share for part, share in zip(color, (0.2126, 0.7152, 0.0722), strict=False))


def test_pictures_of_a_small_run_can_be_read():
    kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
    start = {f"layers.{i}.{kind}:rank": 8 for i in range(2) for kind in kinds}
    end = {axis: number for number, axis in enumerate(start)}
    events = [
        {"step": 1, "sizes": end, "total": 28, "active": 28, "allocated": 28, "budget": 28},
        {"step": 2, "sizes": {}, "total": 28, "active": 28, "allocated": 28, "budget": 28},
    ]
    history = History("a run", events, [(0, start), (1, end)], {"steps": 3})
    figures = figures_of(history)
    panels = [panel for panel in figures["ranks"].axes if panel.images]
    assert [panel.get_title() for panel in panels] == [
        "units at the end",
        "change since the start: 8 everywhere",
    ], "equal numbers are said once"
    for panel in panels:
        image = panel.images[0]
        assert len(panel.texts) == len(start)
        for text in panel.texts:
            column, row = text.get_position()
            cell = image.to_rgba(image.get_array())[int(row), int(column)]
            written = {"black": 0, "white": 1}[text.get_color()]
            assert abs(luminance(cell) - written) >= 0.5, "text and color differ"
        boxes = [label.get_window_extent() for label in panel.get_xticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    (budget,) = figures["budget"].axes
    for line in budget.lines:
        steps, units = line.get_data()
        assert steps[-1] == 3, "to the end of the training"
        if line.get_label() == "units in use":
            assert (steps[0], units[0]) == (0, 64)
    assert all(tick == int(tick) for tick in budget.get_xticks())
    assert budget.get_xlim()[0] == 0


def test_maps_of_one_scale_have_the_same_colors():
    known = {"one": 0.1, "two": 0.4}
    size, share = Scale("size"), Scale("share", highest=10)
    maps = [LayerMap(name, size, {"layers.0.q": value}) for name, value in known.items()]
    maps.append(LayerMap("three", share, {"layers.0.q": 3.0}))
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_maps, "save", lambda figure, file: figures.append(figure))
        layer_maps.heat_maps(maps, Path("none"))
    limits = {
        panel.get_title(): panel.images[0].get_clim()
        for panel in figures[0].axes
        if panel.images and panel.get_title()
    }
    assert limits == {"one": (0, 0.4), "two": (0, 0.4), "three": (0, 10)}
