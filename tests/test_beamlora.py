"""BeamLoRA: which units become copies of which, and what an event leaves."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import ALL, Toy, everything, fit, sizes

from adaptrank.allocators import BeamLoRA
from adaptrank.allocators.beamlora import copies
from adaptrank.allocators.plans import Resize
from adaptrank.allocators.schedules import Phases
from adaptrank.axes import rank_axes
from adaptrank.parameterizations import SVD, DoRA, HyperAdapt, Kronecker, LoRA, MELoRA, PiCa, TensorTrain

LORA4 = partial(LoRA, rank=4)
PHASES = {"every": 4, "warmup": 0, "final": 4}  # of 24 steps: events at 4, 8, 12, 16, 20


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=9), min_size=1, max_size=5),
    st.floats(0.0, 1.0),
    st.integers(0, 99),
)
def test_copies_are_of_the_strongest_over_the_weakest(values, kept, step):
    scores = {f"layers.{i}.q:rank": torch.tensor(v, dtype=torch.float64) for i, v in enumerate(values)}
    plan = copies(scores, kept, 0, step)
    assert plan == copies(dict(reversed(list(scores.items()))), kept, 0, step)
    for axis, pairs in plan.items():
        sources, targets = [a for a, _ in pairs], [b for _, b in pairs]
        assert 1 <= len(pairs) <= len(scores[axis]) // 2
        assert not set(sources) & set(targets)
        assert len(set(sources)) == len(set(targets)) == len(pairs)
        assert min(scores[axis][sources]) >= max(scores[axis][targets])
    everything = sorted((v for values in scores.values() for v in values.tolist()), reverse=True)
    total, after = 0.0, 0
    for value in everything:
        total += value
        after += total > kept * sum(everything) * (1 + 1e-6)
    # The cumulative rule says how many go; half of an axis is the most it can lose.
    assert sum(map(len, plan.values())) <= after
    if kept >= 1:
        assert not plan


def test_all_tied_the_rule_alone_says_how_many():
    scores = {"a": torch.ones(8), "b": torch.ones(8)}
    plan = copies(scores, 0.75, 0, 1)
    assert list(plan) == ["b"]  # ties fall to the natural order: the last four of sixteen
    assert sorted(target for _, target in plan["b"]) == [4, 5, 6, 7]
    assert sorted(source for source, _ in plan["b"]) == [0, 1, 2, 3]


def test_the_share_that_is_kept_is_half_a_cosine():
    allocator = BeamLoRA(p0=0.8, until=0.5)
    allocator._phases = Phases(100, 0, 10, 10)
    assert allocator.kept_at(0) == pytest.approx(0.8)
    assert allocator.kept_at(25) == pytest.approx(0.9)
    assert allocator.kept_at(50) == allocator.kept_at(90) == 1.0


@pytest.mark.parametrize(
    "method",
    [LORA4, partial(SVD, rank=4), DoRA, [HyperAdapt, LORA4], TensorTrain, Kronecker, partial(MELoRA, minis=4)],
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
    assert not allocator._tracked


def test_an_exact_split_changes_nothing_but_for_what_was_pruned():
    model, allocator = Toy(LORA4), BeamLoRA(split="exact", **PHASES)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    allocator.start(model, optimizer, 24)
    mine = next(iter(allocator._axes.values()))
    with torch.no_grad():
        for layer in model.maps:
            layer.B.normal_()
        # The weakest weight is 3e-4 of the whole.
        allocator.logits(mine).copy_(allocator.tau * torch.tensor([1.0, 0.5, 0.2, -6.5]))
    x = torch.randn(5, 16)
    before, was = model.maps[0](x), allocator.gate(mine).detach()
    plan = {mine.key: copies({mine.key: was}, 0.9999, 0, 1)[mine.key]}
    ((source, target),) = plan[mine.key]
    assert (source, target) == (0, 3)
    mine.resize([0, 1, 2, 0], 0, None, [optimizer])
    allocator._follow(mine, Resize((0, 1, 2, 0)))
    allocator._settle(mine, [(0, 3)])
    now = allocator.gate(mine).detach()
    assert now[0] == now[3]
    torch.testing.assert_close(now[0] + now[3], was[0] / (1 - was[3] / 4), rtol=1e-5, atol=0)
    relative = float((model.maps[0](x) - before).norm() / before.norm())
    assert relative < 3 * float(was[3] / 4)


def test_copies_are_as_they_were_half_an_interval_ago():
    kept, checked = {}, []

    class Look(BeamLoRA):
        def _snapshot(self, axes):
            super()._snapshot(axes)
            for key, axis in axes.items():
                kept[key] = [(name, t.detach().clone(), d) for name, t, d in self._states(axis)]

        def carried_out(self, plan, step):
            s = self._before if plan else {}
            super().carried_out(plan, step)
            for key, change in plan.items():
                pairs = [(a, b) for b, a in enumerate(change.keep) if a != b]
                now = {name: t for name, t, _ in self._states(self._axes[key])}
                for source, target in pairs:
                    for name, old, dim in kept[key]:
                        assert torch.equal(now[name].select(dim, target), old.select(dim, source))
                        checked.append(name)
                    mean = (s[key][source] + s[key][target]) / 2
                    assert self.logits(self._axes[key])[source] == self.logits(self._axes[key])[target] == mean
                    for moment in "mv":
                        assert not self.track(self._axes[key], moment, None)[[source, target]].any()

    fit(Toy(LORA4), Look(p0=0.5, until=1.0, **PHASES))
    assert {name.split(".")[-1] for name in checked} == {"A", "B", "exp_avg", "exp_avg_sq"}


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
        ValueError, match=r"BeamLoRA needs axes that can duplicate, and PiCa at .* cannot; use one of .*LoRA"
    ):
        fit(Toy(partial(PiCa, rank=4)), BeamLoRA(**PHASES))
    with pytest.raises(ValueError, match="BeamLoRA tolerates no other; keep one"):
        fit(Toy(LORA4), BeamLoRA(**PHASES), ALL["AdaLoRA"]())
    with pytest.raises(ValueError, match="no axis has two units"):
        fit(Toy(partial(LoRA, rank=1)), BeamLoRA(**PHASES))
    for arguments in ({"p0": 0.0}, {"tau": 0.0}, {"split": "half"}):
        with pytest.raises(ValueError, match=r"0 < p0 <= 1|use 'snapshot'"):
            BeamLoRA(**arguments)
