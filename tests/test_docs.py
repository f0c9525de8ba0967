"""The documentation agrees with the code: snippets, configurations, links and tables."""

import ast
import copy
import importlib.util
import inspect
import json
import multiprocessing
import re
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import adaptrank
from adaptrank import PARAMETERIZATIONS, adapt, load_adapter, rank_axes, save_adapter
from adaptrank.axes import cost_model
from adaptrank.cli import VERBS, main
from adaptrank.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(DOCS.glob("*.md")),
]
PACKAGE = Path(adaptrank.__file__).parent


def blocks(page, language):
    """Texts of the fenced blocks of a language; those that say `no-run` are left out."""
    found = re.findall(
        r"^```(\w+)([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    return [text for name, rest, text in found if name == language and "no-run" not in rest]


SOURCES = {
    "my_allocator": "add_an_allocator",
    "my_strategy": "strategies",
    "row_blocks": "add_a_parameterization",
}
"""Module that a page tells to write -> page."""


def named_block(module):
    """The block of a page that begins with the name of its file."""
    texts = blocks(DOCS / f"{SOURCES[module]}.md", "python")
    return next(text for text in texts if text.startswith(f"# {module}.py\n"))


def with_blocks(language):
    return [pytest.param(page, id=page.stem) for page in PAGES if blocks(page, language)]


def extension():
    spec = importlib.util.spec_from_file_location("_ext", DOCS / "_ext.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["_ext"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def methods(tmp_path_factory):
    """The generated pages, in a folder of their own."""
    pytest.importorskip("sphinx")
    return extension().write_pages(tmp_path_factory.mktemp("docs") / "methods")


@pytest.fixture
def modules():
    """Forget, at the end, whatever modules a test imported."""
    before = dict(sys.modules)
    yield
    for name in (
        "my_allocator",
        "my_strategy",
        "row_blocks",
        *(n for n in sys.modules if n.startswith("snippets_")),
    ):
        if name not in before:
            sys.modules.pop(name, None)


# ---- snippets


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_snippets_run(page, tiny_llama, tmp_path, monkeypatch, modules):
    """The blocks of a page, one after the other, as one module; pretrained models are tiny ones."""
    import transformers

    def load_tiny(load, name, *args, **kwargs):
        return load(name if Path(name).is_dir() else tiny_llama, *args, **kwargs)

    for kind in ("ModelForCausalLM", "ModelForSequenceClassification", "Tokenizer"):
        loader = getattr(transformers, f"Auto{kind}")
        tiny = partial(load_tiny, loader.from_pretrained)
        monkeypatch.setattr(loader, "from_pretrained", tiny)
    # A cache in which the pretrained model of the pages is a tiny one.
    models = tmp_path / "cache" / "models"
    models.mkdir(parents=True)
    (models / "HuggingFaceTB--SmolLM2-135M-Instruct").symlink_to(tiny_llama)
    monkeypatch.setenv("ADAPTRANK_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    texts = blocks(page, "python")
    named = re.search(r"^# (\w+)\.py$", "\n".join(texts), re.MULTILINE)
    module = types.ModuleType(named[1] if named else f"snippets_{page.stem}")
    sys.modules[module.__name__] = module  # where pickle looks for its classes
    for text in texts:
        exec(compile(text, f"{page.name}", "exec"), module.__dict__)


CALM = [
    *(
        "--trainer.accelerator",
        "cpu",
        "--trainer.enable_progress_bar",
        "false",
        "--evaluate",
        "false",
    ),
    *(
        "--data.batch_size",
        "4",
        "--data.train_size",
        "40",
        "--data.val_size",
        "4",
        "--model.dtype",
        "fp32",
    ),
]


def fit(tmp_path, tiny_llama, *configs):
    """Run `fit` on configurations given as texts, with a tiny Llama. Return the run folder."""
    args = []
    for number, text in enumerate(configs):
        file = tmp_path / f"part{number}.yaml"
        file.write_text(re.sub(r"backbone: .*", f"backbone: {tiny_llama}", text))
        args += ["--config", str(file)]
    main(["fit", *args, *CALM, "--runs", str(tmp_path / "runs")])
    (folder,) = (tmp_path / "runs").glob("*/0")
    return folder


def test_an_allocator_from_the_docs_runs_from_a_file_named_in_yaml(
    tmp_path, tiny_llama, monkeypatch, modules
):
    page = DOCS / "add_an_allocator.md"
    code = blocks(page, "python")[0]
    (readme,) = (text for text in blocks(ROOT / "README.md", "python") if "Allocator" in text)
    assert code == readme
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    (tmp_path / "my_allocator.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_allocator", None)
    base = (
        (ROOT / "configs" / "lora_llama.yaml")
        .read_text()
        .replace("max_steps: 200", "max_steps: 20")
    )
    folder = fit(tmp_path, tiny_llama, base.replace("rank: 8", "rank: 4"), blocks(page, "yaml")[0])
    events = [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events] == [0, 10, 15]
    ranks = json.loads((folder / "ranks.json").read_text())
    assert len(ranks) == 14
    assert sum(ranks.values()) == 24


def test_a_parameterization_from_the_docs_is_complete(tmp_path, tiny_llama, monkeypatch, modules):
    """It is registered, trained by the command, pruned, grown, saved and loaded.

    The snippets of the page test the rest.
    """
    page = DOCS / "add_a_parameterization.md"
    (tmp_path / "row_blocks.py").write_text(blocks(page, "python")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("row_blocks", None)
    (config,) = (text for text in blocks(page, "yaml") if "RowBlocks" in text)
    folder = fit(tmp_path, tiny_llama, config)
    assert "RowBlocks" in PARAMETERIZATIONS
    assert "RowBlocks" not in {cls.stem for cls in (PACKAGE / "parameterizations").glob("*.py")}
    events = [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
    assert any(event["pruned"] for event in events)
    assert any(event["grown"] for event in events)
    from transformers import AutoModelForCausalLM

    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), folder / "adapter")
    ranks = json.loads((folder / "ranks.json").read_text())
    assert {key: len(axis) for key, axis in rank_axes(model).items()} == ranks
    assert len(set(ranks.values())) > 1


def test_a_strategy_from_the_docs_runs_from_a_file_named_in_yaml(
    tmp_path, tiny_llama, monkeypatch, modules
):
    code = named_block("my_strategy")
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    (tmp_path / "my_strategy.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_strategy", None)
    base = (ROOT / "configs" / "lora_llama.yaml").read_text()
    (own,) = (text for text in blocks(DOCS / "strategies.md", "yaml") if "my_strategy" in text)
    short = base.replace("max_steps: 200", "max_steps: 4")
    folder = fit(tmp_path, tiny_llama, short, own.replace("every: 20", "every: 2"))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [each["step"] for each in rounds] == [0, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(each["trained"] for each in rounds) == summary["trainable"]


# ---- configurations


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_yaml_blocks_parse(page, tmp_path, monkeypatch, capsys, modules):
    """Whole configurations and fragments of one alike go through the command's own parser."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for number, text in enumerate(blocks(page, "yaml")):
        config = yaml.safe_load(text)
        for module in re.findall(r"class_path: (my_allocator|my_strategy|row_blocks)\.", text):
            (tmp_path / f"{module}.py").write_text(named_block(module))
            sys.modules.pop(module, None)
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        base = (
            []
            if {"model", "data"} <= config.keys()
            else ["--config", str(ROOT / "configs" / "lora_llama.yaml")]
        )
        with pytest.raises(SystemExit) as stop:
            main(["fit", *base, "--config", str(file), "--print_config"])
        assert not stop.value.code, capsys.readouterr().err
        printed = yaml.safe_load(capsys.readouterr().out)
        for key in config:
            assert printed[key], key


def test_yaml_of_the_method_pages_is_what_the_class_takes(methods):
    for page in methods:
        for text in blocks(page, "yaml"):
            (entry,) = yaml.safe_load(text).values()
            entry = entry[0] if isinstance(entry, list) else entry
            known = {**PARAMETERIZATIONS, **adaptrank.ALLOCATORS, **STRATEGIES}[entry["class_path"]]
            defaults = {
                n: p.default
                for n, p in inspect.signature(known).parameters.items()
                if p.default is not p.empty
            }
            assert entry.get("init_args", {}) == defaults


def test_the_configuration_page_has_every_key_of_the_parser(capsys):
    page = (DOCS / "configuration.md").read_text()
    listed = set()
    for path in re.findall(r"^```\{keys\} (\S+)$", page, re.MULTILINE):
        module, _, name = path.rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        listed |= {(name, argument) for argument, *_ in extension().arguments(cls)}

    def keys(config, part, *classes):
        have = {argument for name, argument in listed if name in classes}
        assert have == config[part]["init_args"].keys(), part

    for config, task, data in (
        ("lora_llama", "CausalLM", ("ArithmeticProblems", "CompletionTask", "PackedTask")),
        (
            "smoke",
            "SequenceClassification",
            ("GeneratedQuestions", "IncrementalData", "LabelledData"),
        ),
    ):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(ROOT / "configs" / f"{config}.yaml"), "--print_config"])
        printed = yaml.safe_load(capsys.readouterr().out)
        keys(printed, "model", "AdaptedModule", task)
        assert printed["model"]["init_args"]["adapters"][0].keys() == {
            a for n, a in listed if n == "Adapter"
        }
        keys(printed, "data", "TaskData", *data)
        for key in printed.keys() - {
            "model",
            "data",
            "trainer",
            "allocator",
            "optimizer",
            "lr_scheduler",
        }:
            assert f"`{key}`" in page, key


def test_the_trainer_defaults_on_the_configuration_page():
    from adaptrank.cli.train import TRAINER_DEFAULTS

    section = (DOCS / "configuration.md").read_text().split("## `trainer`")[1].split("## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", section, re.MULTILINE))
    assert {key: yaml.safe_load(value) for key, value in rows.items()} == TRAINER_DEFAULTS


# ---- commands


def shell_lines():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from ((page, line) for block in blocks(page, "bash") for line in block.splitlines())
        yield from (
            (page, code) for code in re.findall(r"`((?:make|python -m adaptrank) [^`\n]+)`", text)
        )


def test_commands_name_what_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for page, line in shell_lines():
        for verb in re.findall(r"python -m adaptrank (\S+)", line):
            assert verb in VERBS or verb.startswith("-"), f"{page.name}: {line}"
            seen.add(verb)
        for target in re.findall(r"^make (\S+)", line):
            assert target in targets, f"{page.name}: {line}"
        for config in re.findall(r"configs/\S+\.yaml", line):
            assert (ROOT / config).is_file(), f"{page.name}: {line}"
    assert {"fit", "generate", "merge"} <= seen
    every = {f"configs/{file.name}" for file in (ROOT / "configs").glob("*.yaml")}
    assert every == set(
        re.findall(r"`(configs/\S+\.yaml)` \|", (DOCS / "quickstart.md").read_text())
    )


def test_the_readme_shows_the_command_on_its_first_screen():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "python -m adaptrank fit --config configs/hyperadapt_llama.yaml" in "\n".join(
        text.splitlines()[:15]
    )
    shown = re.search(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)[1]
    assert "<!-- demo-output -->" in shown or "Adapter saved:" in shown, (
        "the output is the command's own"
    )
    pins = re.search(r"^MODELS := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"pip install --no-deps {pins}\n" in text


# ---- pages and links


def test_every_page_is_in_a_toctree():
    index = (DOCS / "index.md").read_text()
    entries = [
        e
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.M | re.S)
        for e in tree.splitlines()
    ]
    entries = {e for e in entries if e and not e.startswith(":")}
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert pages | {"methods/index", "results/*"} == entries


def anchors(page):
    """Slugs of the headings of a page, as MyST and GitHub make them."""
    headings = re.findall(
        r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.MULTILINE
    )
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings
    }


def test_links_lead_somewhere(methods):
    generated = {page.name: page for page in methods}
    for page in [*PAGES, *methods]:
        text = re.sub(
            r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
        )
        for target in re.findall(r"(?<!\\)\]\(([^)\s]+)\)", text):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            home = DOCS / "methods" if page in methods else page.parent
            file = (home / path).resolve() if path else page
            if file.parent == (DOCS / "methods").resolve():
                file = generated.get(file.name, file)
            assert file.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(file), f"{page.name} links to {target}"


def test_every_registered_class_has_a_page(methods):
    shipped = [*PARAMETERIZATIONS.items(), *adaptrank.ALLOCATORS.items(), *STRATEGIES.items()]
    shipped += extension().optimizers().items()
    names = {name for name, cls in shipped if cls.__module__.startswith("adaptrank.")}
    assert {page.stem for page in methods} == names | {"index"}
    for page in methods:
        rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", page.read_text(), re.MULTILINE)
        assert all(what for _, what in rows), f"{page.name}: an argument is not documented: {rows}"


def test_method_pages_state_the_counts_of_a_layer(methods):
    text = {page.stem: page.read_text() for page in methods}
    assert "| 72 parameters with default arguments |" in text["HyperAdapt"]
    assert "| 576 parameters with default arguments; 72 parameters a unit" in text["LoRA"]
    assert "[arXiv:2106.09685](https://arxiv.org/abs/2106.09685)" in text["LoRA"]


def test_the_pages_name_no_place_of_a_machine():
    for page in [*PAGES, *DOCS.glob("*.py"), ROOT / ".pre-commit-config.yaml"]:
        assert not re.search(
            r"/work\b|/home/\w|/root\b|/tmp\b", page.read_text(encoding="utf-8")
        ), page.name


def build_documentation(theme, folder):
    """Build all pages, and exit with the code of the build. Every warning is an error."""
    from sphinx.cmd.build import main as build

    options = ["-W", "--keep-going", "-q", "-b", "html", "-D", f"html_theme={theme}"]
    files = ["-d", str(folder / "trees"), "-w", str(folder / "warnings")]
    sys.exit(build([*options, *files, str(DOCS), str(folder / "html")]))


@pytest.mark.parametrize("theme", ["basic", pytest.param("furo", marks=pytest.mark.tables)])
def test_the_documentation_builds_without_warnings(theme, tmp_path):
    """The theme of `make docs` is furo. A plain theme says the same, and takes half the time.

    The build runs in a process that is forked from this one, where the packages are imported.
    """
    pytest.importorskip("sphinx")
    pytest.importorskip(theme if theme == "furo" else "sphinx")
    arguments = (theme, tmp_path)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=build_documentation, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "warnings").read_text()
    assert (tmp_path / "html" / "methods" / "LoRA.html").is_file()


# ---- the architecture page


def imports_of(part):
    """Parts of the package that a part imports, lazily or not."""
    files = (
        [PACKAGE / f"{part}.py"]
        if (PACKAGE / f"{part}.py").is_file()
        else sorted((PACKAGE / part).rglob("*.py"))
    )
    assert files, part
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = (
                    [f"{node.module}.{a.name}" for a in node.names]
                    if node.module == "adaptrank"
                    else [node.module]
                )
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            found |= {
                name.split(".")[1] for name in names if name and name.startswith("adaptrank.")
            }
    return found - {part}


SAME_ROLE = {"engine", "fused", "low_rank", "renamed", "seeding"}
"""Names of files that stand in several rooms because they do the same there."""


def test_imports_point_one_way_as_the_architecture_page_says():
    table = re.findall(
        r"^\| `(\w+)` \| (.*?) \|", (DOCS / "architecture.md").read_text(), re.MULTILINE
    )
    allowed = {part: set(re.findall(r"`(\w+)`", names)) for part, names in table}
    parts = {
        file.stem
        for file in PACKAGE.iterdir()
        if file.suffix == ".py" or (file / "__init__.py").is_file()
    }
    assert parts - {"__init__", "__main__"} == allowed.keys()
    above = []
    for part, names in allowed.items():
        if part != "cli":  # knows everyone
            assert imports_of(part) == names, part
            assert names <= set(above), f"{part} stands before what it imports"
        above.append(part)


def test_the_picture_of_the_rooms_has_every_room_and_only_real_arrows():
    page = (DOCS / "architecture.md").read_text()
    picture = re.search(r"^```mermaid\n(.*?)^```", page, re.MULTILINE | re.DOTALL).group(1)
    arrows = re.findall(r"^ *(\w+) --> (\w+)$", picture, re.MULTILINE)
    rooms = {file.name for file in PACKAGE.iterdir() if (file / "__init__.py").is_file()}
    assert rooms | {"registry"} == {room for arrow in arrows for room in arrow}
    for room, imported in arrows:
        assert imported in imports_of(room), f"{room} does not import {imported}"


def test_no_two_files_share_a_name_unless_they_play_the_same_role():
    names = [file.stem for file in PACKAGE.rglob("*.py") if file.stem != "__init__"]
    assert {name for name in names if names.count(name) > 1} <= SAME_ROLE


def test_nothing_names_a_method_outside_of_its_file():
    """No name, attribute or import of a parameterization in what works for all of them."""
    methods = {
        name for name, cls in PARAMETERIZATIONS.items() if cls.__module__.startswith("adaptrank.")
    }
    for part in (
        "axes",
        "injection",
        "training",
        "allocation",
        "artifacts",
        "modules",
        "testing",
        "data",
    ):
        for file in (
            [PACKAGE / f"{part}.py"]
            if (PACKAGE / f"{part}.py").is_file()
            else (PACKAGE / part).rglob("*.py")
        ):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = {getattr(node, "id", None), getattr(node, "attr", None)}
                names |= {
                    alias.name
                    for alias in getattr(node, "names", [])
                    if isinstance(alias, ast.alias)
                }
                names |= (
                    {node.value}
                    if isinstance(node, ast.Constant) and isinstance(node.value, str)
                    else set()
                )
                assert not names & methods, f"{file.name}, line {node.lineno}"


# ---- figures and gotchas


def test_counts_on_the_page_how_to_choose():
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = re.findall(
        r"^\| `\[(.*)\]` \| ([\d,]+) \| ([\d.]+) % \|$",
        (DOCS / "how_to_choose.md").read_text(),
        re.M,
    )
    assert len(rows) == 5
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    for nest, count, share in rows:
        model = copy.deepcopy(base)
        total = sum(p.numel() for p in model.parameters())
        makers = []
        for name, rank in re.findall(r"(\w+)(?:\(rank=(\d+)\))?", nest):
            makers.append(partial(PARAMETERIZATIONS[name], **({"rank": int(rank)} if rank else {})))
        adapt(model, "all-linear", makers)
        cost = cost_model(model).total({key: len(axis) for key, axis in rank_axes(model).items()})
        assert (total, f"{cost:,}", f"{100 * cost / total:.2f}") == (134_515_008, count, share)


def test_t5_and_multihead_attention_read_the_weight():
    from transformers import T5Config, T5ForConditionalGeneration

    formulas = importlib.import_module("adaptrank.parameterizations.formula")
    config = T5Config(
        d_model=16,
        d_kv=4,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        vocab_size=30,
        decoder_start_token_id=0,
    )
    t5 = adapt(T5ForConditionalGeneration(config), "all-linear", PARAMETERIZATIONS["DoRA"])
    encoder = adapt(nn.TransformerEncoderLayer(16, 2, 32), "all-linear", PARAMETERIZATIONS["LoRA"])
    for model, inputs, ending in (
        (t5, {"input_ids": torch.arange(5)[None], "labels": torch.arange(4)[None]}, ".wo"),
        (encoder, {"src": torch.randn(3, 2, 16)}, ".out_proj"),
    ):
        built = set()
        paths = {module: path for path, module in model.named_modules()}
        with pytest.MonkeyPatch.context() as patch:
            evaluate = formulas.evaluate

            def watched(wrapper, compute, paths=paths, built=built, evaluate=evaluate):
                built.add(paths[wrapper])
                return evaluate(wrapper, compute)

            patch.setattr(formulas, "evaluate", watched)
            model(**inputs)
        assert built
        assert all(path.endswith(ending) for path in built)


@pytest.mark.tables
def test_compiling_gives_up_after_eight_resizes_unless_sizes_are_dynamic():
    from torch import _dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    compilations = {}
    for static in (True, False):
        dynamo.reset()
        counter = CompileCounter()
        model = nn.Sequential(
            *[PARAMETERIZATIONS["LoRA"](nn.Linear(8, 8), rank=2) for _ in range(2)]
        )
        with dynamo.config.patch(force_parameter_static_shapes=static):
            compiled = torch.compile(model, backend=counter)
            compiled(torch.randn(2, 8))
            for _ in range(12):
                rank_axes(model)["0:rank"].resize(grow=1)
                compiled(torch.randn(2, 8))
        compilations[static] = counter.frame_count
    dynamo.reset()
    assert compilations == {True: 8, False: 2}


def test_a_second_adapter_file_of_another_base_is_told_apart(tmp_path, caplog):
    """The sentence that the page quotes is the one that is logged."""
    torch.manual_seed(0)
    save_adapter(
        adapt(nn.Sequential(nn.Linear(4, 4)), "all-linear", PARAMETERIZATIONS["LoRA"]), tmp_path
    )
    load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)
    quoted = re.search(r'"(The base differs[^"]+)"', (DOCS / "gotchas.md").read_text())[1]
    assert quoted in caplog.text
