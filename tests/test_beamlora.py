"""BeamLoRA: which units become copies of which, and what an event leaves."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import ALL, Toy, everything, fit, sizes

from adaptrank.allocation import BeamLoRA
from adaptrank.allocation.copying import copies
from adaptrank.allocation.methods.beamlora import BeamState
from adaptrank.allocation.plans import Resize
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    Kronecker,
    LoRA,
    MELoRA,
    PiCa,
    TensorTrain,
)

LORA4 = partial(LoRA, rank=4)
PHASES = {"every": 4, "warmup": 0, "final": 4}  # of 24 steps: events at 4, 8, 12, 16, 20


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5),
    st.sampled_from([0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0]),
    st.integers(0, 99),
    st.integers(1, 3),
)
def test_copies_are_of_the_strongest_over_the_weakest(values, kept, step, parts):
    """The cumulated weight says how many, with ties too, but at most half of a part. Sizes stay."""
    scores = {
        f"layers.{i}.q:rank": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)
    }
    kinds = {axis: [(unit % parts,) for unit in range(len(v))] for axis, v in scores.items()}
    plan = copies(scores, kept, 0, step, kinds)
    assert plan == copies(dict(reversed(list(scores.items()))), kept, 0, step, kinds)
    if parts == 1:
        assert plan == copies(scores, kept, 0, step)

    order = sorted((-v, i, unit) for i, row in enumerate(values) for unit, v in enumerate(row))
    whole = sum(map(sum, values))
    gone = [
        (i, unit)
        for place, (_, i, unit) in enumerate(order)
        if -sum(v for v, _, _ in order[: place + 1]) > kept * whole * (1 + 1e-6)
    ]
    for i, (axis, row) in enumerate(scores.items()):
        pairs = plan.get(axis, [])
        sources, targets = [a for a, _ in pairs], [b for _, b in pairs]
        assert not set(sources) & set(targets)
        assert len(set(sources)) == len(set(targets)) == len(pairs)
        for part in range(parts):
            mine = [unit for unit in range(len(row)) if unit % parts == part]
            here = [(a, b) for a, b in pairs if b in mine]
            assert all(a in mine for a, _ in here)
            assert len(here) == min(
                len([unit for unit in mine if (i, unit) in gone]), len(mine) // 2
            )
            assert {b for _, b in here} <= {unit for unit in mine if (i, unit) in gone}
            if here:
                assert min(row[a] for a, _ in here) >= max(row[b] for _, b in here)


def test_all_tied_the_rule_alone_says_how_many():
    scores = {"a": torch.ones(8), "b": torch.ones(8)}
    plan = copies(scores, 0.75, 0, 1)
    assert list(plan) == ["b"]  # ties fall to the natural order: the last four of sixteen
    assert sorted(target for _, target in plan["b"]) == [4, 5, 6, 7]
    assert sorted(source for source, _ in plan["b"]) == [0, 1, 2, 3]


def test_the_share_that_is_kept_is_half_a_cosine():
    allocator = BeamLoRA(p0=0.8, until=0.5, every=10, final=10)
    allocator.engine.check_steps(100)
    assert allocator.kept_at(0) == pytest.approx(0.8)
    assert allocator.kept_at(25) == pytest.approx(0.9)
    assert allocator.kept_at(50) == allocator.kept_at(90) == 1.0


@pytest.mark.parametrize(
    "method",
    [
        LORA4,
        partial(SVD, rank=4),
        DoRA,
        [HyperAdapt, LORA4],
        TensorTrain,
        Kronecker,
        partial(MELoRA, rank=2, minis=4),
    ],
    ids=["LoRA", "SVD", "DoRA", "hybrid", "TT", "Kronecker", "MELoRA"],
)
@pytest.mark.parametrize("split", ["snapshot", "exact"])
def test_sizes_stay_and_the_end_is_the_plain_method(method, split):
    model, allocator = Toy(method), BeamLoRA(p0=0.5, until=1.0, split=split, **PHASES)
    before = sizes(model)
    fit(model, allocator)
    assert sizes(model) == before
    assert [event["step"] for event in allocator.events] == [4, 8, 12, 16, 20]
    assert any(event["pruned"] for event in allocator.events)
    assert all(event["total"] == event["budget"] for event in allocator.events)
    assert all(axis.gate is None for axis in rank_axes(model).values())
    assert not allocator.engine.state


def test_an_exact_split_changes_nothing_but_for_what_was_pruned():
    model, allocator = Toy(LORA4), BeamLoRA(split="exact", **PHASES)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    allocator.start(model, optimizer, 24)
    mine = next(iter(allocator.run.axes.values()))
    state = allocator.engine.state
    with torch.no_grad():
        for layer in model.maps:
            layer.B.normal_()
        # The weakest weight is 3e-4 of the whole.
        state.values(mine).copy_(allocator.tau * torch.tensor([1.0, 0.5, 0.2, -6.5]))
    x = torch.randn(5, 16)
    before, was = model.maps[0](x), allocator.weights(state, mine).detach()
    row = model.maps[0].A[0].detach().clone()
    plan = {mine.key: copies({mine.key: was}, 0.9999, 0, 1)[mine.key]}
    ((source, target),) = plan[mine.key]
    assert (source, target) == (0, 3)
    mine.resize([0, 1, 2, 0], 0, None, [optimizer])
    state.follow(mine, Resize((0, 1, 2, 0)))
    allocator.split_exactly(state, mine, [(0, 3)], 1)
    layer = model.maps[0]
    assert torch.equal(layer.B[:, 0], layer.B[:, 3])
    apart = (layer.A[0] - layer.A[3]).detach()
    assert 1e-4 < float(apart.norm() / layer.A[0].detach().norm()) < 1e-2, (
        "equal units would stay equal for ever"
    )
    torch.testing.assert_close((layer.A[0] + layer.A[3]).detach(), 2 * row, rtol=1e-6, atol=1e-7)
    now = allocator.weights(state, mine).detach()
    assert now[0] == now[3]
    torch.testing.assert_close(now[0] + now[3], was[0] / (1 - was[3] / 4), rtol=1e-5, atol=0)
    relative = float(((model.maps[0](x) - before).norm() / before.norm()).detach())
    assert relative < 3 * float(was[3] / 4)


@pytest.mark.parametrize("method", [LORA4, TensorTrain], ids=["LoRA", "TT"])
def test_copies_are_as_they_were_half_an_interval_ago(method):
    """A tensor between two axes may have copies in both.

    Its slice of two copies is the old slice of their sources.
    """
    kept, checked, both = {}, [], []

    class Kept(BeamState):
        def take_snapshot(self, tensors):
            super().take_snapshot(tensors)
            kept.clear()
            for entry in tensors:
                kept[entry.axis.key, entry.name] = entry.tensor.detach().clone()

    class Look(BeamLoRA):
        def init_state(self, axes):
            return Kept()

        def carry_out(self, state, plan, step, apply):
            axes = self.run.axes
            s = {key: state.values(axis).detach().clone() for key, axis in axes.items()}
            done = super().carry_out(state, plan, step, apply)
            for entry in self.trained_tensors(axes):
                axis, name, now, where = entry.axis, entry.name, entry.tensor, entry.where
                assert name not in state.state_dict().get(axis.key, {}), "it is used up"
                old, copied = kept[axis.key, name], torch.zeros_like(now, dtype=torch.bool)
                for key, dim in where:
                    units = plan[key].keep if key in plan else range(now.shape[dim])
                    old = old.index_select(dim, torch.tensor(units))
                    copied.index_fill_(
                        dim,
                        torch.tensor([b for b, a in enumerate(units) if a != b], dtype=torch.long),
                        True,
                    )
                both.append(len([key for key, _ in where if key in plan]) > 1)
                assert torch.equal(now[copied], old[copied])
                checked.extend([name] * bool(copied.any()))
            for key, change in plan.items():
                for source, target in [(a, b) for b, a in enumerate(change.keep) if a != b]:
                    mean = (s[key][source] + s[key][target]) / 2
                    logits = state.values(axes[key])
                    assert logits[source] == logits[target] == mean
                    for moment in "mv":
                        assert not state.track(axes[key], moment, None)[[source, target]].any()
            return done

    fit(Toy(method), Look(p0=0.5, until=1.0, **PHASES))
    assert {name.split(".")[-1] for name in checked} >= {"exp_avg", "exp_avg_sq"}
    assert any(both) == (method is TensorTrain)


def test_a_copy_stays_in_the_part_of_its_layer():
    model, allocator = Toy(partial(MELoRA, rank=3, minis=4)), BeamLoRA(p0=0.5, until=1.0, **PHASES)
    before = [layer.block.clone() for layer in model.maps]
    fit(model, allocator)
    assert any(event["pruned"] for event in allocator.events)
    assert all(
        torch.equal(layer.block, block) for layer, block in zip(model.maps, before, strict=True)
    )


@pytest.mark.parametrize("told", [True, False])
def test_units_that_were_split_go_their_own_ways(told):
    """B is equal in both at first. In the control, their gradients stay equal."""
    pairs = []

    class Look(BeamLoRA):
        def add_noise(self, axis, sources, targets, step):
            if told:
                super().add_noise(axis, sources, targets, step)
            pairs.extend((axis, *pair) for pair in zip(sources, targets, strict=True))
            assert all(
                torch.equal(*axis.closing()[0].select([a, b]).unbind(1)) for axis, a, b in pairs
            )

    model, allocator = (
        Toy(LORA4),
        Look(p0=0.9, until=5, split="exact", **PHASES),
    )  # nothing moves after the first event
    fit(model, allocator)
    assert pairs
    for axis, a, b in pairs:
        one, other = axis.closing()[0].select([a, b]).unbind(1)
        assert torch.equal(one, other) != told


@pytest.mark.parametrize("split", ["snapshot", "exact"])
def test_resume_is_exact_between_snapshot_and_event_too(split, tmp_path):
    def make():
        return BeamLoRA(p0=0.5, until=1.0, split=split, **PHASES)

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, allocator = Toy(LORA4), make()
    want = everything(whole, fit(whole, allocator, checkpoint))
    for step in (1, 5, 6, 7, 8, 20, 22):
        model, resumed = Toy(LORA4), make()
        have = everything(model, fit(model, resumed, ckpt_path=tmp_path / f"step={step}.ckpt"))
        assert not [key for key in want if not torch.equal(have[key], want[key])], step
        assert resumed.events == allocator.events


def test_refusals():
    with pytest.raises(
        ValueError,
        match=r"BeamLoRA needs axes that can duplicate, and PiCa at .* cannot; use one of .*LoRA",
    ):
        fit(Toy(partial(PiCa, rank=4)), BeamLoRA(**PHASES))
    with pytest.raises(ValueError, match="BeamLoRA tolerates no other; keep one"):
        fit(Toy(LORA4), BeamLoRA(**PHASES), ALL["AdaLoRA"]())
    with pytest.raises(ValueError, match="no axis has two units"):
        fit(Toy(partial(LoRA, rank=1)), BeamLoRA(**PHASES))
    for arguments in ({"p0": 0.0}, {"tau": 0.0}, {"split": "half"}):
        with pytest.raises(ValueError, match=r"0 < p0 <= 1|use 'snapshot'"):
            BeamLoRA(**arguments)
