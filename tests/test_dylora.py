"""DyLoRA: prefixes of the units, drawn at each step."""

from collections import Counter
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import stats
from test_allocators import ALL, TOTAL, Toy, everything, fit, sizes

from adaptrank.allocation import DyLoRA
from adaptrank.artifacts import load_adapter, save_adapter
from adaptrank.artifacts.merging import merge
from adaptrank.axes import rank_axes
from adaptrank.injection import delete_adapter
from adaptrank.parameterizations import (
    NOLA,
    SVD,
    DoRA,
    HyperAdapt,
    Kronecker,
    LoRA,
    MELoRA,
    MiSS,
    PiCa,
    TensorTrain,
)
from adaptrank.testing import perturb

LORA4 = partial(LoRA, rank=4)


def started(method=LORA4, **arguments):
    model, allocator = Toy(method), DyLoRA(**arguments)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator.start(model, optimizer, TOTAL)
    for layer in model.maps:
        perturb(layer)
    return model, allocator, optimizer


@pytest.mark.parametrize("b", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "method", [LORA4, partial(SVD, rank=4), partial(DoRA, rank=4), [HyperAdapt, LORA4]]
)
def test_a_prefix_is_the_truncated_method(b, method):
    """Against a layer of rank b, whose multiplier is alpha / b."""
    model, allocator, _ = started(method)
    allocator.engine.state.b, x = b, torch.randn(3, 16)
    have = [layer(x) for layer in model.maps]
    for axis in rank_axes(model).values():
        axis.resize(range(b))
        axis.gate = torch.full((b,), 4 / b)
    allocator.finish()
    for layer, y in zip(model.maps, have, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("b", [1, 3, 4])
def test_a_prefix_is_a_lora_of_that_rank(b):
    """LoRA(rank=b, alpha=a) itself, which multiplies by a / b."""
    model, allocator, _ = started()
    allocator.engine.state.b, x = b, torch.randn(3, 16)
    for layer in model.maps:
        small = LoRA(layer.base, rank=b, alpha=4 * layer.scale)
        small.A.data.copy_(layer.A[:b])
        small.B.data.copy_(layer.B[:, :b])
        torch.testing.assert_close(layer(x), small(x), rtol=1e-5, atol=1e-6)


def test_several_axes_of_a_layer_share_the_multiplier():
    """Bonds of a train multiply. Each takes a root, so that together they are r / b."""
    model, allocator, _ = started(TensorTrain)
    axes = list(rank_axes(model.maps[0]).values())
    assert len(axes) == 4
    product = 1.0
    for axis in axes:
        gate = allocator.gate(axis, 2)
        assert gate[:2].unique().numel() == 1
        assert not gate[2:].any()
        product *= float(gate[0]) ** 4 / (len(axis) / 2)
    assert product == pytest.approx(1.0)


@pytest.mark.parametrize(
    "method", [TensorTrain, partial(LoRA, rank=4), Kronecker], ids=["TT", "LoRA", "Kronecker"]
)
def test_frozen_every_entry_has_its_b_and_only_one(method):
    """Every entry of every tensor trains with exactly one b, between two axes as well."""
    _, allocator, _ = started(method)
    axes, most = allocator.engine.run.axes, max(map(len, allocator.engine.run.axes.values()))
    tensors = {id(s.tensor): s.tensor for axis in axes.values() for s in axis.slots()}.values()
    trained = {id(tensor): torch.zeros_like(tensor) for tensor in tensors}
    for b in range(1, most + 1):
        allocator.engine.state.b = b
        for tensor in tensors:
            tensor.grad = torch.ones_like(tensor)
        allocator.update(allocator.engine.state, axes)
        for tensor in tensors:
            trained[id(tensor)] += tensor.grad
    for axis in axes.values():
        for slot in axis.slots():
            largest = max(
                len(a) for a in axes.values() for s in a.slots() if s.tensor is slot.tensor
            )
            assert int(trained[id(slot.tensor)].min()) == 1
            # The last units of a smaller tensor train for every b beyond its size.
            assert int(trained[id(slot.tensor)].max()) == 1 + most - largest
    allocator.frozen = False
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    allocator.engine.state.b = 1
    allocator.update(allocator.engine.state, axes)
    assert all(int(tensor.grad.sum()) < tensor.numel() for tensor in tensors)
    allocator.engine.state.b = most
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    allocator.update(allocator.engine.state, axes)
    assert all(bool(tensor.grad.all()) for tensor in tensors)


def test_each_axis_can_be_truncated_to_a_b_of_its_own():
    x = torch.randn(3, 16)
    want = {}

    class Look(DyLoRA):
        def truncate_axes(self, axes, b):
            for layer, units in zip(self.run.model.maps, (1, 4, 3), strict=True):
                want[layer] = (
                    layer.base(x)
                    + 4 / units * layer.scale * x @ layer.A[:units].T @ layer.B[:, :units].T
                )
            super().truncate_axes(axes, b)

    model = Toy(LORA4)
    fit(model, Look(truncate={"maps.0:rank": 1, "maps.2:rank": 3}))
    assert list(sizes(model).values()) == [1, 4, 3]
    for layer, y in want.items():
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)


def test_truncated_it_is_written_read_and_merged(tmp_path):
    model, x = Toy(LORA4), torch.randn(3, 16)
    fit(model, DyLoRA(truncate=2))
    model.eval()
    want = [layer(x) for layer in model.maps]
    save_adapter(model.maps, tmp_path / "a")
    again = Toy(LORA4).maps
    delete_adapter(again, "default")
    load_adapter(again, tmp_path / "a")
    assert set(sizes(again).values()) == {2}
    assert all(torch.equal(layer(x), y) for layer, y in zip(again, want, strict=True))
    merge(model.maps)
    assert not rank_axes(model.maps)
    for layer, y in zip(model.maps, want, strict=True):
        torch.testing.assert_close(layer(x), y, rtol=1e-5, atol=1e-6)


def test_a_compiled_layer_is_not_compiled_anew_for_each_b():
    """A mask, not a slice: the graph of one b serves all others."""
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, allocator, _ = started(partial(LoRA, rank=12))
    compiled, x = torch.compile(model.maps[0], backend=counting, fullgraph=True), torch.randn(3, 16)
    for allocator.b in range(1, 13):
        torch.testing.assert_close(compiled(x), model.maps[0](x))
    assert len(graphs) <= 3


def test_evaluation_uses_its_own_prefix():
    model, allocator, _ = started(b_eval=2)
    x = torch.randn(3, 16)
    model.eval()
    outputs = []
    for allocator.b in (1, 4):
        outputs.append(model.maps[0](x))
    assert torch.equal(*outputs)
    layer = model.maps[0]
    want = layer.base(x) + 2 * layer.scale * x @ layer.A[:2].T @ layer.B[:, :2].T
    torch.testing.assert_close(outputs[0], want, rtol=1e-5, atol=1e-6)
    assert not layer.gates, "nothing hangs there between forward passes"


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr / 100, 0.9)]
)
def test_what_a_step_leaves_out_stays_to_the_last_bit(frozen, optimizer):
    moved = Counter()

    class Look(DyLoRA):
        def before_pass(self, state, axes):
            super().before_pass(state, axes)
            self.was = {
                (key, s.label): (
                    s.tensor.detach().clone(),
                    [m.clone() for m in self.moments(s.tensor)],
                )
                for key, axis in axes.items()
                for s in axis.slots()
            }
            self.used = state.b

        def finish_step(self, state, axes):
            b, was = self.used, self.was
            super().finish_step(state, axes)
            active = [b - 1] if frozen else list(range(b))
            idle = [unit for unit in range(4) if unit not in active]
            for key, axis in axes.items():
                for slot in axis.slots():
                    value, moments = was[key, slot.label]
                    assert torch.equal(
                        slot.select(idle),
                        value.index_select(slot.dim, torch.tensor(idle, dtype=torch.long)),
                    )
                    for now, before in zip(self.moments(slot.tensor), moments, strict=False):
                        index = torch.tensor(idle, dtype=torch.long)
                        assert torch.equal(
                            now.index_select(slot.dim, index), before.index_select(slot.dim, index)
                        )
                    if not moments:
                        for now in self.moments(slot.tensor):
                            assert not now.index_select(
                                slot.dim, torch.tensor(idle, dtype=torch.long)
                            ).any()
                    index = torch.tensor(active)
                    moved[b] += not torch.equal(
                        slot.select(active), value.index_select(slot.dim, index)
                    )

    fit(Toy(LORA4, make=optimizer), Look(frozen=frozen, rule="drawn"))
    assert set(moved) == {1, 2, 3, 4}
    assert all(moved.values())


def test_b_is_uniform_and_a_function_of_seed_and_step():
    allocator = DyLoRA(seed=3)
    drawn = [allocator.drawn(step, 8) for step in range(1, 4001)]
    assert drawn == [DyLoRA(seed=3).drawn(step, 8) for step in range(1, 4001)]
    assert drawn[:50] != [DyLoRA(seed=4).drawn(step, 8) for step in range(1, 51)]
    counts = Counter(drawn)
    assert set(counts) == set(range(1, 9))
    assert stats.chisquare([counts[b] for b in range(1, 9)]).pvalue > 1e-3


def test_b_is_the_same_in_all_micro_batches_of_a_step():
    seen = {}

    class Seen(Toy):
        def training_step(self, batch, batch_idx):
            seen.setdefault(self.global_step, set()).add(allocator.engine.state.b)
            return super().training_step(batch, batch_idx)

    allocator = DyLoRA()
    fit(Seen(LORA4), allocator, accumulate_grad_batches=3)
    assert len(seen) == TOTAL
    assert all(len(bs) == 1 for bs in seen.values())


@pytest.mark.parametrize(
    "method",
    [
        LORA4,
        partial(SVD, rank=4),
        [HyperAdapt, LORA4],
        NOLA,
        TensorTrain,
        Kronecker,
        partial(MELoRA, minis=4),
        PiCa,
    ],
    ids=["LoRA", "SVD", "hybrid", "NOLA", "TT", "Kronecker", "MELoRA", "PiCa"],
)
def test_truncated_at_the_end_it_is_what_the_prefix_computed(method):
    x = torch.randn(3, 16)

    class Look(DyLoRA):
        def truncate_axes(self, axes, b):
            before = [(self.b_eval, layer) for layer in self.run.model.maps]
            self.run.model.eval()
            want = [layer(x) for _, layer in before]
            self.run.model.train()
            super().truncate_axes(axes, b)
            self.finish()
            for (_, layer), y in zip(before, want, strict=True):
                torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-5)

    model, allocator = Toy(method), Look(b_eval=2, truncate=2)
    fit(model, allocator)
    assert max(sizes(model).values()) <= 2
    assert allocator.events[-1]["step"] == TOTAL
    assert allocator.events[-1]["total"] == sum(sizes(model).values())


def test_a_file_in_the_midst_of_training_holds_all_units(tmp_path):
    model, allocator, _ = started()
    allocator.engine.state.b = 1
    model.maps[0](torch.randn(2, 16))
    save_adapter(model.maps, tmp_path / "a")
    again = Toy(LORA4).maps
    delete_adapter(again, "default")
    load_adapter(again, tmp_path / "a")
    assert torch.equal(again[0].B, model.maps[0].B)
    allocator.finish()
    assert not model.maps[0]._forward_pre_hooks


def test_resume_is_exact_to_the_bit(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole = Toy(LORA4)
    want = everything(whole, fit(whole, DyLoRA(truncate=2), checkpoint))
    for step in (1, 7, 23):
        model = Toy(LORA4)
        have = everything(
            model, fit(model, DyLoRA(truncate=2), ckpt_path=tmp_path / f"step={step}.ckpt")
        )
        assert not [key for key in want if not torch.equal(have[key], want[key])], step


def test_refusals():
    with pytest.raises(
        ValueError, match=r"DyLoRA needs axes that can ordered, and MiSS at .* cannot; use one of"
    ):
        fit(Toy(MiSS), DyLoRA())
    with pytest.raises(ValueError, match="DyLoRA tolerates no other; keep one"):
        fit(Toy(LORA4), DyLoRA(), ALL["AdaLoRA"]())
    for arguments in ({"truncate": 0}, {"b_eval": 0}, {"truncate": {"maps.0:rank": 0}}):
        with pytest.raises(ValueError, match="a prefix has at least one unit"):
            DyLoRA(**arguments)
    with pytest.raises(
        ValueError,
        match=r"truncate names 'maps.1.rank', which is no axis of this model; "
        r"use one such as 'maps.1:rank'",
    ):
        fit(Toy(LORA4), DyLoRA(truncate={"maps.1.rank": 2}))
