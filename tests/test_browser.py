"""Pages of reports in a real browser, where one is installed.

On a laptop and on a phone nothing sticks out, and every picture is there.
"""

import html
import json
import re
import shutil
import subprocess

import pytest
from test_studies import made

from adaptrank.reports.history import History
from adaptrank.reports.ranks import write_report
from adaptrank.reports.study import write_study

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
FRAME = """<!doctype html>
<iframe id="page" width="{width}" height="800" srcdoc="{page}"></iframe>
<pre id="found"></pre>
<script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const inside = frame.contentDocument, root = inside.documentElement;
  const fontSize = element =>
    parseFloat(frame.contentWindow.getComputedStyle(element).fontSize);
  document.getElementById("found").textContent = "found" + JSON.stringify({{
    page: root.scrollWidth, window: root.clientWidth,
    pictures: [...inside.images].map(image => image.naturalWidth),
    text: inside.body.innerText.length,
    smallest: Math.min(...[...inside.querySelectorAll("td, th, p")].map(fontSize)),
  }}) + "found";
}};
</script>"""


def looked_at(file, width, folder):
    """Return what a browser measures of a page in a window of this width."""
    outer = folder / f"frame-{width}.html"
    outer.write_text(FRAME.format(width=width, page=html.escape(file.read_text(), quote=True)))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--window-size=1600,1000",
    ]
    done = subprocess.run(
        [*command, f"--user-data-dir={folder / 'profile'}", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return json.loads(html.unescape(re.search("found({.*})found", done.stdout)[1]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    write_study(made(folder, seeds=[0, 1, 2], limits="As small as can be."), folder / "study")
    axes = {f"model.layers.{i}.self_attn.{kind}_proj:rank": 4 for i in range(6) for kind in "qkvo"}
    events = [
        {
            "step": 0,
            "reason": "the start",
            "sizes": axes,
            "active": 96,
            "allocated": 96,
            "pruned": {},
            "grown": {},
            "closed": {},
        },
        {
            "step": 10,
            "budget": 90,
            "unit": "ranks",
            "sizes": {next(iter(axes)): 2},
            "pruned": {next(iter(axes)): [2, 3]},
            "grown": {},
            "closed": {},
            "active": 94,
            "allocated": 94,
            "total": 94,
            "reason": "a budget of 90",
            "scores": {"min": 0, "q25": 1, "median": 2, "q75": 3, "max": 4},
        },
    ]
    history = History("a run", events, [(0, axes), (10, {**axes, next(iter(axes)): 2})], {})
    write_report(
        history,
        folder / "run",
        "python -m adaptrank fit --config a/rather/long/path/to/a/config.yaml "
        "--model.rank_pattern and/another/ranks.json",
    )
    return {"study": folder / "study" / "index.html", "run": folder / "run" / "index.html"}


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["study", "run"])
def test_a_page_fits_its_window(pages, name, width, tmp_path):
    found = looked_at(pages[name], width, tmp_path)
    assert found["page"] <= found["window"] + 1, "the page itself scrolls sideways"
    assert found["pictures"]
    assert all(found["pictures"])
    assert found["text"] > 200
    assert found["smallest"] >= 13
