"""Pages and tables made from the code: a page for every registered class, and tables of arguments.

Nothing here names a method. A page holds the docstring, the signature and the attributes of its
class, and figures of the method on its example at the time of the build. The example is a layer of
24 x 48, unless the method wraps something else.
"""

import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = "methods"
KEPT: dict[str, list[str]] = {}
SECTION = re.compile(r"^([A-Z][a-z]+):(?: +(.*))?$")


# ---- docstrings


@dataclass
class Doc:
    """Parts of a docstring: first paragraph, other paragraphs, and sections such as `Args:`."""

    summary: str = ""
    body: list[str] = field(default_factory=list)
    sections: dict[str, str] = field(default_factory=dict)

    def arguments(self) -> dict[str, str]:
        """Return the meaning of each argument. An entry may name several arguments."""
        meanings = {}
        for entry in re.split(r"\n(?= {4}\w)", "\n" + self.sections.get("Args", "")):
            names, colon, text = entry.strip().partition(": ")
            if not colon:
                continue
            for name in names.split(","):
                meanings[name.strip().lstrip("*")] = " ".join(text.split())
        return meanings


def read(docstring: str) -> Doc:
    """Split a docstring into its parts."""
    doc, paragraph, section = Doc(), [], None
    for line in [*inspect.cleandoc(docstring).splitlines(), ""]:
        header = SECTION.match(line)
        if header:
            section = header[1]
            doc.sections[section] = header[2] or ""
        elif section and (line or section == "Args"):
            doc.sections[section] += f"\n{line}"
        elif line:
            section = None
            paragraph.append(line)
            continue
        else:
            section = None
        if paragraph:
            doc.body.append("\n".join(paragraph))
            paragraph = []
    doc.summary = doc.body.pop(0) if doc.body else ""
    return doc


def arguments(cls: Callable[..., Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, type, default, meaning) of every argument of a class but `base`."""
    documented = documented_arguments(cls)
    for parameter in inspect.signature(cls).parameters.values():
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.name == "base" or variadic:
            continue
        default = "" if parameter.default is parameter.empty else spell(parameter.default)
        meaning = documented.get(parameter.name, "")
        yield parameter.name, spell_type(parameter.annotation), default, meaning


def documented_arguments(cls: Callable[..., Any]) -> dict[str, str]:
    """Return the meanings of the arguments of a class, from its own docstring or a base's.

    An entry "as in `Allocator`" refers to a base class, whose entry is taken.
    """
    meanings: dict[str, str] = {}
    for base in getattr(cls, "__mro__", [cls]):
        for name, text in read(base.__dict__.get("__doc__") or "").arguments().items():
            if not text.startswith("as in"):
                meanings.setdefault(name, text)
    return meanings


def spell(value: Any) -> str:
    """Return a default as it is written in YAML."""
    if inspect.isclass(value):
        return value.__name__
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=1000)
    except yaml.YAMLError:
        return str(value)
    return text.removesuffix("...\n").strip()


def spell_type(annotation: Any) -> str:
    """Return a type without the names of modules."""
    text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace("NoneType", "None")


# ---- Markdown


def plain(text: str) -> str:
    """Escape a text for Markdown. Code spans stay, and arXiv ids become links."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    shown = [
        part if part.startswith("`") else re.sub(r"([\\*_<>|$\[\]{}#~^])", r"\\\1", part)
        for part in parts
    ]
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "".join(shown))


def prose(text: str) -> str:
    """Return a paragraph, followed by a list where lines begin with a dash."""
    first, *items = re.split(r"^- ", text, flags=re.MULTILINE)
    shown = "\n".join(f"- {plain(item)}" for item in items)
    return "\n\n".join(part for part in (plain(first), shown) if part)


def code(text: str) -> str:
    """Return a code span that is valid in a table."""
    text = text.replace("|", r"\|")
    fence = "`` " if "`" in text else "`"
    return f"{fence}{text}{fence[::-1]}" if text else ""


def table(rows: list[tuple[str, ...]], *header: str) -> str:
    """Return a Markdown table."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def argument_table(cls: Callable[..., Any]) -> str:
    """Return a table of the arguments of a class."""
    rows = [
        (code(n), code(kind), code(default), plain(what))
        for n, kind, default, what in arguments(cls)
    ]
    return table(rows, "argument", "type", "default", "meaning") if rows else "There are none."


def init_args(cls: Callable[..., Any]) -> str:
    """Return every argument at its default, as YAML in an entry that is indented by two."""
    lines = "".join(f"    {name}: {default}\n" for name, _, default, _ in arguments(cls))
    return f"init_args:\n{lines}" if lines else "init_args: {}\n"


# ---- pages


def own(registry: Any) -> dict[str, type]:
    """Return the classes of a registry that belong to the package."""
    return {name: cls for name, cls in registry.items() if cls.__module__.startswith("adaptrank.")}


def links(names: list[str]) -> str:
    """Return links to method pages."""
    return ", ".join(f"[{name}]({name}.md)" for name in names) or "none"


def axis_words(layer: Any, axis: str) -> str:
    """Describe an axis: its tensors, the dimensions that count units, and the closing factor."""
    dims: dict[str, list[str]] = {}
    for tensor, dim in layer.axis_tensors(axis):
        dims.setdefault(tensor, []).append(str(dim))
    said = [
        f"`{t}` (dimension{'s' if len(d) > 1 else ''} {' and '.join(d)})" for t, d in dims.items()
    ]
    opening, closing = ", ".join(said[:-1]), f"{said[-1]}, which closes"
    return f"`{axis}`: {opening} and {closing}" if opening else f"`{axis}`: {closing}"


def cost_rows(cost: Any) -> dict[str, str]:
    """Return the rows of a cost, whose closed formulas the tests measure."""
    return {
        "FLOPs per token": f"{cost.flops:,} there, in the products of a forward",
        "FLOPs per call": f"{cost.flops_once:,} there, however many tokens"
        if cost.flops_once
        else "",
        "Kept per token": f"{cost.kept:,} numbers there, for the backward pass",
    }


def parameterization_page(name: str, cls: Any) -> str:
    """Return the page of a parameterization."""
    from adaptrank import layers
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.axes import cost_model, rank_axes
    from adaptrank.parameterizations import on_example

    doc = read(cls.__doc__)
    layer = on_example(cls)
    sizes = {key: len(axis) for key, axis in rank_axes(layer).items()}
    parameters, cost = cost_model(layer), layer.cost()
    kind = type(layer.innermost).__name__
    matrix = isinstance(layer.innermost, layers.MATRICES)
    where = "On a {} x {} layer".format(*layer.shape) if matrix else f"On its example (`{kind}`)"
    units = []
    for key, axis in rank_axes(layer).items():
        most = axis.limits()[1]
        ceiling = f"at most {most} units" if most else "no ceiling"
        which = f"`{key.rpartition(':')[2]}`: " if len(sizes) > 1 else ""
        units.append(
            f"{which}{parameters.marginal(key, sizes):,} parameters a unit, "
            f"{sizes[key]} units by default, {ceiling}"
        )
    allocators = [a for a, allocator in own(ALLOCATORS).items() if allocator.pair(name)]
    facts = {
        "Source": plain(doc.sections.get("Source", cls.source)),
        "Shapes": plain(doc.sections.get("Shapes", "")),
        "Rank axes": "; ".join(axis_words(layer, axis) for axis in layer.axes)
        or "none: its cost is fixed",
        where: "; ".join(
            [f"{parameters.total(sizes):,} parameters with default arguments", *units]
        ),
        **({} if cost is None else cost_rows(cost)),
        "Merges into the weight": "yes" if layer.mergeable else "no",
        "Wraps": cls.wraps_what(),
        "Reads the weight": "yes: what it wraps must have a dense one"
        if layer.reads_weight
        else "",
        "Splits fused projections": "yes, unless `split_fused` is false"
        if layer.reads_blocks
        else "",
        "Starts at the base": "" if layer.starts_at_base else "no",
        "Tied across layers": ", ".join(f"`{t}`" for t in layer.shared),
        "Exempt from weight decay": ", ".join(f"`{t}`" for t in layer.no_decay),
        "Kinds of trained tensors": kinds_of_tensors(layer),
        "Axes can": ", ".join(["shrink", *sorted(layer.capabilities)]) if layer.axes else "",
        "Allocators that work": links(allocators),
        **{
            k: plain(v)
            for k, v in doc.sections.items()
            if k not in ("Source", "Shapes", "Args", "Raises")
        },
        "Errors": plain(doc.sections.get("Raises", "")),
        "File": f"`{cls.__module__.replace('.', '/')}.py`",
    }
    return "\n\n".join(
        [
            f"# {name}",
            f"```text\n{doc.summary}\n```",
            *map(prose, doc.body),
            table([(k, v) for k, v in facts.items() if v], "", ""),
            "## Arguments",
            argument_table(cls),
            "In YAML, with every argument at its default:",
            f"```yaml\nparameterization:\n- class_path: {name}\n  {init_args(cls)}```",
        ]
    )


def kinds_of_tensors(layer: Any) -> str:
    """Return the trained tensors of a wrapper by their kinds, for its page."""
    tensors: dict[str, list[str]] = {}
    for name, _ in layer.own_parameters():
        tensors.setdefault(layer.kind_of(name), []).append(f"`{name}`")
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in tensors.items())


def allocator_page(name: str, cls: Any) -> str:
    """Return the page of an allocator."""
    from adaptrank.parameterizations import PARAMETERIZATIONS

    doc = read(cls.__doc__)
    methods = own(PARAMETERIZATIONS)
    cells = {m: cls.pair(m) for m in methods}
    refused = [m for m, cell in cells.items() if not cell]
    facts = {
        "Source": plain(doc.sections.get("Source", cls.source)),
        "Works with": links([m for m, cell in cells.items() if cell == "works"]),
        **{
            f"Works with `{cell}`": links([m for m in methods if cells[m] == cell])
            for cell in options_of(cells)
        },
        "Does not work with": f"{links(refused)}, unless nested with one that does"
        if refused
        else "",
        "Needs axes that": ", ".join(["shrink", *sorted(cls.requires)]),
        "Errors": plain(doc.sections.get("Raises", "")),
        "File": f"`{cls.__module__.replace('.', '/')}.py`",
    }
    return "\n\n".join(
        [
            f"# {cls.default_title()}",
            plain(doc.summary),
            *map(prose, doc.body),
            table([(k, v) for k, v in facts.items() if v], "", ""),
            "## Arguments",
            argument_table(cls),
            "The arguments that all allocators share are in "
            "[Configuration](../configuration.md#allocator).",
            "In YAML, with every argument at its default:",
            f"```yaml\nallocator:\n  class_path: {name}\n  {init_args(cls)}```",
        ]
    )


def strategy_page(name: str, cls: Any) -> str:
    """Return the page of a training strategy."""
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.parameterizations import PARAMETERIZATIONS
    from adaptrank.strategies import beside_allocator, on_method

    doc = read(cls.__doc__)
    of_methods = {m: on_method(cls, m) for m in own(PARAMETERIZATIONS)}
    of_allocators = {a: beside_allocator(cls, kind) for a, kind in own(ALLOCATORS).items()}
    facts = {
        "Source": plain(doc.sections.get("Source", cls.source)),
        "Function of the model at a border": "stays, in evaluation mode"
        if cls.preserves_function
        else "changes",
        "Works with": links([m for m, cell in of_methods.items() if cell == "works"]),
        **refusals("Does not work with", of_methods),
        "Allocators that work": links([a for a, cell in of_allocators.items() if cell == "works"]),
        **refusals("Allocators that do not", of_allocators),
        "Errors": plain(doc.sections.get("Raises", "")),
        "File": f"`{cls.__module__.replace('.', '/')}.py`",
    }
    return "\n\n".join(
        [
            f"# {name}",
            plain(doc.summary),
            *map(prose, doc.body),
            table([(k, v) for k, v in facts.items() if v], "", ""),
            "## Arguments",
            argument_table(cls),
            "[Strategies](../strategies.md) says how strategies compare, and how to write one.",
            "In YAML, with every argument at its default:",
            f"```yaml\ntraining_strategy:\n  class_path: {name}\n  {init_args(cls)}```",
        ]
    )


def refusals(title: str, cells: Mapping[str, str]) -> dict[str, str]:
    """Return a fact with the names that are refused, grouped by the reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in cells.items():
        if reason != "works":
            reasons.setdefault(reason, []).append(name)
    said = [f"{links(names)} ({plain(reason)})" for reason, names in reasons.items()]
    return {title: "; ".join(said)}


def optimizer_page(name: str, cls: Any) -> str:
    """Return the page of an optimizer."""
    from adaptrank.parameterizations import PARAMETERIZATIONS

    doc = read(cls.__doc__)
    pair = import_module("adaptrank.optimizers").optimizer_pair
    cells = {m: pair(cls, m) for m in own(PARAMETERIZATIONS)}
    facts = {
        "Source": plain(doc.sections.get("Source", cls.source)),
        "Works with": links([m for m, cell in cells.items() if cell == "works"]),
        **refusals("Does not work with", cells),
        "Errors": plain(doc.sections.get("Raises", "")),
        "File": f"`{cls.__module__.replace('.', '/')}.py`",
    }
    return "\n\n".join(
        [
            f"# {name}",
            plain(doc.summary),
            *map(prose, doc.body),
            table([(k, v) for k, v in facts.items() if v], "", ""),
            "## Arguments",
            argument_table(cls),
        ]
    )


def optimizers() -> dict[str, type]:
    """Return the optimizers of the package by name."""
    if find_spec("adaptrank.optimizers") is None:
        return {}
    return own(import_module("adaptrank.optimizers").OPTIMIZERS)


def options_of(cells: Mapping[str, str]) -> list[str]:
    """Return the options that have to be off in some pairs."""
    return sorted({cell for cell in cells.values() if cell not in ("", "works")})


def cell(pair: str) -> str:
    """Return a cell of the table of pairs."""
    return {"works": "yes", "": "no"}.get(pair, f"`{pair}`")


def index_page() -> str:
    """Return a page with all registries, and the tables of what fits what."""
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.allocation.compatibility import nests
    from adaptrank.parameterizations import PARAMETERIZATIONS
    from adaptrank.strategies import STRATEGIES

    methods, allocators = own(PARAMETERIZATIONS), own(ALLOCATORS)
    strategies, own_optimizers = own(STRATEGIES), optimizers()
    made = [
        (links([n]), code(" ".join(read(c.__doc__).summary.split())), plain(c.source))
        for n, c in methods.items()
    ]
    movers = [
        (links([n]), plain(read(c.__doc__).summary), plain(c.source)) for n, c in allocators.items()
    ]
    pairs = [
        (
            " on ".join(links([m]) for m in reversed(nest)),
            *(cell(c.pair(*nest)) for c in allocators.values()),
        )
        for nest in nests()
    ]
    toctree = "\n".join([*methods, *allocators, *strategies, *own_optimizers])
    return "\n\n".join(
        [
            "# Methods",
            "These pages are made from the code at every build. `python -m adaptrank methods` "
            "prints the same table.",
            "## Parameterizations",
            table(made, "name", "what changes in a weight", "source"),
            "## Allocators",
            table(movers, "name", "what moves", "source"),
            "## Training strategies",
            "[Strategies](../strategies.md) says which to choose, and what they fit.",
            table(summaries(strategies), "name", "what happens between rounds", "source"),
            *optimizer_section(own_optimizers),
            "## Which pairs work",
            "A method without a rank axis has nothing to move by itself. In a nest with a method "
            "that has one, it is a fixed cost. An option in a cell has to be off, because the "
            "method does not support it. Every cell is a test.",
            table(pairs, "", *(links([name]) for name in allocators)),
            f"```{{toctree}}\n:hidden:\n\n{toctree}\n```",
        ]
    )


def summaries(classes: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return rows of a link, the first paragraph of the docstring, and the source."""
    return [
        (links([name]), plain(read(cls.__doc__).summary), plain(cls.source))
        for name, cls in classes.items()
    ]


def optimizer_section(classes: Mapping[str, Any]) -> list[str]:
    """Return the section of the optimizers, or nothing where there are none."""
    if not classes:
        return []
    return ["## Optimizers", table(summaries(classes), "name", "what is different", "source")]


def strategy_table() -> str:
    """Return a table of the training strategies: what each one fits, and what stays at a border."""
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.parameterizations import PARAMETERIZATIONS
    from adaptrank.strategies import STRATEGIES, beside_allocator, on_method

    rows = []
    for name, cls in own(STRATEGIES).items():
        of_methods = {m: on_method(cls, m) for m in own(PARAMETERIZATIONS)}
        of_allocators = {a: beside_allocator(cls, kind) for a, kind in own(ALLOCATORS).items()}
        page = f"[{name}](methods/{name}.md)"
        stays = "stays" if cls.preserves_function else "changes"
        rows.append((page, _which(of_methods), _which(of_allocators), stays))
    return table(rows, "strategy", "methods", "allocators", "function at a border")


def studied_rates_table() -> str:
    """Return a table of the methods whose learning rate a study chose, and of a fresh head."""
    from adaptrank.modules.learning_rates import STUDIED_HEAD
    from adaptrank.parameterizations import PARAMETERIZATIONS

    studied = {
        f"[{name}](methods/{name}.md)": vars(cls)["studied_rate"]
        for name, cls in own(PARAMETERIZATIONS).items()
        if "studied_rate" in vars(cls)
    }
    rows = []
    for name, (rate, file) in [*studied.items(), ("a fresh head", STUDIED_HEAD)]:
        page = Path(file).relative_to("docs")
        study = f"[{page.stem.removeprefix('study_').replace('_', ' ')}]({page})"
        rows.append((name, f"{rate:g}", study))
    return table(rows, "method", "rate", "study")


def _which(cells: Mapping[str, str]) -> str:
    """Return the names that work or, if these are fewer, all but the names that do not."""
    works = [name for name, cell in cells.items() if cell == "works"]
    refused = [name for name in cells if name not in works]
    if not refused:
        return "all"
    if not works:
        return "none"
    if len(refused) < len(works):
        return f"all but {', '.join(refused)}"
    return ", ".join(works)


def write_pages(folder: Path) -> list[Path]:
    """Write every page into an empty folder."""
    from adaptrank.allocation import ALLOCATORS
    from adaptrank.parameterizations import PARAMETERIZATIONS
    from adaptrank.strategies import STRATEGIES

    pages = {"index": index_page()}
    pages |= {
        name: parameterization_page(name, cls) for name, cls in own(PARAMETERIZATIONS).items()
    }
    pages |= {name: allocator_page(name, cls) for name, cls in own(ALLOCATORS).items()}
    pages |= {name: strategy_page(name, cls) for name, cls in own(STRATEGIES).items()}
    pages |= {name: optimizer_page(name, cls) for name, cls in optimizers().items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, text in pages.items():
        (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    return sorted(folder.iterdir())


# ---- Sphinx


class Keys(SphinxDirective):
    """Directive ```{keys} package.Class```: a table of the arguments of the class."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        module, _, name = self.arguments[0].rpartition(".")
        return self.parse_text_to_nodes(argument_table(getattr(import_module(module), name)))


class Strategies(SphinxDirective):
    """Directive ```{strategies}```: a table of the training strategies and what they fit."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(strategy_table())


class StudiedRates(SphinxDirective):
    """Directive ```{studied-rates}```: a table of the rates that studies of methods chose."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(studied_rates_table())


def to_rst(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert a docstring from plain text with code spans to reStructuredText.

    Characters such as | and * have a meaning there, and are escaped.
    """
    text = "\n".join(lines)
    text = re.sub(
        r"^( *)```(\w+)\n(.*?)\n\1```",
        lambda m: (
            f"{m[1]}.. code-block:: {m[2]}\n\n"
            + re.sub(r"^", "    ", m[3], flags=re.MULTILINE)
            + "\n"
        ),
        text,
        flags=re.MULTILINE | re.DOTALL,
    )
    parts = re.split(r"(?<!`)(`[^`\n]+`)(?!`)", text)
    shown = [
        f"`{p}`" if p.startswith("`") else re.sub(r"([*|]|_(?!\w))", r"\\\1", p) for p in parts
    ]
    text = re.sub(
        r"^(?=(?:Source|Shapes|Penalty|Args|Raises|Returns):)",
        "\n",
        "".join(shown),
        flags=re.MULTILINE,
    )
    lines[:] = text.splitlines()
    if what in (
        "attribute",
        "property",
    ):  # napoleon would take what stands before a colon for the type
        KEPT[name] = list(lines)


def keep_attributes(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Restore the text of an attribute, which napoleon has changed."""
    lines[:] = KEPT.pop(name, lines)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive and the hooks."""
    app.add_directive("keys", Keys)
    app.add_directive("strategies", Strategies)
    app.add_directive("studied-rates", StudiedRates)
    app.connect("builder-inited", lambda app: write_pages(Path(app.srcdir) / FOLDER))
    app.connect("autodoc-process-docstring", to_rst, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", keep_attributes, priority=900)  # after it
    return {"parallel_read_safe": True}
