"""Import paths of version 0.1 and where their names are now.

An old path still works, and warns with the new one. `docs/migration.md` shows the same table.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED: dict[str, tuple[str, ...]] = {
    "adaptrank.allocators": ("adaptrank.allocation",),
    "adaptrank.allocators.ablation": ("adaptrank.allocation.scores.ablation",),
    "adaptrank.allocators.adalora": ("adaptrank.allocation.methods.adalora",),
    "adaptrank.allocators.alora": ("adaptrank.allocation.methods.alora",),
    "adaptrank.allocators.base": (
        "adaptrank.allocation",
        "adaptrank.allocation.context",
        "adaptrank.allocation.state",
        "adaptrank.allocation.shells.lightning",
    ),
    "adaptrank.allocators.beamlora": (
        "adaptrank.allocation.methods.beamlora",
        "adaptrank.allocation.copying",
    ),
    "adaptrank.allocators.blocks": ("adaptrank.allocation.initial.blocks",),
    "adaptrank.allocators.dylora": ("adaptrank.allocation.methods.dylora",),
    "adaptrank.allocators.elalora": ("adaptrank.allocation.methods.elalora",),
    "adaptrank.allocators.eva": (
        "adaptrank.allocation.initial.eva",
        "adaptrank.allocation.initial.input_parts",
    ),
    "adaptrank.allocators.gates": ("adaptrank.allocation.gates",),
    "adaptrank.allocators.gelora": (
        "adaptrank.allocation.initial.gelora",
        "adaptrank.allocation.initial.hidden_states",
    ),
    "adaptrank.allocators.gora": ("adaptrank.allocation.initial.gora",),
    "adaptrank.allocators.inputs": ("adaptrank.allocation.initial.layer_inputs",),
    "adaptrank.allocators.intrinsic_dimension": (
        "adaptrank.allocation.initial.intrinsic_dimension",
    ),
    "adaptrank.allocators.loraprune": ("adaptrank.allocation.methods.loraprune",),
    "adaptrank.allocators.pairs": ("adaptrank.allocation.compatibility",),
    "adaptrank.allocators.plans": ("adaptrank.allocation.plans",),
    "adaptrank.allocators.prilora": ("adaptrank.allocation.initial.prilora",),
    "adaptrank.allocators.schedules": ("adaptrank.allocation.schedules",),
    "adaptrank.allocators.scores": (
        "adaptrank.allocation.scores.importance",
        "adaptrank.allocation.scores.gradient",
        "adaptrank.allocation.scores.elements",
    ),
    "adaptrank.allocators.second_order": (
        "adaptrank.allocation.scores.curvature",
        "adaptrank.allocation.scores.submodular",
        "adaptrank.allocation.scores.explained_variance",
    ),
    "adaptrank.allocators.sora": ("adaptrank.allocation.methods.sora",),
    "adaptrank.allocators.sublora": ("adaptrank.allocation.methods.sublora",),
    "adaptrank.artifacts.card": ("adaptrank.reports.card",),
    "adaptrank.artifacts.description": ("adaptrank.artifacts.header",),
    "adaptrank.artifacts.report": (
        "adaptrank.reports.ranks",
        "adaptrank.reports.history",
    ),
    "adaptrank.composition.pictures": ("adaptrank.reports.figures",),
    "adaptrank.data.base": (
        "adaptrank.data.task",
        "adaptrank.data.completion_task",
        "adaptrank.data.label_task",
        "adaptrank.data.segments",
        "adaptrank.data.templates",
    ),
    "adaptrank.data.synthetic": (
        "adaptrank.data.arithmetic_problems",
        "adaptrank.data.generated_questions",
    ),
    "adaptrank.data.text": (
        "adaptrank.data.causal_lm_data",
        "adaptrank.data.classification_data",
        "adaptrank.data.sources",
        "adaptrank.data.files",
    ),
    "adaptrank.distributed": (
        "adaptrank.training.distributed",
        "adaptrank._collectives",
    ),
    "adaptrank.exchange": (
        "adaptrank.interop.peft",
        "adaptrank.interop.peft.keys",
    ),
    "adaptrank.groups": ("adaptrank.axes.groups",),
    "adaptrank.hf_trainer": ("adaptrank.allocation.shells.transformers",),
    "adaptrank.inject": ("adaptrank.injection",),
    "adaptrank.losses": ("adaptrank.ops.cross_entropy",),
    "adaptrank.metrics": ("adaptrank.modules.metrics",),
    "adaptrank.modules.base": (
        "adaptrank.modules.adapted",
        "adaptrank.modules.settings",
        "adaptrank.modules.optim",
        "adaptrank.modules.half_precision",
    ),
    "adaptrank.products": (
        "adaptrank.ops.low_rank",
        "adaptrank.ops.scaling",
    ),
    "adaptrank.regularize": (
        "adaptrank.training.penalties",
        "adaptrank.training.adapter_gradients",
    ),
    "adaptrank.studies.report": (
        "adaptrank.reports.study",
        "adaptrank.reports.comparison",
    ),
    "adaptrank.unpadded": ("adaptrank.modules.padding_free",),
}
"""Old module -> modules that hold its names now."""

RENAMED: dict[str, str] = {
    "adaptrank.allocators.gora.IMPORTANCES": (
        "adaptrank.allocation.initial.gora.WEIGHT_IMPORTANCES"
    ),
    "adaptrank.allocators.loraprune.gone": ("adaptrank.allocation.methods.loraprune.masked_groups"),
    "adaptrank.allocators.loraprune.local": (
        "adaptrank.allocation.methods.loraprune.mask_within_layers"
    ),
    "adaptrank.allocators.pairs.rows": ("adaptrank.allocation.compatibility.nests"),
    "adaptrank.artifacts.report.draw": ("adaptrank.reports.figures.draw_run"),
    "adaptrank.artifacts.report.grid": ("adaptrank.reports.layer_grid.layer_grid"),
    "adaptrank.data.base.render": ("adaptrank.data.templates.render_chat"),
    "adaptrank.data.base.small": ("adaptrank.data.segments.as_int32"),
    "adaptrank.data.base.tokens": ("adaptrank.data.segments.token_ids"),
    "adaptrank.data.synthetic.distinct": ("adaptrank.data.arithmetic_problems.draw_distinct"),
    "adaptrank.data.synthetic.operands": ("adaptrank.data.arithmetic_problems.draw_operands"),
    "adaptrank.data.text.closest": ("adaptrank._errors.did_you_mean"),
    "adaptrank.data.text.load": ("adaptrank.data.files.load_split"),
    "adaptrank.data.text.mapped": ("adaptrank.data.columns.read_fields"),
    "adaptrank.data.text.number": ("adaptrank.data.class_index.parse_number"),
    "adaptrank.data.text.reader": ("adaptrank.data.columns.FieldReader"),
    "adaptrank.data.text.repeated": ("adaptrank.data.mixing.repeat_rows"),
    "adaptrank.regularize.Regularize": ("adaptrank.training.adapter_gradients.AdapterGradients"),
    "adaptrank.regularize.penalty_gradients": (
        "adaptrank.training.penalties.add_penalty_gradients"
    ),
    "adaptrank.studies.report.HEAD": ("adaptrank.reports.comparison.COLUMNS"),
    "adaptrank.studies.report.draw": ("adaptrank.reports.figures.draw_study"),
}
"""Old name -> new name, for names that changed as well."""


def install() -> None:
    """Let Python find the old paths. They are tried last, after everything that exists."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths())


def find(module: str, name: str) -> tuple[Any, str]:
    """Return a name of an old module, and its new dotted path.

    Raises:
        AttributeError: if the name is nowhere.
    """
    renamed = RENAMED.get(f"{module}.{name}")
    if renamed is not None:
        home, _, new_name = renamed.rpartition(".")
        return getattr(import_module(home), new_name), renamed
    for home in MOVED[module]:
        owner = import_module(home)
        if hasattr(owner, name):
            return getattr(owner, name), f"{home}.{name}"
    homes = " and ".join(MOVED[module])
    raise AttributeError(f"{module} is {homes} now, and has no {name!r}; see docs/migration.md.")


class _OldPaths(MetaPathFinder, Loader):
    """Finds modules of old paths, whose names are looked up where they are now."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in MOVED:
            return None
        has_modules = any(old.startswith(f"{fullname}.") for old in MOVED)
        return ModuleSpec(fullname, self, is_package=has_modules)

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__

        def look_up(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            value, new = find(old, name)
            warnings.warn(f"{old}.{name} is {new} now; change the import.", FutureWarning, 2)
            return value

        module.__dict__["__getattr__"] = look_up
