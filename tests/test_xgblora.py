"""XGBLoRA: boosters on random blocks, merged round by round."""

import copy
from functools import partial

import pytest
import torch
from conftest import LINEAR_METHODS
from lightning.pytorch import Trainer
from test_allocators import Toy, fit
from torch import nn

from adaptrank import testing
from adaptrank._errors import UserError
from adaptrank.allocation import AdaLoRA
from adaptrank.artifacts import load_adapter, save_adapter
from adaptrank.axes import rank_axes
from adaptrank.data import ArithmeticProblems
from adaptrank.injection import adapt
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import DoRA, HyperAdapt, LoRA, PiCa, wrapped_layers
from adaptrank.reports.round_table import round_rows
from adaptrank.strategies import XGBLoRA, ledger_of
from adaptrank.strategies.block_groups import group_by_block
from adaptrank.strategies.methods.xgblora import draw_blocks

LORA1 = partial(LoRA, rank=1, alpha=2.0)
ROUND, TOTAL = 3, 12


class Block(nn.Module):
    """Two linear layers beside a residual."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Four blocks and a layer outside of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.last = nn.Linear(12, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def stack(method=LORA1):
    torch.manual_seed(0)
    return adapt(Stack().double(), "all-linear", method)


def inputs(seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(8, 12, generator=random, dtype=torch.float64)


def train(strategy, model, steps=TOTAL, watch=lambda step, optimizer: None):
    """Train in a plain loop; `watch` is called between the optimizer's step and the strategy's."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    strategy.start(model, optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        (model(inputs(step)) - 1).square().mean().backward()
        optimizer.step()
        watch(step, optimizer)
        strategy.step()
    strategy.finish()


def weights(model):
    return {path: layer.dense().detach() for path, layer in wrapped_layers(model).items()}


# ---- which blocks


def test_blocks_are_members_of_module_lists_and_other_layers_stand_alone():
    model = stack()
    model.layers[1].experts = nn.ModuleList([Block()])
    paths = [*wrapped_layers(model), "layers.1.experts.0.up"]
    groups = group_by_block(model, paths)
    assert list(groups) == ["layers.0", "layers.1", "layers.2", "layers.3", "last"]
    assert groups["layers.1"] == ["layers.1.up", "layers.1.down", "layers.1.experts.0.up"]
    assert list(group_by_block(Toy(LORA1), ["maps.0", "maps.2"])) == ["maps.0", "maps.2"]


def test_a_draw_depends_on_seed_and_round_alone_and_is_uniform():
    names = [f"layers.{number}" for number in range(6)]
    drawn = []
    for noise in (0, 9):
        torch.manual_seed(noise)
        drawn.append([draw_blocks(names, 2, 3, number) for number in range(300)])
    assert drawn[0] == drawn[1]
    assert drawn[0] != [draw_blocks(names, 2, 4, number) for number in range(300)]
    assert all(len(set(pair)) == 2 for pair in drawn[0])
    counts = [sum(name in pair for pair in drawn[0]) for name in names]
    # Each count is binomial, with mean 100 and standard deviation 8.2.
    assert all(abs(count - 100) < 41 for count in counts), counts


# ---- rounds


def test_a_round_trains_the_drawn_blocks_and_leaves_the_others_to_the_bit():
    model, strategy = stack(), XGBLoRA(every=ROUND, seed=1)
    before, drawn = {}, set()

    def watch(step, optimizer):
        number = strategy.run.number
        after, blocks = weights(model), strategy.drawn_blocks(number)
        assert len(blocks) == 2  # a third of five, rounded up
        for block, paths in group_by_block(model, wrapped_layers(model)).items():
            for path in paths:
                wrapper = wrapped_layers(model)[path]
                is_drawn = block in blocks
                assert wrapper.axis_size("rank") == int(is_drawn)
                assert wrapper.idle is not is_drawn
                assert (wrapper.A in optimizer.state) is is_drawn
                if before and step % ROUND == ROUND - 1:
                    assert torch.equal(after[path], before[path]) is not is_drawn
        drawn.update(blocks)

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    strategy.start(model, optimizer, TOTAL)
    for step in range(TOTAL):
        if step % ROUND == 0:
            before = weights(model)
            assert not optimizer.state
        optimizer.zero_grad()
        (model(inputs(step)) - 1).square().mean().backward()
        optimizer.step()
        watch(step, optimizer)
        strategy.step()
    assert len(drawn) > 2
    events = strategy.round_events
    assert [event["step"] for event in events] == [0, 3, 6, 9]
    for number, event in enumerate(events):
        assert event["blocks"] == strategy.drawn_blocks(number)
        live = sum(
            wrapped_layers(model)[p].shape[0] + wrapped_layers(model)[p].shape[1]
            for block in event["blocks"]
            for p in group_by_block(model, wrapped_layers(model))[block]
        )
        assert event["trained"] == live
    stored = [event["stored"] for event in events]
    assert stored[0] == 0
    assert stored == sorted(stored)
    assert stored[-1] > events[-1]["trained"]


def test_the_weight_is_the_sum_of_all_boosters_and_its_rank_is_at_most_their_number():
    model, strategy = stack(), XGBLoRA(every=ROUND)
    frozen = {path: layer.innermost.weight for path, layer in wrapped_layers(model).items()}
    total = {path: torch.zeros_like(weight) for path, weight in frozen.items()}
    times = dict.fromkeys(frozen, 0)

    def watch(step, optimizer):
        if step % ROUND == ROUND - 1:
            for path, layer in wrapped_layers(model).items():
                total[path] += layer.scale * (layer.B @ layer.A).detach()
                times[path] += layer.axis_size("rank")

    train(strategy, model, watch=watch)
    for path, weight in weights(model).items():
        change = weight - frozen[path]
        torch.testing.assert_close(change, total[path], rtol=0, atol=1e-14)
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) <= times[path]
    assert max(times.values()) > 1


@pytest.mark.parametrize("shrinkage", [1.0, 0.25])
def test_a_border_keeps_the_function_or_shrinks_the_booster(shrinkage):
    model, strategy = stack(), XGBLoRA(every=ROUND, shrinkage=shrinkage)
    assert strategy.preserves_function is (shrinkage == 1)
    x = inputs(99)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    strategy.start(model, optimizer, TOTAL)
    start = weights(model)
    for step in range(2 * ROUND):
        optimizer.zero_grad()
        (model(inputs(step)) - 1).square().mean().backward()
        optimizer.step()
        before, output = weights(model), model(x).detach()
        event = strategy.step()
        if event is None:
            continue
        assert event["shrinkage"] == shrinkage
        for path, weight in weights(model).items():
            shrunk = start[path] + shrinkage * (before[path] - start[path])
            torch.testing.assert_close(weight, shrunk, rtol=0, atol=1e-14)
        moved = float((model(x) - output).detach().abs().max())
        assert moved < 1e-12 if shrinkage == 1 else moved > 1e-6
        start = weights(model)


def test_the_warm_up_of_long_rounds():
    long, short = XGBLoRA(every=300), XGBLoRA(every=200)
    rates = [long.rate(step, {}) for step in range(300, 340)]
    assert rates[:31] == [(step + 1) / 30 for step in range(30)] + [1.0]
    assert all(long.rate(step, {}) == 1 for step in range(300))
    assert all(short.rate(step, {}) == 1 for step in range(600))
    assert XGBLoRA(every=1000).restart_warmup == 50
    assert XGBLoRA(every=10, restart_warmup=4).rate(10, {}) == 0.25


# ---- adapters before and after


def test_an_adapter_that_a_run_starts_from_is_kept():
    model = stack(partial(LoRA, rank=2))
    testing.perturb(model)
    x, strategy = inputs(5), XGBLoRA(every=ROUND)
    want = model(x).detach()
    strategy.start(model, torch.optim.SGD(model.parameters(), lr=0.1), TOTAL)
    torch.testing.assert_close(model(x).detach(), want, rtol=0, atol=1e-12)
    assert all(len(ledger_of(layer).A) == 2 for layer in wrapped_layers(model).values())


def test_layers_without_a_booster_are_saved_and_loaded(tmp_path):
    base = Stack().double()
    model, strategy = adapt(copy.deepcopy(base), "all-linear", LORA1), XGBLoRA(every=ROUND)
    train(strategy, model)
    save_adapter(model, tmp_path)
    want = model(inputs())
    assert torch.equal(load_adapter(copy.deepcopy(base), tmp_path)(inputs()), want)


@pytest.mark.parametrize("cls", LINEAR_METHODS, ids=lambda cls: cls.__name__)
def test_every_method_with_units_boosts_and_the_others_are_refused_by_name(cls):
    layers = nn.ModuleList(nn.Linear(48, 24).double() for _ in range(2))
    model = adapt(layers, "all-linear", cls)
    strategy, x = XGBLoRA(every=2, blocks=1), torch.randn(6, 48, dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tied = type(model[0]).shared and len(rank_axes(model)) < 2
    without = all(model[0].acts_without(axis) for axis in model[0].axes)
    if tied or without:
        reason = "is shared by 2 layers" if tied else f"{cls.__name__} trains without units"
        with pytest.raises(UserError, match=reason):
            strategy.start(model, optimizer, 6)
        return
    strategy.start(model, optimizer, 6)
    for _ in range(6):
        optimizer.zero_grad()
        sum(layer(x).square().mean() for layer in model).backward()
        optimizer.step()
        before = [layer(x).detach() for layer in model]
        strategy.step()
        for layer, want in zip(model, before, strict=True):
            torch.testing.assert_close(layer(x).detach(), want, rtol=0, atol=1e-11)
        idle = [layer.idle for layer in model]
        assert sorted(idle) == [False, True]


# ---- refusals


def test_refusals():
    def start(model, strategy, allocators=()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        strategy.start(model, optimizer, TOTAL, allocators=allocators)

    for method in (DoRA, HyperAdapt, [HyperAdapt, LORA1]):
        with pytest.raises(UserError, match="trains without units; use a method such as LoRA"):
            start(stack(method), XGBLoRA())
    with pytest.raises(UserError, match="is shared by"):
        start(stack(partial(PiCa, rank=2)), XGBLoRA())
    with pytest.raises(UserError, match="blocks=6: this model has 5 blocks"):
        start(stack(), XGBLoRA(blocks=6))
    with pytest.raises(UserError, match="XGBLoRA and AdaLoRA: it moves units"):
        start(stack(), XGBLoRA(every=ROUND), [AdaLoRA(budget=2)])
    model = stack()
    adapted = wrapped_layers(model)["layers.2.up"]
    adapted.A.data, adapted.B.data = adapted.A.data.repeat(3, 1), adapted.B.data.repeat(1, 3)
    with pytest.raises(UserError, match=r"layers.2.up:rank has 3 units, .* the 1 of the adapter"):
        start(model, XGBLoRA(every=ROUND))
    for arguments in ({"shrinkage": 0.0}, {"shrinkage": 1.5}, {"every": 0}, {"blocks": 0}):
        with pytest.raises(UserError, match=f"{next(iter(arguments))}="):
            XGBLoRA(**arguments)
    with pytest.raises(UserError, match="restart_warmup=20 is longer than a round"):
        XGBLoRA(every=10, restart_warmup=20)


# ---- the loss around a merge


class Watched(XGBLoRA, registered=False):
    """Notes the loss of the toy's first batch around each border."""

    def leave(self, number):
        self.seen = [float(self.run.model.loss(0))]
        super().leave(number)

    def describe_border(self, number):
        if number:
            self.seen.append(float(self.run.model.loss(0)))
            self.around.append(self.seen)
        return super().describe_border(number)


def test_the_event_of_a_shrunk_merge_has_the_loss_before_and_after_it():
    toy, strategy = Toy(partial(LoRA, rank=2)), Watched(every=8, blocks=2, shrinkage=0.5)
    strategy.around = []
    fit(toy, strategy)
    measured = [(event["loss_before"], event["loss_after"]) for event in strategy.round_events[1:]]
    assert len(measured) == 2
    torch.testing.assert_close(measured, [tuple(seen) for seen in strategy.around])
    assert all(after > before for before, after in measured)
    assert "loss_before" not in strategy.round_events[0]


def test_measuring_the_loss_leaves_no_trace_in_the_training():
    def trained(measured):
        toy = Toy(partial(LoRA, rank=2, dropout=0.3))
        strategy = XGBLoRA(every=8, blocks=2, shrinkage=0.5)
        strategy.preserves_function = not measured
        torch.manual_seed(1)
        fit(toy, strategy)
        assert ("loss_before" in strategy.round_events[-1]) is measured
        return weights(toy), toy.training

    (with_it, mode), (without, same_mode) = trained(True), trained(False)
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
    assert mode is same_mode


def test_a_merge_in_full_measures_nothing():
    strategy = XGBLoRA(every=8, blocks=2)
    fit(Toy(partial(LoRA, rank=2)), strategy)
    assert all("loss_before" not in event for event in strategy.round_events)


def test_the_report_shows_the_loss_around_a_merge():
    rounds = [
        {"step": 0, "round": 0, "trained": 10},
        {"step": 8, "round": 1, "trained": 10, "loss_before": 0.5, "loss_after": 0.75},
    ]
    assert [row["loss"] for row in round_rows(rounds)] == ["", "0.5 to 0.75"]


def test_measuring_the_loss_leaves_no_trace_in_a_language_model(tiny_llama):
    def trained(measured):
        module = CausalLM(
            tiny_llama,
            [Adapter([partial(LoRA, rank=2)])],
            optimizer=partial(torch.optim.AdamW, lr=0.01),
            dtype="fp32",
        )
        strategy = XGBLoRA(every=2, shrinkage=0.5)
        strategy.preserves_function = not measured
        torch.manual_seed(1)
        data = ArithmeticProblems(batch_size=2, train_size=32, val_size=2)
        trainer = Trainer(
            callbacks=[strategy],
            max_steps=6,
            accumulate_grad_batches=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, datamodule=data)
        assert ("loss_before" in strategy.round_events[-1]) is measured
        return weights(module.model), trainer.callback_metrics["train_loss"]

    (with_it, loss), (without, same_loss) = trained(True), trained(False)
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)
    assert loss == same_loss
