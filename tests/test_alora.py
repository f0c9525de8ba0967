"""ALoRA: rounds of ablation, pruning and sharing out."""

from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_allocators import Toy, everything, fit, sizes

from adaptrank.allocation import ALoRA
from adaptrank.axes import cost_model
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    MELoRA,
    MiSS,
    PiCa,
    SBoRA,
    TensorTrain,
)

PHASES = {"every": 4, "warmup": 6, "final": 6}
LORA4 = partial(LoRA, rank=4)


@pytest.mark.parametrize("importance", ["ablation", "ablation_first_order"])
@pytest.mark.parametrize(
    "method",
    [
        LORA4,
        partial(SVD, rank=4),
        DoRA,
        [HyperAdapt, LORA4],
        TensorTrain,
        partial(MELoRA, minis=4),
        SBoRA,
        PiCa,
        MiSS,
    ],
    ids=["LoRA", "SVD", "DoRA", "hybrid", "TT", "MELoRA", "SBoRA", "PiCa", "MiSS"],
)
def test_the_total_never_exceeds_the_start(method, importance):
    model, allocator = Toy(method), ALoRA(importance=importance, **PHASES)
    start = sum(sizes(model).values())
    fit(model, allocator)
    assert [event["step"] for event in allocator.events] == [10, 14, 18]
    totals = [event["total"] for event in allocator.events]
    assert all(total <= start for total in totals)
    assert totals == sorted(totals, reverse=True)
    assert any(event["pruned"] for event in allocator.events)


def test_parameters_as_the_unit():
    model, allocator = Toy(LORA4, widths=(12, 6, 9)), ALoRA(unit="parameters", units=3, **PHASES)
    start = cost_model(model).total(sizes(model))
    fit(model, allocator)
    assert all(event["total"] <= start for event in allocator.events)
    assert any(event["grown"] for event in allocator.events)


def test_rounds_end():
    """No loss is evaluated after the last round, because exact ablation is expensive."""
    asked = []

    class Counting(Toy):
        def loss(self, batch):
            if not self.training:
                asked.append(allocator.engine.run.steps_done)
            return super().loss(batch)

    model, allocator = Counting(LORA4), ALoRA(rounds=2, **PHASES)
    fit(model, allocator)
    assert [bool(event["pruned"]) for event in allocator.events] == [True, True, False]
    assert sorted(set(asked)) == [10, 14]
    last = allocator.events[-1]
    assert last["total"] == allocator.events[-2]["total"]
    assert not last["scores"]


@pytest.mark.parametrize("importance", ["ablation", "ablation_first_order"])
def test_scores_are_the_mean_over_batches(importance):
    scores = {}

    class Keeping(ALoRA):
        def plan(self, found, cost, budget, step):
            scores[self.count, step] = found
            return super().plan(found, cost, budget, step)

    class Numbered(Toy):
        def training_step(self, batch, batch_idx):
            return self.loss(int(batch[0]))

    def first_round(batches):
        model, allocator = (
            Numbered(LORA4),
            Keeping(batches=batches, importance=importance, **PHASES),
        )
        fit(model, allocator)
        return allocator

    allocator = first_round(3)
    assert len(allocator.run.examples) == 3
    assert len({int(batch[0]) for batch in allocator.run.examples}) == 3
    # Until the first round the runs differ in the number of examples only. The scores of single
    # examples therefore average to the scores of all examples.
    alone = []
    for batch in allocator.run.examples:

        class Only(Keeping):
            def install(self, state, axes, batch=batch):
                self.run.progress.examples = [batch]

        fit(Numbered(LORA4), Only(importance=importance, **PHASES))
        alone.append(scores[1, 10])
    for key, values in scores[3, 10].items():
        torch.testing.assert_close(values, sum(one[key] for one in alone) / 3, rtol=1e-4, atol=1e-6)


def test_a_score_that_reads_no_data_asks_for_none():
    assert ALoRA(batches=3, importance="magnitude").examples_needed() == 0


def test_the_examples_are_in_the_checkpoint(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)

    def make():
        return ALoRA(units=2, batches=2, **PHASES)

    whole, allocator = Toy(LORA4), make()
    want = everything(whole, fit(whole, allocator, checkpoint))
    assert len(allocator.run.examples) == 2
    for step in (4, 10, 13, 18, 20):
        model, resumed = Toy(LORA4), make()
        have = everything(model, fit(model, resumed, ckpt_path=tmp_path / f"step={step}.ckpt"))
        assert resumed.events == allocator.events
        assert not [key for key in want if not torch.equal(have[key], want[key])], step


def test_refusals():
    with pytest.raises(
        ValueError, match="ALoRA would never act: every axis starts at its floor of 1"
    ):
        fit(Toy(partial(LoRA, rank=1)), ALoRA(floor=1, **PHASES))
    with pytest.raises(ValueError, match="ALoRA would never act: the adapter has one unit in all"):
        fit(Toy(partial(LoRA, rank=1), widths=(12,)), ALoRA(**PHASES))
    for arguments in ({"units": 0}, {"units": 1.5}, {"rounds": 0}, {"batches": 0}):
        with pytest.raises(ValueError, match="prune at least one unit"):
            ALoRA(**arguments)
