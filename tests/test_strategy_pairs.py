"""Every cell of the table of strategies and allocators is tested by a run."""

import inspect
import re

import pytest
from test_allocators import fit
from test_pairs import SHORT, Stack, build

from adaptrank._errors import UserError
from adaptrank.allocation import ALLOCATORS
from adaptrank.parameterizations import PARAMETERIZATIONS
from adaptrank.strategies import STRATEGIES, beside_allocator, on_method

BLOCKS, STEPS, PHASES, _ = SHORT
ROUNDS = {"every": 4, "restart_warmup": 1, "links": 2, "stage1": 2, "steps_per_task": [4, 3]}
"""Arguments of strategies under which a run of seven steps has a border or two."""

SHIPPED = [
    name
    for name, cls in STRATEGIES.items()
    # A strategy that needs a method beside the adapter has its own tests.
    if cls.__module__.startswith("adaptrank.") and not cls.beside
]
ALL = {
    (strategy, name): beside_allocator(STRATEGIES[strategy], cls)
    for strategy in SHIPPED
    for name, cls in ALLOCATORS.items()
    if cls.__module__.startswith("adaptrank.")
}
"""(strategy, allocator) -> "works", or the reason why not."""

CELLS = [
    pytest.param(*names, marks=pytest.mark.tables if cell == "works" else ())
    for names, cell in ALL.items()
]


def make(name):
    cls = STRATEGIES[name]
    known = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in ROUNDS.items() if key in known})


def method_for(name):
    """LoRA, or the first method that the strategy takes."""
    fits = [each for each in PARAMETERIZATIONS if on_method(STRATEGIES[name], each) == "works"]
    return "LoRA" if "LoRA" in fits else fits[0]


@pytest.mark.parametrize(("strategy", "allocator"), CELLS)
def test_a_cell_is_as_the_table_has_it(strategy, allocator):
    cell = ALL[strategy, allocator]
    taken, beside = make(strategy), build(allocator, PHASES)
    model = Stack((method_for(strategy),), BLOCKS)
    if cell != "works":
        with pytest.raises(UserError, match=re.escape(f"{strategy} and {allocator}: {cell}")):
            fit(model, beside, taken, steps=STEPS)
        return
    fit(model, beside, taken, steps=STEPS)
    assert len(taken.round_events) > 1
    assert all(parameter.isfinite().all() for parameter in model.parameters())
