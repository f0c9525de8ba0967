"""Import paths of version 0.1 lead to the names of today, with one sentence."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from adaptrank._moved import MOVED, RENAMED, find

PUBLIC = {
    "adaptrank.allocators": ["Allocator", "ALLOCATORS", "ElaLoRA", "EVA"],
    "adaptrank.allocators.base": ["Allocator", "ALLOCATORS", "Event", "evaluating", "Tracked"],
    "adaptrank.allocators.beamlora": ["BeamLoRA", "copies", "kinds_of"],
    "adaptrank.allocators.plans": ["Resize", "Close", "keep_best", "exchange"],
    "adaptrank.allocators.schedules": ["Phases", "cubic", "late_drop"],
    "adaptrank.allocators.scores": ["IMPORTANCES", "importance", "magnitude"],
    "adaptrank.distributed": ["keep_apart", "several", "mean", "repeated_blocks"],
    "adaptrank.exchange": ["export_peft", "import_peft"],
    "adaptrank.groups": ["Groups", "find_groups", "compact"],
    "adaptrank.hf_trainer": ["AllocatorCallback"],
    "adaptrank.inject": ["adapt", "describe", "set_enabled", "delete_adapter"],
    "adaptrank.metrics": ["ExactMatch", "MultipleChoice"],
    "adaptrank.products": ["linear", "accumulate", "scale_input"],
    "adaptrank.regularize": ["Regularize", "penalty_gradients"],
}


@pytest.mark.parametrize("module", MOVED)
def test_an_old_module_has_a_new_home(module):
    for home in MOVED[module]:
        import_module(home)
    for name in PUBLIC.get(module, []):
        with pytest.warns(FutureWarning, match=rf"^{module}.{name} is \S+ now; change the import"):
            value = getattr(import_module(module), name)
        assert value is find(module, name)[0]


@pytest.mark.parametrize("name", RENAMED)
def test_an_old_name_has_a_new_one(name):
    module, _, old = name.rpartition(".")
    value, new = find(module, old)
    assert new == RENAMED[name]
    home, _, leaf = new.rpartition(".")
    assert value is getattr(import_module(home), leaf)


def test_a_name_that_is_nowhere_says_where_to_look():
    with pytest.raises(AttributeError, match=r"is adaptrank.injection now.*docs/migration.md"):
        import_module("adaptrank.inject").adopt  # noqa: B018


def test_the_page_of_migration_has_every_old_path():
    page = Path(__file__).parents[1].joinpath("docs", "migration.md").read_text()
    for old, homes in MOVED.items():
        assert f"| `{old}` | {', '.join(f'`{home}`' for home in homes)} |" in page
    for old, new in RENAMED.items():
        assert f"| `{old}` | `{new}` |" in page


def test_nothing_is_loaded_before_it_is_used():
    code = "import sys, adaptrank; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
