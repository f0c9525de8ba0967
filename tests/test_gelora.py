"""GeLoRA, arXiv:2412.09250: dimensions of planted points and blocks, and the ranks that follow."""

import logging
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import PHASES, everything, fit, sizes
from torch import nn

from adaptrank.allocation import AdaLoRA, GeLoRA
from adaptrank.allocation.initial import gelora
from adaptrank.allocation.initial.gelora import ranks_of
from adaptrank.allocation.initial.hidden_states import pooled
from adaptrank.allocation.initial.intrinsic_dimension import two_nn
from adaptrank.axes import CostModel, cost_model
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

# ---- TwoNN


def gaussian(d, count, seed, width=64):
    """Points of dimension d in a space of 64."""
    random = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(width, d, generator=random, dtype=torch.float64)).Q
    return torch.randn(count, d, generator=random, dtype=torch.float64) @ frame.T


@pytest.mark.parametrize("method", ["slope", "mle"])
@pytest.mark.parametrize(("count", "seeds"), [(2000, 1), (300, 12)])
def test_the_dimension_of_gaussian_points(count, seeds, method):
    """Within 10 % up to 10; 20 comes out too low, and is known to."""
    for d in (1, 2, 5, 10, 20):
        found = sum(two_nn(gaussian(d, count, seed), method) for seed in range(seeds)) / seeds
        if d <= 10:
            assert found == pytest.approx(d, rel=0.1)
        else:
            assert 14 < found < 18


def test_the_slope_is_that_of_exact_distances():
    x = gaussian(3, 200, 0)
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    first, second = distances.sort().values[:, 1:3].T
    logs = (second / first).log().sort().values[:180]
    heights = -(1 - torch.arange(1, 181) / 200).log().double()
    slope = torch.linalg.lstsq(logs[:, None], heights[:, None]).solution.item()
    assert two_nn(x) == pytest.approx(slope, rel=1e-6)
    logs = (second / first).log()
    assert two_nn(x, "mle") == pytest.approx(200 / logs.sum().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("offset", "dtype"),
    [(0, torch.float64), (1e6, torch.float64), (0, torch.float32), (1e3, torch.float32)],
)
def test_copies_count_once(offset, dtype):
    """Far from the origin as well.

    There, products of the points themselves would lose the digits in which they differ.
    """
    x = (gaussian(5, 600, 0) + offset).to(dtype)
    alone = two_nn(x)
    assert alone == pytest.approx(two_nn(gaussian(5, 600, 0)), rel=1e-3)
    assert two_nn(torch.cat([x, x[:200]])) == pytest.approx(alone, rel=1e-9)
    assert two_nn(torch.cat([x, x, x])) == pytest.approx(alone, rel=1e-9)
    if dtype == torch.float64:  # rounded differently, as the same example in another batch
        assert two_nn(torch.cat([x, x + 1e-9 * torch.randn_like(x)])) == pytest.approx(
            alone, rel=1e-6
        )


def test_points_that_tell_nothing():
    with pytest.raises(ValueError, match="needs three points that differ, and 2 of these 6 do"):
        two_nn(torch.eye(2).repeat(3, 1))
    with pytest.raises(ValueError, match="equally far from their two nearest neighbours"):
        two_nn(torch.eye(8))


# ---- from dimensions to ranks


@pytest.mark.parametrize(
    ("dimensions", "ranks"),
    [
        ([3.2, 7.4, 7.4, 2.0, 2.6], [5, 1, 1, 2]),
        ([9, 5], [1]),
        ([0.5, 1.5], [2]),  # half up, both: 1 and 2
        ([2.5, 3.49], [1]),
    ],
)
def test_the_rank_is_what_the_dimension_grows_by_and_one(dimensions, ranks):
    assert ranks_of(dimensions) == ranks


def test_pooling_reads_what_the_mask_lets_through():
    hidden = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])  # padded on the right, and on the left
    assert torch.equal(
        pooled(hidden, mask, "mean").float(),
        torch.stack([hidden[0, :2].mean(0), hidden[1, 1:].mean(0)]),
    )
    assert torch.equal(pooled(hidden, mask, "last"), torch.stack([hidden[0, 1], hidden[1, 3]]))
    assert torch.equal(pooled(hidden, mask, "first"), torch.stack([hidden[0, 0], hidden[1, 1]]))
    assert torch.equal(pooled(hidden, None, "last"), hidden[:, -1])
    assert torch.equal(
        pooled(hidden, mask[:, :2], "mean").float(), hidden.mean(1)
    )  # of other tokens, so not of these
    assert torch.equal(pooled(hidden[:, 0], mask, "mean"), hidden[:, 0])
    assert pooled(torch.zeros(2, 3, 4, 5), mask, "mean").shape == (2, 60)


def test_costs_of_steps_with_some_axes_fixed():
    cost = CostModel(7, ((3, ("a",)), (2, ("a", "b")), (5, ("b",)), (1, ("c", "c"))))
    steps = cost.in_steps({"a": 4, "b": 1, "c": 2}, {"b": 6})
    for a, c in ((1, 1), (3, 2)):
        assert steps.total({"a": a, "c": c}) == cost.total({"a": 4 * a, "b": 6, "c": 2 * c})


# ---- in a run

LORA4 = partial(LoRA, rank=4)
GROWS = (1, 5, 2, 2)  # dimension of what each of three blocks reads, and of what the last gives


class Blocks(lightning.LightningModule):
    """Three blocks in a row.

    Each shows the first few of 16 coordinates, and makes the others too small to be seen.
    """

    def __init__(self, method=LORA4, dimensions=GROWS, copies=1, examples=600):
        super().__init__()
        torch.manual_seed(0)
        gains = [torch.where(torch.arange(16) < d, 1, 1e-5) for d in dimensions]
        self.start = gains[0]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 16)) for _ in range(len(dimensions) - 1)
        )
        for layer, before, after in zip(self.layers, gains[:-1], gains[1:], strict=True):
            layer[0].weight.data, layer[0].bias.data = torch.diag(after / before), torch.zeros(16)
        adapt(self.layers, "all-linear", method)
        random = torch.Generator().manual_seed(1)
        self.data = torch.randn(examples, 1, 16, generator=random).repeat(copies, 3, 1)
        self.modes, self.rows = [], 0

    def train_dataloader(self):
        mask = torch.tensor([1, 1, 0]).expand(len(self.data), 3)
        rows = [{"x": x, "attention_mask": m} for x, m in zip(self.data, mask, strict=True)]
        return torch.utils.data.DataLoader(rows, batch_size=50)

    def training_step(self, batch, batch_idx):
        first = 50 * batch_idx % len(self.data) if self.training else 0
        x = (
            self.data[first : first + 50] if self.training else batch["x"]
        )  # a plain loader does not resume
        h = x * self.start
        h = (
            h + (1 - batch["attention_mask"][: len(x)])[..., None] * x.flip(-1).sin()
        )  # what is masked must not count
        self.modes.append(
            (self.training, torch.is_grad_enabled(), all(w.enabled for w in wrappers(self)))
        )
        self.rows += len(h)
        for layer in self.layers:
            h = layer(h)
        return (h - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


RANKS = {"layers.0.0:rank": 5, "layers.1.0:rank": 1, "layers.2.0:rank": 1}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_planted_dimensions_give_the_ranks(pooling, copies):
    model, allocator = Blocks(copies=copies), GeLoRA(pooling=pooling, samples=600 * copies)
    fit(model, allocator, steps=1)
    assert sizes(model) == RANKS
    (event,) = allocator.events
    assert event["step"] == 0
    assert event["sizes"] == RANKS
    assert event["dimensions"] == pytest.approx(GROWS, rel=0.2)
    assert event["grown"] == {"layers.0.0:rank": 1}
    assert event["pruned"] == {"layers.1.0:rank": [1, 2, 3], "layers.2.0:rank": [1, 2, 3]}


def test_it_looks_at_the_frozen_model_and_leaves_no_trace():
    model = Blocks()
    with torch.no_grad():
        for layer in wrappers(model):
            layer.B[:, 0] = 100  # an adapter that is trained already, in a unit that stays
    model.train()
    fit(model, GeLoRA(samples=240), steps=1)
    assert sizes(model) == RANKS
    assert model.modes == [(False, False, False)] * 5 + [(True, True, True)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.layers)


def test_what_fails_leaves_no_hook_and_adapters_on():
    class Fails(Blocks):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("no")

    model = Fails()
    with pytest.raises(RuntimeError, match="no"):
        fit(model, GeLoRA())
    assert all(w.enabled for w in wrappers(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.layers)


def test_the_scale_stays():
    model = Blocks()
    before = [w.scale for w in wrappers(model)]
    x = model.data[:2] * model.start
    outputs = [layer(x) for layer in model.layers]
    allocator = GeLoRA()
    batches, loss = model.train_dataloader(), lambda batch: model.training_step(batch, 0)
    allocator.start(model, model.configure_optimizers(), 4, batches=batches, loss=loss)
    assert sizes(model) == RANKS
    assert [w.scale for w in wrappers(model)] == before == [4, 4, 4]
    assert all(torch.equal(layer(x), y) for layer, y in zip(model.layers, outputs, strict=True))


@pytest.mark.parametrize("budget", [3, 4, 10, 21])
def test_a_budget_is_met_exactly(budget):
    model, allocator = Blocks(), GeLoRA(budget=budget)
    fit(model, allocator, steps=1)
    found = list(sizes(model).values())
    assert sum(found) == budget == allocator.events[0]["total"]
    assert min(found) >= 1
    assert found[0] == max(found)
    if budget == 21:
        assert found == [15, 3, 3]


def test_a_budget_in_parameters_is_not_exceeded():
    model = Blocks()
    fit(model, GeLoRA(budget=32 * 10 + 5, unit="parameters"), steps=1)
    assert cost_model(model).total(sizes(model)) == 320
    with pytest.raises(ValueError, match="A budget of 2 is below 3"):
        fit(Blocks(), GeLoRA(budget=2), steps=1)


def test_minis_get_the_same_rank():
    """The rank of 5 is 2 in each of 4 minis, rounded up, and that of 1 is 1."""
    model = Blocks(partial(MELoRA, rank=3, minis=4))
    fit(model, GeLoRA(), steps=1)
    assert [w.block.bincount(minlength=4).tolist() for w in wrappers(model)] == [
        [2] * 4,
        [1] * 4,
        [1] * 4,
    ]
    model = Blocks(partial(MELoRA, rank=1, minis=4))
    fit(model, GeLoRA(budget=21), steps=1)
    assert sum(sizes(model).values()) == 20
    assert all(len(set(w.block.bincount(minlength=4).tolist())) == 1 for w in wrappers(model))


@pytest.mark.parametrize("method", [LoRA, DoRA, SVD, partial(PiCa, share=False), SBoRA, MiSS])
def test_it_works_with(method):
    model = Blocks(method)
    fit(model, GeLoRA(), steps=2)
    assert sizes(model) == RANKS


def test_layers_that_share_a_tensor_take_the_largest():
    model = Blocks(PiCa)
    fit(model, GeLoRA(), steps=1)
    assert sizes(model) == {"layers.0.0:rank": 5}


def test_a_cap_cuts_and_says_so(caplog):
    model = Blocks()
    with caplog.at_level(logging.WARNING, "adaptrank"):
        fit(model, GeLoRA(cap=3), steps=1)
    assert list(sizes(model).values()) == [3, 1, 1]
    assert (
        "GeLoRA wants 5 units for layers.0.0:rank, which takes 3 at most. 1 such axes get fewer"
        in caplog.text
    )


def test_what_does_not_hold_is_said(caplog):
    model = Blocks([HyperAdapt, partial(LoRA, rank=4)], examples=90)
    model.other = adapt(
        nn.Sequential(nn.Sequential(nn.Linear(16, 4))), "all-linear", partial(LoRA, rank=2)
    )
    with caplog.at_level(logging.WARNING, "adaptrank"):
        fit(model, GeLoRA(), steps=1)
    assert "HyperAdapt changes the weight beside the low rank" in caplog.text
    assert "90 examples are few to tell a dimension from" in caplog.text
    assert (
        "1 axes lie outside of the blocks in 'layers' and keep their rank: other.0.0:rank."
        in caplog.text
    )
    assert sizes(model)["other.0.0:rank"] == 2


# ---- what is refused


@pytest.mark.parametrize("method", [NOLA, TensorTrain, Kronecker])
def test_units_that_do_not_bound_the_rank(method):
    with pytest.raises(
        ValueError,
        match=rf"GeLoRA needs axes that can matrix_rank, and {method.__name__} .*use one of .*LoRA",
    ):
        fit(Blocks(method), GeLoRA())


def test_no_axis_no_blocks_no_points():
    with pytest.raises(
        ValueError, match="GeLoRA has nothing to allocate: HyperAdapt has no rank axis"
    ):
        fit(Blocks(HyperAdapt), GeLoRA())
    model = Blocks()
    model.layers = None
    model.one = adapt(nn.ModuleDict({"a": nn.Linear(16, 16)}), "all-linear", LoRA)
    with pytest.raises(
        ValueError, match=r"lie in no numbered list of blocks, as 'one\.a:rank' does not"
    ):
        fit(model, GeLoRA())
    with pytest.raises(
        ValueError, match=r"GeLoRA cannot tell what layers\.0 reads: .* 2 of these 80 do"
    ):
        fit(Blocks(examples=2, copies=40), GeLoRA())


def test_units_that_cannot_grow(monkeypatch):
    monkeypatch.setattr(LoRA, "capabilities", LoRA.capabilities - {"grow"})
    model = Blocks()
    with pytest.raises(
        ValueError,
        match=r"GeLoRA asks layers\.0\.0:rank for 5 units, it has 4, and those of LoRA cannot grow",
    ):
        fit(model, GeLoRA())
    model = Blocks(partial(LoRA, rank=6))
    fit(model, GeLoRA(), steps=1)
    assert sizes(model) == RANKS


@pytest.mark.parametrize("arguments", [{"samples": 2}, {"pooling": "cls"}, {"estimator": "pca"}])
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"a dimension needs three|use 'mean', 'last' or 'first'"):
        GeLoRA(**arguments)


# ---- with others, again, and on several processes


def test_an_allocator_starts_from_its_total():
    model, provider = Blocks(), GeLoRA()
    allocator = AdaLoRA(soft=False, floor=1, **PHASES)
    fit(model, allocator, provider)
    assert allocator.events[0]["budget"] < 7
    assert allocator.events[-1]["total"] == int(7 / 1.5)
    assert sum(sizes(model).values()) == 4


def test_resume_is_exact_to_the_bit(tmp_path):
    def both():
        return [GeLoRA(samples=300), AdaLoRA(budget=5, soft=False, **PHASES)]

    whole, callbacks = Blocks(), both()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    want = everything(whole, fit(whole, *callbacks, checkpoint))
    for step in (4, 14, 21):
        model, resumed = Blocks(), both()
        have = everything(model, fit(model, *resumed, ckpt_path=tmp_path / f"step={step}.ckpt"))
        assert have.keys() == want.keys()
        assert not [key for key in want if not torch.equal(have[key], want[key])]
        assert [c.events for c in resumed] == [c.events for c in callbacks]
        assert all(training for training, _, _ in model.modes), (
            "it measures once, in the run that begins"
        )


def test_processes_share_their_vectors(monkeypatch):
    """Half of the examples each, and all of them decide."""
    seen = []

    def two(value):
        seen.append(value)
        return (
            [value, value + 1e-3 * torch.randn(value.shape)]
            if isinstance(value, torch.Tensor)
            else [value, value]
        )

    monkeypatch.setattr(gelora, "from_all", two)
    monkeypatch.setattr(gelora, "two_nn", lambda points, how: float(len(points)))
    allocator = GeLoRA(samples=101)
    fit(Blocks(), allocator, steps=1)
    assert [len(v) for v in seen[1:]] == [51] * 4
    assert allocator.events[0]["dimensions"] == [101] * 4
