"""Every cell of the table of pairs is tested by a run.

Pairs that work train through their events. Pairs that do not work are refused at the start.
"""

import inspect

import lightning
import pytest
import torch
from test_allocators import fit
from torch import nn

from adaptrank.allocation import ALLOCATORS, Participant
from adaptrank.allocation.compatibility import table
from adaptrank.axes import cost_model, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import PARAMETERIZATIONS, wrappers

TABLE = table(ALLOCATORS)
CELLS = [(allocator, nest) for allocator, works in TABLE.items() for nest in works]
SHORT = (2, 7, {"every": 2, "warmup": 2, "final": 1}, [4, 6])  # blocks, steps, phases, events
LONG = (3, 48, {"every": 6, "warmup": 6, "final": 12}, [12, 18, 24, 30, 36])


class Block(nn.Module):
    """A residual block of two layers."""

    def __init__(self, width):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Stack(lightning.LightningModule):
    """Blocks that learn a fixed map. A nest without linear layers wraps its own example."""

    width = 24

    def __init__(self, nest, blocks):
        super().__init__()
        torch.manual_seed(0)
        methods = [PARAMETERIZATIONS[name] for name in nest]
        self.alone = not methods[0].wraps(nn.Linear(4, 4))
        if self.alone:
            layer = methods[0].example()
            for method in methods:
                layer = method(layer)
            self.layers = nn.ModuleList([layer])
        else:
            self.layers = nn.ModuleList(Block(self.width) for _ in range(blocks))
            adapt(self, "all-linear", methods)
        self.target = (
            torch.randn(self.width, self.width, generator=torch.Generator().manual_seed(1)) / 5
        )

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x

    def train_dataloader(self):
        data = torch.randn(LONG[1] * 8, self.width, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def training_step(self, batch, batch_idx=0):
        return (self(batch) - batch @ self.target).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def build(name, phases, **more):
    """The allocator with its default arguments, but for when it acts."""
    cls = ALLOCATORS[name]
    known = inspect.signature(cls).parameters
    return cls(**{key: value for key, value in (phases | more).items() if key in known})


class Watched(lightning.Callback):
    """Holds each event to what every allocator promises."""

    def __init__(self, allocator):
        self.allocator, self.seen = allocator, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        events = [event for event in self.allocator.events if event["step"]]
        if len(events) == self.seen:
            return
        self.seen = len(events)
        event, axes = events[-1], rank_axes(module)
        if self.allocator.unit == "ranks" and event["budget"] is not None:
            assert event["total"] <= event["budget"]
            assert event["total"] == event["budget"] or not self.allocator.exact
        assert all(len(axis) >= self.allocator.floor for axis in axes.values())
        assert cost_model(module).total({key: len(axis) for key, axis in axes.items()}) == sum(
            p.numel()
            for p in {
                id(p): p for w in wrappers(module) for _, p in w.own_parameters() if p.requires_grad
            }.values()
        )
        (optimizer,) = trainer.optimizers
        for p, state in optimizer.state.items():
            assert all(value.shape == p.shape for value in state.values() if value.dim())
            assert p.isfinite().all()
        self.no_unit_is_dead(module, axes, batch)

    def no_unit_is_dead(self, module, axes, batch):
        """Of a unit that is zero, the closing factor has a gradient."""
        with torch.enable_grad():
            loss = module.training_step(batch)
            closing = [slot.tensor for axis in axes.values() for slot in axis.closing()]
            # A layer without units takes no part in the loss.
            found = torch.autograd.grad(loss, closing, allow_unused=True, materialize_grads=True)
            grads = dict(zip(map(id, closing), found, strict=True))
        for key in set(self.allocator.events[-1].get("grown", ())):
            axis = axes[key]
            for slot in axis.closing():
                values, grad = (
                    t.movedim(slot.dim, 0).reshape(len(axis), -1)
                    for t in (slot.tensor, grads[id(slot.tensor)])
                )
                assert grad[~values.any(1)].any(1).all(), f"{key} has a unit without a gradient"


@pytest.mark.parametrize(("name", "nest"), CELLS, ids=[f"{a}-{'+'.join(n)}" for a, n in CELLS])
@pytest.mark.parametrize(
    ("blocks", "steps", "phases", "at"),
    [pytest.param(*SHORT, id="short"), pytest.param(*LONG, id="long", marks=pytest.mark.tables)],
)
def test_a_cell_is_as_the_table_has_it(name, nest, blocks, steps, phases, at):
    cell = TABLE[name][nest]
    allocator, model = build(name, phases), Stack(nest, blocks)
    if cell != "works":
        sentence = (
            "has no rank axis"
            if not allocator.find_axes(model)
            else r"needs axes that can .*cannot; (use one of|no param)"
        )
        with pytest.raises(ValueError, match=rf"^{name} .*{sentence}") as said:
            fit(model, allocator, steps=steps)
        assert "\n" not in str(said.value)
        if not cell:
            return
        assert cell.split(", ")[0] in str(said.value)
        off = dict(option.split("=") for option in cell.split(", "))
        allocator, model = (
            build(name, phases, **{key: eval(value) for key, value in off.items()}),
            Stack(nest, blocks),
        )
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    watched = Watched(allocator)
    fit(model, allocator, watched, steps=steps)
    if allocator.moves:
        assert [event["step"] for event in allocator.events if event["step"]] == at
        assert watched.seen == len(at)
        assert not any("skipped" in event for event in allocator.events)
        prunes_the_base = (
            type(allocator).find_axes is not Participant.find_axes
        )  # it masks, and a loaded file is cut
        assert (
            allocator.events[-1]["allocated"] == allocator.events[-1]["active"] or prunes_the_base
        )
    else:
        assert allocator.events or not allocator.chooses_ranks
    frozen = dict(model.named_parameters())
    assert all(torch.equal(value, frozen[key]) for key, value in before.items() if key in frozen)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_table_has_a_column_for_each_allocator_of_the_folder():
    shipped = {n for n, cls in ALLOCATORS.items() if cls.__module__.startswith("adaptrank.")}
    assert shipped == set(TABLE)
    assert sum(map(len, TABLE.values())) == len(CELLS)
    assert {cell for works in TABLE.values() for cell in works.values()} >= {"works", ""}
