"""SubLoRA: rounds of second-order greedy pruning."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import Toy, everything, fit, sizes

from adaptrank.allocation import AdaLoRA, SubLoRA, checks
from adaptrank.allocation.scores import curvature as second_order
from adaptrank.allocation.scores import submodular
from adaptrank.axes import cost_model
from adaptrank.parameterizations import NOLA, SVD, DoRA, HyperAdapt, LoRA, MELoRA, PiCa, TensorTrain

LORA4 = partial(LoRA, rank=4)
PHASES = {"every": 4, "warmup": 6, "final": 6}


class Rows(Toy):
    """A batch is its rows, so that examples mean something."""

    def train_dataloader(self):
        data = torch.randn(800, 16, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(data, batch_size=8)

    def training_step(self, batch, batch_idx):
        return sum(
            ((i + 1) * layer(batch) - batch[:, torch.arange(layer.shape[0]) % 16]).square().mean()
            for i, layer in enumerate(self.maps)
        )


@pytest.mark.parametrize("rule", ["fisher", "published", "block"])
@pytest.mark.parametrize(
    "method",
    [
        LORA4,
        partial(SVD, rank=4),
        partial(DoRA, rank=4),
        [HyperAdapt, LORA4],
        TensorTrain,
        partial(MELoRA, minis=4),
        PiCa,
    ],
    ids=["LoRA", "SVD", "DoRA", "hybrid", "TT", "MELoRA", "PiCa"],
)
def test_the_budget_is_met_exactly_in_every_round(method, rule):
    model, allocator = Rows(method), SubLoRA(rule=rule, batches=1, **PHASES)
    start = sum(sizes(model).values())
    fit(model, allocator)
    assert [event["step"] for event in allocator.events] == [10, 14, 18]
    assert all(event["total"] == event["budget"] for event in allocator.events)
    assert sum(sizes(model).values()) == start // 2


def test_parameters_as_the_unit():
    model = Rows(LORA4, widths=(12, 6, 9))
    budget = cost_model(model).total(sizes(model)) // 2
    allocator = SubLoRA(budget, unit="parameters", batches=1, **PHASES)
    fit(model, allocator)
    assert allocator.events[-1]["total"] <= budget < allocator.events[-1]["total"] + 28


def test_under_the_budget_where_staying_hurts():
    model, allocator = Rows(LORA4), SubLoRA(12, allow_under_budget=True, batches=1, **PHASES)
    fit(model, allocator)
    assert allocator.events[-1]["total"] <= 12


def test_an_event_says_where_the_guarantee_does_not_hold(monkeypatch):
    monkeypatch.setattr(submodular, "greedy", lambda *a: (list(range(12))[: a[2]], False))
    monkeypatch.setattr(checks, "check_plan", lambda *a: None)
    monkeypatch.setattr(submodular, "as_plan", lambda *a: {})
    allocator = SubLoRA(batches=1, floor=1, **PHASES)
    fit(Rows(LORA4), allocator)
    assert "heuristic" in allocator.events[0]["reason"]


def test_resume_is_exact_to_the_bit(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def make():
        return SubLoRA(batches=1, **PHASES)

    whole, allocator = Toy(LORA4), make()
    want = everything(whole, fit(whole, allocator, checkpoint))
    for step in (4, 10, 13, 18, 20):
        model, resumed = Toy(LORA4), make()
        have = everything(model, fit(model, resumed, ckpt_path=tmp_path / f"step={step}.ckpt"))
        assert resumed.events == allocator.events
        assert not [key for key in want if not torch.equal(have[key], want[key])], step


@pytest.mark.parametrize(
    "importance", ["second_order", "second_order_exact", "second_order_block", "explained_variance"]
)
def test_its_scores_are_for_others_too(importance):
    model, allocator = Rows(LORA4), AdaLoRA(6, importance=importance, **PHASES)
    fit(model, allocator)
    assert sum(sizes(model).values()) == 6


def test_refusals(monkeypatch):
    monkeypatch.setattr(second_order, "MAX_UNITS", 100)
    with pytest.raises(
        ValueError,
        match=r"SubLoRA: the Hessian of 192 units is too large, 100 are the most\. Take the one "
        r"within",
    ):
        fit(Rows(NOLA), SubLoRA(batches=1, **PHASES))
    fit(Rows(NOLA), SubLoRA(rule="block", batches=1, **PHASES))
    with pytest.raises(ValueError, match="use 'fisher', 'published' or 'block'"):
        SubLoRA(rule="hessian")
