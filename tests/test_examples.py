"""The examples run, stay short, and use public names only."""

import ast
import html
import json
import logging
import re
import runpy
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LAST_LINES = {
    "composing_adapters": r"ties: losses 0\.\d+ and 0\.\d+, ranks \[8, 2\]",
    "own_allocator": r"2:rank has \d units",
    "own_parameterization": "merged: the first layer is a Linear",
    "training_loop": r"4:rank has \d units",
    "transformers_trainer": r"the ranks lie between \d and \d",
}

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request):
    return request.param


@pytest.mark.filterwarnings("ignore")
def test_an_example_runs(example, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(example), run_name="__main__")
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(LAST_LINES[example.stem], last_line)


def test_an_example_has_fewer_than_80_lines(example):
    assert len(example.read_text(encoding="utf-8").splitlines()) < 80


def test_an_example_uses_no_private_name(example):
    for node in ast.walk(ast.parse(example.read_text(encoding="utf-8"))):
        name = getattr(node, "attr", None) or getattr(node, "module", None) or ""
        parts = name.split(".")
        assert not any(re.match(r"_[a-z]", part) for part in parts), name


def test_the_readme_names_every_example():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert f"examples/{path.name}" in readme
        assert f"examples/{path.name}" in index


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(path):
    """Read the code cells of a notebook, which hold no outputs in the file."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    codes = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in codes)
    return ["".join(cell["source"]) for cell in codes]


def check_texts_and_pictures(texts):
    assert "trainable 4,096 of 24,224" in texts[1]
    assert "Epoch" in texts[2]
    assert "units 56 -> 56 on 14 axes" in html.unescape(texts[3])
    assert "data:image/png;base64" in texts[3]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_of_a_notebook_print_text_and_pictures(path, tmp_path, monkeypatch, capsys):
    """Its cells run one after the other, and the value of a last line is shown as Jupyter does."""
    monkeypatch.chdir(tmp_path)
    names, texts = {"__name__": path.stem}, []
    for code in cells(path):
        *statements, last = ast.parse(code).body
        is_shown = isinstance(last, ast.Expr)
        body = ast.Module(statements if is_shown else [*statements, last], type_ignores=[])
        exec(compile(body, path.name, "exec"), names)
        value = eval(ast.unparse(last), names) if is_shown else None
        printed = capsys.readouterr()
        shown = value._repr_html_() if hasattr(value, "_repr_html_") else repr(value)
        texts.append(printed.out + printed.err + shown)
    check_texts_and_pictures(texts)


@pytest.mark.tables
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_text_and_pictures(path, tmp_path):
    """Its cells are executed in a kernel of their own."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": tmp_path}}
    ).execute()
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    check_texts_and_pictures(["".join(map(str, cell.outputs)) for cell in codes])
