"""Allocators through a real Trainer, on LightningModules that only hold wrappers."""

import logging
import math
import warnings
from functools import partial

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from adaptrank.allocation import ALLOCATORS, AdaLoRA, Allocator, DynamicRank, ElaLoRA
from adaptrank.allocation.bad_gradients import BadSteps
from adaptrank.allocation.plans import Close, Resize
from adaptrank.axes import cost_model, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    Parameterization,
)
from adaptrank.testing import trainable
from adaptrank.training.adapter_gradients import AdapterGradients

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
TOTAL, PHASES = 24, {"every": 4, "warmup": 6, "final": 6}  # events at 10, 14, 18


SVD4 = partial(SVD, rank=4)


class Toy(lightning.LightningModule):
    """Three independent layers, each with a target of its own; batch b is drawn from seed b."""

    def __init__(
        self, method=SVD4, dtype=torch.float32, make=torch.optim.Adam, widths=(12, 12, 12)
    ):
        super().__init__()
        torch.manual_seed(0)
        self.maps = nn.ModuleList(nn.Linear(16, m, dtype=dtype) for m in widths)
        adapt(self.maps, "all-linear", method)
        self.type_, self.make, self.seen = dtype, make, []

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(10**4), batch_size=1)

    def loss(self, index):
        random = torch.Generator().manual_seed(index)
        x = torch.randn(8, 16, generator=random).to(self.type_)
        return sum(
            ((i + 1) * layer(x) - x[:, torch.arange(layer.shape[0]) % 16]).square().mean()
            for i, layer in enumerate(self.maps)
        )

    def training_step(self, batch, batch_idx):
        self.seen.append(batch_idx)
        return self.loss(batch_idx)

    def configure_optimizers(self):
        optimizer = self.make([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return [optimizer], [
            {
                "scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=TOTAL),
                "interval": "step",
            }
        ]


def fit(model, *callbacks, steps=TOTAL, ckpt_path=None, **arguments):
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": steps,
        **arguments,
    }
    with warnings.catch_warnings():
        for theirs in ("lightning", "torch"):
            warnings.filterwarnings("ignore", module=rf"{theirs}\..*")
        trainer = lightning.Trainer(callbacks=list(callbacks), **settings)
        trainer.fit(model, ckpt_path=ckpt_path, **({"weights_only": True} if ckpt_path else {}))
    return trainer


def sizes(model):
    return {key: len(axis) for key, axis in rank_axes(model).items()}


class Chosen(Allocator):
    """A user's own, in a few lines: the longest rows of the first factor stay."""

    def score(self, axis):
        return axis.per_unit(lambda slot: slot.tensor.detach(), "norm")[axis.slots()[0].name]


ALL = {
    "AdaLoRA": lambda **k: AdaLoRA(budget=6, **PHASES, **k),
    "AdaLoRA hard": lambda **k: AdaLoRA(budget=6, soft=False, **PHASES, **k),
    "ElaLoRA": lambda **k: ElaLoRA(**PHASES, **k),
}


# ---- the shell


def test_the_registry():
    assert {"AdaLoRA", "ElaLoRA"} <= set(ALLOCATORS)
    assert "Chosen" in ALLOCATORS
    assert AdaLoRA.works_with("LoRA")
    assert not AdaLoRA.works_with("HyperAdapt")


@pytest.fixture
def scratch():
    """Classes defined in the test leave the registry with it."""
    before = dict(PARAMETERIZATIONS._classes)
    yield
    PARAMETERIZATIONS._classes.clear()
    PARAMETERIZATIONS._classes.update(before)


def test_axes_that_depend_on_arguments_are_those_of_the_default_ones(scratch):
    class Variants(LoRA):
        axes = property(
            lambda self: {"rank": {"A": 0, "B": 1}} if self.init_args["rank"] > 1 else {}
        )

    class Fixed(Variants):
        def __init__(self, base, *, rank=1):
            super().__init__(base, rank=rank)

    class Stiff(LoRA):
        def __init__(self, base):
            super().__init__(base)
            self.capabilities = frozenset()

    assert AdaLoRA.works_with("Variants")
    assert not AdaLoRA.works_with("Fixed")
    assert AdaLoRA.works_with("Stiff")
    assert not ElaLoRA.works_with("Stiff")
    with pytest.raises(
        ValueError, match=r"Fixed has no rank axis; use one of (?![^:]*Fixed)[^:]*Variants"
    ):
        fit(Toy(Fixed), ALL["AdaLoRA"]())
    with pytest.raises(
        ValueError,
        match=r"can grow, and Stiff at maps\.0:rank cannot; use one of (?!.*Stiff).*LoRA",
    ):
        fit(Toy(Stiff), ALL["ElaLoRA"]())


def test_what_cannot_be_nested_is_not_proposed(scratch):
    class Gains(Parameterization):
        """A trained gain of a norm."""

        source, accepts, mergeable = "", (nn.LayerNorm,), True

        def __init__(self, base):
            super().__init__(base)
            self.gain = self.zeros(len(base.weight))

        weight = property(lambda self: self.base_weight + self.gain)
        forward_adapted = Parameterization.definition
        example = classmethod(lambda cls: nn.LayerNorm(24))

    class Unfinished(LoRA):
        def __init__(self, base, *, needed):
            super().__init__(base)

    model = Toy()
    model.maps = nn.ModuleList([Gains(nn.LayerNorm(16))])
    with pytest.raises(ValueError, match=r"Gains has no rank axis; use one of [\w, ]+\.$") as said:
        fit(model, ALL["AdaLoRA"]())
    assert "Unfinished" not in str(said.value)


def test_axes_that_are_frozen_are_not_called_missing():
    model = Toy()
    model.requires_grad_(False)
    model.head = nn.Parameter(torch.zeros(()))
    with pytest.raises(ValueError, match="no tensor of a rank axis of SVD is trained"):
        fit(model, ALL["AdaLoRA"]())


def test_scores_see_whole_unclipped_gradients_once_a_step_and_events_follow_the_step():
    order, grads = [], []

    class Recording(Chosen):
        def observe(self, axes):
            order.append("observe")
            grads.append([s.tensor.grad.clone() for axis in axes.values() for s in axis.slots()])

        def after_step(self, axes):
            order.append("after_step")

        def carry_out(self, state, plan, step, apply):
            order.append(f"event {step}")
            return super().carry_out(state, plan, step, apply)

    class Stepping(Toy):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            order.append("step")

    model, twin = Stepping(LoRA), Toy(LoRA)
    allocator = Recording(budget=6, **PHASES)
    fit(model, allocator, accumulate_grad_batches=4, gradient_clip_val=1e-6)
    assert len(model.seen) == 4 * TOTAL
    want = []
    for step in range(1, TOTAL + 1):
        want += (
            ["observe"] * (step <= 18)
            + ["step", "after_step"]
            + [f"event {step}"] * (step in (10, 14, 18))
        )
    assert order == want
    sum(twin.loss(i) / 4 for i in range(4)).backward()
    own = [s.tensor.grad for axis in rank_axes(twin).values() for s in axis.slots()]
    for have, exact in zip(grads[0], own, strict=True):
        torch.testing.assert_close(have, exact, rtol=1e-5, atol=1e-7)
    assert [event["step"] for event in allocator.events] == [10, 14, 18]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "method", [SVD, LoRA, DoRA, [HyperAdapt, LoRA]], ids=["SVD", "LoRA", "DoRA", "hybrid"]
)
@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_the_budget_holds_at_every_event(name, method, unit):
    methods = method if isinstance(method, list) else [method]
    made = [partial(m, rank=4) if m is not HyperAdapt else m for m in methods]
    model = Toy(made, widths=(12, 6, 9))
    start, target = cost_model(model).total(sizes(model)), 12
    if unit == "parameters":
        target = cost_model(model).total(dict.fromkeys(sizes(model), 2)) + 3
    allocator = ALL[name](unit=unit)
    if name != "ElaLoRA":
        allocator.budget = 6 if unit == "ranks" else target
    fit(model, allocator)
    cost = cost_model(model)
    largest = max(cost.marginal(key, sizes(model)) for key in sizes(model))
    assert [event["step"] for event in allocator.events] == [10, 14, 18]
    for event in allocator.events:
        progress = (event["step"] - 6) / 12
        first, last = (12, 6) if unit == "ranks" else (start, target)
        if name == "ElaLoRA":
            last = first
        assert event["budget"] == math.floor(last + (first - last) * (1 - progress) ** 3 + 1e-9)
        if unit == "ranks":
            assert event["total"] == event["active"] == event["budget"]
        else:
            assert event["budget"] - largest < event["total"] <= event["budget"]
        soft = name == "AdaLoRA" and event["step"] < 18
        assert event["allocated"] == (12 if soft else event["active"])
    assert sum(sizes(model).values()) == allocator.events[-1]["active"]
    if unit == "parameters":
        assert cost.total(sizes(model)) == allocator.events[-1]["total"]
    assert not allocator.closed
    assert not allocator.engine.state


def test_closed_units_come_back_in_the_middle_and_are_gone_at_the_end():
    class Look(AdaLoRA):
        def finish_step(self, state, axes):
            for key, units in self.run.progress.closed.items():
                l = axes[key].closing()[0].tensor
                self.revived = getattr(self, "revived", False) or bool(l[list(units)].any())

    model = Toy()
    allocator = Look(budget=6, **PHASES)
    fit(model, allocator)
    assert allocator.revived, "gradients reach closed units between events"
    assert allocator.events[0]["closed"]
    assert "closed" not in allocator.events[-1] or not allocator.events[-1]["closed"]
    assert sum(sizes(model).values()) == 6


def test_fractions_of_the_steps_the_trainer_knows():
    model = Toy()
    allocator = AdaLoRA(budget=6, every=4, warmup=0.25, final=0.25)
    fit(model, allocator, steps=-1, max_epochs=2, limit_train_batches=24, accumulate_grad_batches=2)
    assert allocator.engine.run.phases.total == 24
    assert [event["step"] for event in allocator.events] == [10, 14, 18]


def test_nothing_that_runs_twice_differs():
    results = []
    for _ in range(2):
        model = Toy()
        allocator = ElaLoRA(**PHASES)
        fit(model, allocator)
        results.append((allocator.events, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_a_layer_without_events_is_trained_as_if_there_were_none():
    """Bit by bit: moves elsewhere do not touch a tensor's trajectory."""

    class FirstOnly(Chosen):
        def plan(self, scores, cost, budget, step):
            return {"maps.0:rank": Resize(tuple(range(len(scores["maps.0:rank"]) - 1)))}

        def budget_at(self, step):
            return 12 - self.phases.events().index(step) - 1

    plain, moved = Toy(partial(LoRA, rank=4)), Toy(partial(LoRA, rank=4))
    fit(plain)
    fit(moved, FirstOnly(budget=9, **PHASES))
    assert sizes(moved) == {"maps.0:rank": 1, "maps.1:rank": 4, "maps.2:rank": 4}
    for i in (1, 2):
        pairs = zip(plain.maps[i].parameters(), moved.maps[i].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_the_learning_rate_goes_on_falling_and_every_tensor_is_in_one_group():
    model, allocator = Toy(), ElaLoRA(**PHASES)
    trainer = fit(model, allocator)
    (optimizer,) = trainer.optimizers
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len(grouped) == len(set(grouped))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


# ---- resume


def everything(model, trainer):
    """All parameters, and all optimizer state."""
    tensors = dict(model.state_dict())
    for optimizer in trainer.optimizers:
        for i, state in optimizer.state_dict()["state"].items():
            tensors.update({f"{i}.{key}": value for key, value in state.items()})
    return tensors


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ALL)
def test_resume_is_exact_to_the_bit(name, accumulate, tmp_path):
    """Stopped in warm-up, between events, on an event, on the last one, and in the final phase."""
    make = partial(torch.optim.AdamW, amsgrad=True)
    # Two units for three layers: one layer loses all of its units at an event in the middle.
    few = {"AdaLoRA hard": lambda: AdaLoRA(budget=2, soft=False, **PHASES)}
    make_allocator = few.get(name, ALL[name])
    whole, allocator = Toy(make=make), make_allocator()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(whole, allocator, checkpoint, accumulate_grad_batches=accumulate)
    want = everything(whole, trainer)
    middle = [event["sizes"] for event in allocator.events[:2]]
    assert name not in few or any(0 in sizes.values() for sizes in middle)
    for step in (4, 12, 14, 18, 21):
        model, resumed = Toy(make=make), make_allocator()
        path = tmp_path / f"step={step}.ckpt"
        again = fit(model, resumed, ckpt_path=path, accumulate_grad_batches=accumulate)
        assert model.seen == whole.seen[step * accumulate :]
        have = everything(model, again)
        assert have.keys() == want.keys()
        different = [key for key in want if not torch.equal(have[key], want[key])]
        assert not different, f"cut at {step}: {different}"
        assert resumed.events == allocator.events
        assert (
            again.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]
        )


def test_a_run_with_other_steps_or_another_budget_is_no_resume(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=12, save_top_k=-1)
    fit(Toy(), ALL["AdaLoRA"](), checkpoint)
    path = tmp_path / "step=12.ckpt"
    with pytest.raises(
        ValueError, match=r"The checkpoint's AdaLoRA does not fit this run: it had Phases\(total=24"
    ):
        fit(Toy(), ALL["AdaLoRA"](), ckpt_path=path, steps=30)
    with pytest.raises(
        ValueError, match=r"its budget was \[6, 'ranks'\], this run's is \[7, 'ranks'\]"
    ):
        fit(Toy(), AdaLoRA(budget=7, **PHASES), ckpt_path=path)


def test_a_checkpoint_of_other_ranks_can_be_evaluated(tmp_path):
    class Tested(Toy):
        def test_dataloader(self):
            return torch.utils.data.DataLoader(range(3), batch_size=1)

        def test_step(self, batch, batch_idx):
            self.log("test", self.loss(batch_idx))

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=18, save_top_k=-1)
    fit(Toy(), ALL["AdaLoRA hard"](), checkpoint)
    model = Tested()
    trainer = lightning.Trainer(
        callbacks=[ALL["AdaLoRA hard"]()],
        logger=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer.test(model, ckpt_path=tmp_path / "step=18.ckpt", verbose=False, weights_only=True)
    assert sum(sizes(model).values()) == 6


def test_a_second_run_with_one_allocator_starts_anew():
    allocator = ALL["AdaLoRA hard"]()
    for _ in range(2):
        model = Toy()
        fit(model, allocator)
        assert len(allocator.events) == 3
        assert sum(sizes(model).values()) == 6


# ---- what is refused at the start


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: AdaLoRA(budget=6, warmup=12, final=12),
            "would never act: its warm-up of 12 and final 12 steps leave none of the 24",
        ),
        (
            lambda: ElaLoRA(every=50, warmup=6, final=6),
            "would never act: with an event every 50 steps between 6 and 18, none moves",
        ),
        (
            lambda: Chosen(**PHASES),
            "would never act: it prunes to a budget, and has none; set `budget` below the 12 ranks",
        ),
        (
            lambda: AdaLoRA(budget=2, floor=1, **PHASES),
            r"a budget of 2 ranks is below 3, the cost of 1 unit\(s\) on each of 3 axes",
        ),
        (lambda: AdaLoRA(budget=6, floor=3, **PHASES), "a budget of 6 ranks is below 9"),
        (
            lambda: AdaLoRA(budget=13, **PHASES),
            "a budget of 13 ranks is above the 12 the run starts with",
        ),
        (
            lambda: AdaLoRA(budget=50, unit="parameters", floor=1, **PHASES),
            "a budget of 50 parameters is below 87",
        ),
        (
            lambda: AdaLoRA(budget=12, **PHASES),
            "would never act: .* this one leaves all as it is; set `budget` below the 12 ranks",
        ),
        (lambda: DynamicRank(budget=12, **PHASES), "this one leaves all as it is"),
        (
            lambda: Chosen(budget=3, **PHASES),
            r"a budget of 3 ranks leaves the floor of 1 unit\(s\) to each of 3 axes, and nothing "
            "to decide; raise `budget` or lower `floor`",
        ),
        (
            lambda: AdaLoRA(budget=100, unit="parameters", floor=1, **PHASES),
            "a budget of 100 parameters leaves the floor of 1",
        ),
        (
            lambda: AdaLoRA(budget=28, unit="parameters", **PHASES),
            "a budget of 28 parameters leaves no layer a unit, and the cheapest layer needs 29",
        ),
    ],
)
def test_impossible_schedules_and_budgets(make, sentence):
    model = Toy()
    with pytest.raises(ValueError, match=sentence):
        fit(model, make())
    assert not model.seen


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"every": 0}, "the others are at least 1"),
        ({"floor": -1}, "floor is at least 0"),
        ({"cap": 1, "floor": 2}, "cap is not below floor"),
        ({"cap": 0, "floor": 0}, "the others are at least 1"),
        ({"budget": 0}, "the others are at least 1"),
        ({"unit": "rank"}, "a budget counts 'ranks' or 'parameters'"),
        ({"warmup": 1.5}, "a fraction from"),
        ({"final": -1}, "is no length of a phase"),
    ],
)
def test_arguments_out_of_range(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Chosen(**arguments)


def test_a_model_with_nothing_to_allocate():
    with pytest.raises(
        ValueError,
        match=r"HyperAdapt has no rank axis; use one of .*LoRA.*, or nest one: \[HyperAdapt, \w+\]",
    ):
        fit(Toy(HyperAdapt), ALL["AdaLoRA"]())
    bare = Toy()
    bare.maps = nn.ModuleList([nn.Linear(16, 12)])
    with pytest.raises(ValueError, match="nothing to allocate: the model has no adapter"):
        fit(bare, ALL["AdaLoRA"]())


def test_an_axis_that_cannot_do_what_is_required():
    class Needs(Chosen):
        requires = frozenset({"fly"})

    with pytest.raises(
        ValueError,
        match=r"Needs needs axes that can fly, and SVD at maps\.0:rank cannot; "
        r"no parameterization here can",
    ):
        fit(Toy(), Needs(budget=6, **PHASES))


def test_two_allocators():
    with pytest.raises(ValueError, match="AdaLoRA and ElaLoRA would both move the ranks"):
        fit(Toy(), ALL["AdaLoRA"](), ALL["ElaLoRA"]())


@pytest.mark.parametrize(
    "averaging",
    [
        lambda: EMAWeightAveraging(),
        lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
    ],
)
def test_averaged_weights_cannot_follow(averaging):
    with pytest.raises(
        ValueError, match="WeightAveraging keeps a copy of the weights that cannot follow a rank"
    ):
        fit(Toy(), ALL["AdaLoRA"](), averaging())


@pytest.mark.parametrize("make", [torch.optim.Rprop, torch.optim.ASGD])
def test_an_optimizer_that_cannot_follow(make):
    with pytest.raises(
        TypeError, match=rf"{make.__name__} keeps state that cannot follow a rank; use Adam,"
    ):
        fit(Toy(make=make), ALL["AdaLoRA"]())


def test_a_run_without_an_end():
    with pytest.raises(
        ValueError, match="needs to know where training ends; set max_steps or max_epochs"
    ):
        fit(Toy(), ALL["AdaLoRA"](), steps=-1, max_epochs=-1)


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (lambda s: {}, "planned 12 ranks, above the budget|the budget of"),
        (
            lambda s: {k: Resize((0,)) for k in s},
            "planned 3 ranks; the budget of .* is met exactly",
        ),
        (
            lambda s: {k: Close((0, 1, 2, 3)) for k in s},
            "planned 0 units for maps.0:rank, outside 1 to",
        ),
        (lambda s: {"9:rank": Resize((0,))}, "planned for '9:rank', which is no axis"),
    ],
)
def test_a_wrong_plan_is_caught_whoever_wrote_it(plan, sentence):
    class Wrong(Chosen):
        def plan(self, scores, cost, budget, step):
            return plan(scores)

    with pytest.raises(RuntimeError, match=sentence):
        fit(Toy(), Wrong(budget=6, **PHASES))


# ---- what is not a number


class Spiky(Toy):
    """Model with gradients that are not finite at some steps.

    The module drops them after the callbacks have seen them.
    """

    bad = range(0)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (
            float("inf") if self.global_step in self.bad else 1
        )

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            if p.grad is not None and not p.grad.isfinite().all():
                p.grad = None


def values_of(state):
    """Copies of all tensors that an allocator tracks, by axis and name."""
    return {(key, name): entry.tensor.detach().clone() for key, name, entry in state.items()}


@pytest.mark.parametrize("bad", [range(3, 7), range(2)])
def test_gradients_that_are_not_finite_are_not_scored(bad):
    changed = []

    class Watched(AdaLoRA):
        def on_before_optimizer_step(self, *args):
            before = values_of(self.engine.state)
            super().on_before_optimizer_step(*args)
            after = values_of(self.engine.state)
            if any(not torch.equal(after[key], before.get(key, 0 * after[key])) for key in after):
                changed.append(self.run.steps_done)

    model = Spiky()
    model.bad = bad
    allocator = Watched(budget=6, **PHASES)
    fit(model, allocator)
    assert changed == [step for step in range(18) if step not in bad]
    assert all(math.isfinite(event["scores"]["max"]) for event in allocator.events)


def test_too_many_steps_in_a_row_without_finite_gradients_stop_the_run():
    model = Spiky()
    model.bad = range(100)
    with pytest.raises(RuntimeError, match="not finite for 50 optimizer steps in a row"):
        fit(model, AdaLoRA(budget=6, every=20, warmup=60, final=6), steps=100)
    assert model.global_step == 49  # the fiftieth is not made


@pytest.mark.parametrize("start", [0, 1, 37])
def test_bad_steps_are_counted_to_the_last(start):
    """However they lie to the steps at which the device is read, and whatever came before."""
    steps = BadSteps(known=start)
    good, bad = torch.tensor(True), torch.tensor(False)
    for finite in [bad] * (49 - start) + [good] + [bad] * 20 + [None] + [good, bad] * 7:
        steps.note(finite)
    assert steps.read() == 1
    for count in range(2, 50):
        steps.note(bad)
        assert count % 7 or steps.read() == count
    with pytest.raises(RuntimeError, match="50 optimizer steps in a row"):
        steps.note(bad)


class Restless(Allocator):
    """Its state has other tensors after some steps, and a first value that is a gradient."""

    def observe(self, axes):
        axis = next(iter(axes.values()))
        gradient = axis.gate_grad()
        self.track(axis, "first", gradient)
        self.track(axis, "sum", torch.zeros_like(gradient)).add_(gradient)
        self.engine.state.pop(axis, "popped")
        if self.steps_done % 2:
            self.track(axis, "popped", gradient)

    def score(self, axis):
        return torch.ones(len(axis))


class Strict(Restless):
    """It refuses gradients that are not finite, after it has changed its state."""

    def observe(self, axes):
        super().observe(axes)
        if not next(iter(axes.values())).gate_grad().isfinite().all():
            raise ValueError("a gradient is not finite")


@pytest.mark.parametrize("rule", [Restless, Strict])
@pytest.mark.parametrize("bad", [(0, 1), (1, 2, 5), (3, 4)])
def test_a_bad_step_leaves_a_state_whose_tensors_come_and_go(bad, rule):
    """The state is what it is if the bad steps are not shown to the allocator at all."""

    def states(hidden):
        model, found = Toy(), []
        allocator = rule(budget=6, **PHASES)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
        allocator.start(model, optimizer, 20)
        for step in range(8):
            for axis in allocator.run.axes.values():
                for slot in axis.slots():
                    slot.tensor.data.fill_(0.5)
                    value = math.nan if step in bad else 1.0 + step
                    slot.tensor.grad = torch.full_like(slot.tensor, value)
            if step not in bad or not hidden:
                allocator.before_step()
            allocator.engine.step()
            found.append(values_of(allocator.engine.state))
        return found

    for have, want in zip(states(False), states(True), strict=True):
        assert have.keys() == want.keys()
        assert all(torch.equal(have[key], want[key]) for key in want)


def test_an_error_at_a_step_with_finite_gradients_is_passed_on():
    class Broken(Restless):
        def observe(self, axes):
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fit(Toy(), Broken(budget=6, **PHASES))


def test_a_score_that_is_no_number_defers_the_event():
    class Doubtful(Chosen):
        def score(self, axis):
            return super().score(axis) * (float("nan") if self.steps_done == 10 else 1)

    model, allocator = Toy(), Doubtful(budget=6, **PHASES)
    fit(model, allocator)
    first, second, _ = allocator.events
    assert first["skipped"] == "a score is not a number"
    assert first["total"] == 12
    assert second["total"] == second["budget"] < 12  # the debt is paid at the next event
    assert sum(sizes(model).values()) == 6


def test_a_last_event_that_was_put_off_is_made_up_for_in_the_final_phase():
    class Late(Chosen):
        def score(self, axis):
            return super().score(axis) * (float("nan") if self.steps_done in (18, 19) else 1)

    model, allocator = Toy(), Late(budget=6, **PHASES)
    fit(model, allocator)
    end = allocator.engine.run.phases.end
    assert end == 18
    assert [(e["step"], "skipped" in e) for e in allocator.events][-3:] == [
        (18, True),
        (19, True),
        (20, False),
    ]
    assert sum(sizes(model).values()) == 6


def test_what_adalora_closed_is_removed_by_a_last_event_that_was_put_off():
    class LateAda(AdaLoRA):
        def score_units(self, state, axes):
            factor = float("nan") if self.run.steps_done == 18 else 1
            scores = super().score_units(state, axes)
            return {key: values * factor for key, values in scores.items()}

    model, allocator = Toy(), LateAda(budget=6, **PHASES)
    fit(model, allocator)
    assert allocator.events[-1]["allocated"] == allocator.events[-1]["active"] == 6
    assert sum(sizes(model).values()) == 6


def test_elalora_at_its_floor_is_refused():
    model = Toy()
    for axis in rank_axes(model).values():
        axis.resize([0])
    with pytest.raises(ValueError, match="would never act: every axis starts at its floor of 1"):
        fit(model, ElaLoRA(every=2, warmup=2, final=2))


# ---- regularizers


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [AdapterGradients()],
        lambda: [AdapterGradients(), ALL["AdaLoRA"](), AdapterGradients()],
    ],
)
def test_a_penalty_is_added_once_a_step_and_logged(callbacks):
    grads = []

    class Watch(Toy):
        def on_before_optimizer_step(
            self, optimizer
        ):  # Lightning calls the module after the callbacks
            if not grads:
                grads.append([layer.P.grad.clone() for layer in self.maps])

    model, twin = Watch(), Toy()
    trainer = fit(model, *callbacks(), accumulate_grad_batches=2)
    total = (
        sum(twin.loss(i) / 2 for i in range(2))
        + torch.stack([layer.penalty() for layer in twin.maps]).mean()
    )
    total.backward()
    for have, layer in zip(grads[0], twin.maps, strict=True):
        torch.testing.assert_close(have, layer.P.grad, rtol=1e-5, atol=1e-7)
    assert math.isfinite(trainer.callback_metrics["penalty"])


def test_a_penalty_is_added_in_a_second_run_as_well():
    model = Toy()
    for _ in range(2):
        trainer = fit(model, AdapterGradients(), steps=1)
        assert "penalty" in trainer.callback_metrics


# ---- what a rank frees


def test_bytes_fall_with_the_rank():
    """From rank 64 to 8: parameters, gradients and optimizer state take an eighth."""

    def held(model, optimizer):
        own = [p for layer in model.maps for p in trainable(layer).values()]
        grads = [p.grad for p in own if p.grad is not None]
        moments = [t for p in own for t in optimizer.state[p].values() if t.dim()]
        return {
            name: sum(t.untyped_storage().nbytes() for t in tensors)
            for name, tensors in (("parameters", own), ("gradients", grads), ("optimizer", moments))
        }

    class Watch(Toy):
        before = None

        def on_before_zero_grad(self, optimizer):
            if self.before is None and optimizer.state:
                self.before = held(self, optimizer)

    model = Watch(partial(LoRA, rank=64), widths=(256, 256))
    trainer = fit(model, AdaLoRA(budget=16, soft=False, **PHASES))
    model.loss(0).backward()
    after = held(model, trainer.optimizers[0])
    assert sum(sizes(model).values()) == 16
    one = 2 * 64 * (256 + 16) * 4
    assert model.before == {"parameters": one, "gradients": one, "optimizer": 2 * one}
    assert after == {name: size // 8 for name, size in model.before.items()}
