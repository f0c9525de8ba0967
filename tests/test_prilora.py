"""PRILoRA, arXiv:2401.11316: ranks on a line, and zeros where |A| times the inputs is least."""

import logging
import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import PHASES, Toy, everything, fit, sizes
from torch import nn
from torch.utils.checkpoint import checkpoint

from adaptrank.allocation import AdaLoRA, PRILoRA
from adaptrank.allocation.context import Run
from adaptrank.allocation.initial.input_averages import input_factors
from adaptrank.allocation.initial.prilora import lowest, rising
from adaptrank.allocation.plans import apportion
from adaptrank.axes import cost_model, rank_axes, rank_cost
from adaptrank.injection import adapt
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
    SBoRA,
    TensorTrain,
    wrappers,
)

LINE = {"first": 2, "last": 6}


class Deep(Toy):
    """Any number of layers, each with a target of its own."""

    def __init__(self, method=LoRA, blocks=3, **arguments):
        super().__init__(method, widths=(12,) * blocks, **arguments)


# ---- ranks


@pytest.mark.parametrize(
    ("blocks", "first", "last"),
    [(3, 4, 12), (5, 4, 12), (7, 4, 12), (7, 1, 8), (5, 12, 4), (4, 3, 3)],
)
def test_ranks_lie_on_a_line_and_their_mean_is_exact(blocks, first, last):
    model = Deep(blocks=blocks)
    fit(model, PRILoRA(first, last, sparsity=0), steps=1)
    found = list(sizes(model).values())
    assert sum(found) == math.floor(blocks * (first + last) / 2 + 0.5)
    for i, rank in enumerate(found):
        assert abs(rank - (first + (last - first) * i / (blocks - 1))) < 1
    assert (found[0], found[-1]) == (first, last) or blocks * (first + last) % 2
    assert found == sorted(found, reverse=first > last)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_rounding_keeps_the_sum_and_the_order(blocks, first, last):
    line = rising({"a": range(blocks)}, first, last)
    assert sum(line.values()) == pytest.approx(blocks * (first + last) / 2)
    weights = {str(i): rank for i, rank in line.items()}
    budget = math.floor(sum(weights.values()) + 0.5 - 1e-9)
    ranks = apportion(weights, rank_cost(weights), budget)
    assert sum(ranks.values()) == budget
    ordered = list(ranks.values())
    assert ordered == sorted(ordered, reverse=first > last)


def test_the_layers_of_a_block_have_one_rank_and_a_single_block_the_mean():
    model = Toy(LoRA)
    model.maps = nn.ModuleList(
        nn.ModuleDict({"q": nn.Linear(16, 12), "k": nn.Linear(16, 4)}) for _ in range(3)
    )
    model.head = nn.Linear(12, 2)
    adapt(model, "all-linear", partial(LoRA, rank=4))
    allocator = PRILoRA(**LINE, sparsity=0)
    allocator.start(model, torch.optim.Adam(model.parameters()), 4)
    assert list(sizes(model).values()) == [4, 2, 2, 4, 4, 6, 6]  # the head is in no block
    model = Deep(blocks=1)
    fit(model, PRILoRA(**LINE, sparsity=0), steps=1)
    assert list(sizes(model).values()) == [4]


def test_with_parameters_unequal_widths_cost_no_more_than_the_mean_rank():
    model = Toy(LoRA, widths=(12, 48, 100))
    mean = cost_model(model).total(dict.fromkeys(sizes(model), 4))
    fit(model, PRILoRA(**LINE, sparsity=0), steps=1)
    assert cost_model(model).total(sizes(model)) > mean
    model = Toy(LoRA, widths=(12, 48, 100))
    fit(model, PRILoRA(**LINE, sparsity=0, unit="parameters"), steps=1)
    found, cost = sizes(model), cost_model(model)
    assert mean - max(cost.marginal(key, found) for key in found) < cost.total(found) <= mean
    assert list(found.values()) == sorted(found.values())


def test_a_ceiling_cuts_and_says_so(caplog):
    model = Deep(SVD, blocks=3)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        fit(model, PRILoRA(8, 16, sparsity=0), steps=1)
    assert list(sizes(model).values()) == [8, 12, 12]
    assert (
        "PRILoRA wants 16 units for maps.2:rank, which takes 12 at most. 1 such axes get fewer"
        in caplog.text
    )


def test_the_scale_stays():
    model = Deep(partial(LoRA, rank=8, alpha=16))
    fit(model, PRILoRA(**LINE, sparsity=0), steps=1)
    assert [w.scale for w in wrappers(model)] == [2, 2, 2]


# ---- zeros


def zeros(tensor):
    return (tensor == 0).sum(1).tolist()


@pytest.mark.parametrize(
    ("fraction", "width", "count"),
    [(0.5, 8, 4), (0.5, 7, 4), (0.1, 30, 3), (0.3, 10, 3), (0.99, 5, 4)],
)
def test_the_count_is_rounded_up_and_ties_fall_to_the_lower_column(fraction, width, count):
    mask = lowest(torch.ones(3, width), fraction)
    assert mask.sum(1).tolist() == [count] * 3
    assert mask[:, :count].all()
    random = torch.rand(3, width)
    mask = lowest(random, fraction)
    assert all(random[i][mask[i]].max() < random[i][~mask[i]].min() for i in range(3))


@pytest.mark.parametrize(
    "method",
    [
        LoRA,
        DoRA,
        SVD,
        partial(PiCa, side="output", share=False),
        partial(PiCa, side="output"),
        partial(SBoRA, variant="fb"),
        partial(MELoRA, minis=1),
        [HyperAdapt, LoRA],
    ],
)
@pytest.mark.parametrize("sparsity", [0.5, 0.3])
def test_an_event_leaves_exactly_so_many_zeros_in_each_row(method, sparsity):
    counted = []

    class Zeros(PRILoRA):
        def finish_step(self, state, axes):
            super().finish_step(state, axes)
            counted.append([zeros(factor.slot.tensor) for factor in input_factors(axes)])

    model, allocator = Deep(method), Zeros(first=3, last=5, sparsity=sparsity, every=4)
    fit(model, allocator, steps=10)
    ranks = [len(axis) for axis in rank_axes(model).values()]
    for step, rows in enumerate(counted, 1):
        if step in (4, 8):
            assert rows == [[math.ceil(round(16 * sparsity, 9))] * rank for rank in ranks]
        elif step < 4:
            assert not any(map(sum, rows))
        else:  # they are trained, and come back
            assert all(sum(row) < 8 * len(row) for row in rows)
    assert [event["step"] for event in allocator.events] == [0, 4, 8]
    assert (
        allocator.events[1]["reason"]
        == f"the least important {sparsity:.0%} of each row set to zero"
    )


def test_moments_stay_and_the_last_steps_leave_all_alone():
    seen = {}

    class Moments(PRILoRA):
        def finish_step(self, state, axes):
            (optimizer,) = self.run.optimizers
            A = axes["maps.0:rank"].members[0][0].A
            moments = optimizer.state[A]["exp_avg"].clone()
            super().finish_step(state, axes)
            assert torch.equal(moments, optimizer.state[A]["exp_avg"])
            assert (moments != 0).all() or self.run.steps_done == 1
            seen[self.run.steps_done] = zeros(A)

    fit(Deep(), Moments(**LINE, every=3, final=0.25), steps=24)
    assert [step for step, rows in seen.items() if sum(rows)] == [3, 6, 9, 12, 15, 18]


def test_constant_inputs_prune_by_magnitude():
    """And others do not."""

    class Constant(Deep):
        scale = torch.ones(16)

        def loss(self, index):
            signs = (
                torch.randn(8, 16, generator=torch.Generator().manual_seed(index)).sign()
                * self.scale
            )
            return sum((layer(signs) - 1).square().mean() for layer in self.maps)

    class Magnitudes(PRILoRA):
        def finish_step(self, state, axes):
            before = {key: axis.members[0][0].A.detach().clone() for key, axis in axes.items()}
            super().finish_step(state, axes)
            if self.run.steps_done == 2:
                for key, axis in axes.items():
                    A = axis.members[0][0].A
                    self.same = [
                        *getattr(self, "same", []),
                        torch.equal(A == 0, lowest(before[key].abs(), 0.5)),
                    ]
                    weighed = lowest(before[key].abs() * Constant.scale, 0.5)
                    assert torch.equal(A == 0, weighed)

    allocator = Magnitudes(**LINE, every=2)
    fit(Constant(), allocator, steps=3)
    assert all(allocator.same)
    Constant.scale = torch.linspace(0.1, 3, 16)
    allocator = Magnitudes(**LINE, every=2)
    fit(Constant(), allocator, steps=3)
    assert not any(allocator.same)


# ---- what is seen of the inputs


class Sees(Toy):
    """One layer in a list, with given inputs, a mask, and dropout."""

    def __init__(self, inputs, masks=None, method=LoRA, recompute=False):
        super().__init__(method, widths=(12,))
        self.inputs, self.masks, self.recompute = inputs, masks, recompute
        self.net = nn.Module()
        self.net.maps, self.maps = self.maps, None
        self.net.forward = self.forwarded

    def forwarded(self, x, attention_mask=None):
        layer = self.net.maps[0]
        return checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)

    def training_step(self, batch, batch_idx):
        mask = {} if self.masks is None else {"attention_mask": self.masks[batch_idx]}
        return self.net(self.inputs[batch_idx], **mask).square().mean()

    def validation_step(self, batch, batch_idx):
        self.net(1e3 * self.inputs[0])

    def val_dataloader(self):
        return torch.utils.data.DataLoader(range(2))


def average(allocator):
    (tracked,) = allocator.engine.state
    assert not tracked.dims
    return tracked.tensor


def by_hand(batches, beta):
    e = torch.zeros(16)
    for x in batches:
        e = (
            beta * e
            + (1 - beta) * x.reshape(-1, 16).norm(dim=0) / x.reshape(-1, 16).shape[0] ** 0.5
        )
    return e


def test_the_running_average_of_three_batches():
    """Unequal lengths count alike; what validation reads does not count; dropout comes later."""
    inputs = [torch.randn(2, length, 16) for length in (3, 5, 4)]
    model = Sees(inputs, method=partial(LoRA, dropout=0.5))
    allocator = PRILoRA(**LINE, every=3, beta=0.7, final=0)
    fit(model, allocator, steps=3, val_check_interval=1, check_val_every_n_epoch=None)
    torch.testing.assert_close(average(allocator), by_hand(inputs, 0.7))
    factor = (1 - 0.7) * torch.tensor([0.7**2, 0.7, 1.0])  # the same, of numbers
    rms = torch.stack([x.square().mean((0, 1)).sqrt() for x in inputs])
    torch.testing.assert_close(average(allocator), factor @ rms)


@pytest.mark.parametrize("recompute", [False, True])
def test_masked_tokens_do_not_count(recompute):
    inputs = [torch.randn(2, 4, 16) for _ in range(3)]
    masks = [
        torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]),
        torch.ones(2, 4),
        torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]]),
    ]
    allocator = PRILoRA(**LINE, every=3, final=0)
    fit(Sees(inputs, masks, recompute=recompute), allocator, steps=3)
    seen = [x[mask != 0] for x, mask in zip(inputs, masks, strict=True)]
    torch.testing.assert_close(average(allocator), by_hand(seen, 0.9))


def test_micro_batches_are_one_batch():
    inputs = [torch.randn(2, 4, 16) for _ in range(6)]
    whole = [torch.cat(inputs[i : i + 2]) for i in (0, 2, 4)]
    one, two = PRILoRA(**LINE, every=3, final=0), PRILoRA(**LINE, every=3, final=0)
    fit(Sees(whole), one, steps=3)
    fit(Sees(inputs), two, steps=3, accumulate_grad_batches=2)
    torch.testing.assert_close(average(one), average(two))


def test_processes_add_their_squares_and_tokens(monkeypatch):
    """The other process has seen twice the tokens, at twice the size."""

    def reduce(self, flat):
        squares, tokens = flat.split([16, 1])
        return (flat + torch.cat([8 * squares, 2 * tokens])) / 2

    monkeypatch.setattr(Run, "reduce", reduce)
    inputs = [torch.randn(2, 4, 16) for _ in range(3)]
    allocator = PRILoRA(**LINE, every=3, final=0)
    fit(Sees(inputs), allocator, steps=3)
    torch.testing.assert_close(average(allocator), math.sqrt(9 / 3) * by_hand(inputs, 0.9))


def test_what_is_no_number_is_not_averaged():
    inputs = [torch.randn(2, 4, 16) for _ in range(3)]
    bad = [inputs[0], inputs[1] * float("inf"), inputs[2]]
    allocator = PRILoRA(**LINE, every=3, final=0)
    with torch.no_grad():
        fit(Sees(bad), allocator, steps=3)
    torch.testing.assert_close(average(allocator), by_hand([inputs[0], inputs[2]], 0.9))


def test_the_rows_of_a_mini_see_its_slice():
    inputs = [torch.randn(2, 4, 16) * torch.linspace(0.1, 3, 16) for _ in range(2)]
    seen = []

    class Minis(PRILoRA):
        def finish_step(self, state, axes):
            ((layer, _),) = next(iter(axes.values())).members
            before = layer.A.detach().clone()
            super().finish_step(state, axes)
            seen.append((before, layer.A.detach().clone()))

    model = Sees(inputs, method=partial(MELoRA, rank=1, minis=4))
    fit(model, Minis(2, 2, every=2, final=0), steps=2)
    (layer,) = wrappers(model)
    assert layer.block.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]  # rank 2 in each mini
    before, after = seen[1]
    e = by_hand(inputs, 0.9)
    for unit, mini in enumerate(layer.block.tolist()):
        want = lowest((before[unit].abs() * e[4 * mini : 4 * mini + 4])[None], 0.5)[0]
        assert torch.equal(after[unit] == 0, want)


# ---- with others, and again


@pytest.mark.parametrize("sparsity", [0.5, 0])
def test_an_allocator_moves_what_it_starts_from(sparsity):
    model = Deep(SVD)
    provider, allocator = PRILoRA(**LINE, sparsity=sparsity, every=3), AdaLoRA(6, **PHASES)
    fit(model, allocator, provider)
    assert provider.events[0]["sizes"] == {"maps.0:rank": 2, "maps.1:rank": 4, "maps.2:rank": 6}
    assert allocator.events[0]["budget"] == math.floor(6 + 6 * (1 - 4 / 12) ** 3)
    assert sum(sizes(model).values()) == 6
    assert all(axis.gate is None for axis in rank_axes(model).values())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", [LoRA, partial(MELoRA, minis=4)], ids=["LoRA", "MELoRA"])
def test_resume_is_exact_to_the_bit(method, accumulate, tmp_path):
    """Between events, on one, and on one of the other allocator.

    Both before its sizes moved and after.
    """

    def both():
        return [PRILoRA(**LINE, every=5), AdaLoRA(10, soft=False, **PHASES)]

    whole, callbacks = Deep(method), both()
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    want = everything(
        whole, fit(whole, *callbacks, checkpoints, accumulate_grad_batches=accumulate)
    )
    for step in (3, 10, 14, 19):
        model, resumed = Deep(method), both()
        path = tmp_path / f"step={step}.ckpt"
        have = everything(
            model, fit(model, *resumed, ckpt_path=path, accumulate_grad_batches=accumulate)
        )
        assert have.keys() == want.keys()
        assert not [key for key in want if not torch.equal(have[key], want[key])]
        assert [c.events for c in resumed] == [c.events for c in callbacks]
        kept, kept_whole = (pair[0].engine.state.state_dict() for pair in (resumed, callbacks))
        assert kept.keys() == kept_whole.keys()
        for key, tensors in kept_whole.items():
            assert kept[key].keys() == tensors.keys()
            assert all(torch.equal(kept[key][n]["tensor"], tensors[n]["tensor"]) for n in tensors)


def test_hooks_are_gone_afterwards():
    model = Deep()
    fit(model, PRILoRA(**LINE, every=2), steps=4)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---- what is refused


@pytest.mark.parametrize("method", [TensorTrain, Kronecker, MiSS])
def test_methods_without_an_input_side_factor_have_ranks_only(method):
    with pytest.raises(
        ValueError,
        match=r"with sparsity=0.5 needs axes that can input_factor "
        rf"\(with sparsity=0.0 it does not\), and {method.__name__}",
    ):
        fit(Deep(method), PRILoRA())
    model = Deep(method)
    assert PRILoRA.pair(method.__name__) == "sparsity=0.0"
    fit(model, PRILoRA(2, 4, sparsity=0), steps=2)
    found = list(sizes(model).values())
    assert found[0] < found[-1]


def test_what_cannot_have_ranks_by_a_rule():
    with pytest.raises(ValueError, match="PRILoRA needs axes that can pattern, and NOLA"):
        fit(Deep(NOLA), PRILoRA(sparsity=0))
    with pytest.raises(ValueError, match="HyperAdapt has no rank axis"):
        fit(Deep(HyperAdapt), PRILoRA())
    assert PRILoRA.works_with("LoRA")
    with pytest.raises(ValueError, match="input_factor"):
        fit(Deep(SBoRA), PRILoRA())


def test_layers_that_read_no_vectors():
    model = Deep()
    model.maps = adapt(nn.ModuleList([nn.Embedding(5, 8)]), ["0"], LoRA)
    with pytest.raises(
        ValueError,
        match=r"PRILoRA prunes A by the vectors that a layer reads, "
        r"and maps\.0:rank is Embedding",
    ):
        fit(model, PRILoRA(**LINE, every=2))


def test_a_run_that_would_never_prune():
    with pytest.raises(
        ValueError, match="never prune A: every 40 steps, and 22 of 24 steps before the final phase"
    ):
        fit(Deep(), PRILoRA())
    fit(Deep(), PRILoRA(sparsity=0))


@pytest.mark.parametrize(
    "arguments",
    [{"first": 0}, {"last": 0}, {"sparsity": 1}, {"sparsity": -0.1}, {"beta": 1}, {"every": 0}],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(
        ValueError, match=r"ranks are at least 1|both are fractions|others are at least 1"
    ):
        PRILoRA(**arguments)
