"""SoRA: gates, their optimizer, the proximal step, and what is left."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from test_allocators import PHASES, TOTAL, Toy, everything, fit, sizes
from test_planted_ranks import RANKS, Planted
from torch import nn

from adaptrank.allocation import AdaLoRA, SoRA
from adaptrank.allocation.gates import adam, soft_threshold, threshold_for
from adaptrank.allocation.plans import Resize
from adaptrank.allocation.trained_gates import TrainedGates
from adaptrank.axes import CostModel, rank_axes
from adaptrank.parameterizations import (
    NOLA,
    SVD,
    HyperAdapt,
    Kronecker,
    LoRA,
    MELoRA,
    MiSS,
    PiCa,
    TensorTrain,
)

LORA4 = partial(LoRA, rank=4)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.7)])
def test_the_gates_adam_is_torchs(betas):
    torch.manual_seed(0)
    want = [nn.Parameter(torch.randn(n).double()) for n in (3, 5)]
    have, first, second = ([p.detach().clone() * k for p in want] for k in (1, 0, 0))
    optimizer = torch.optim.AdamW(want, lr=0.03, betas=betas, weight_decay=0.0)
    for step in range(1, 30):
        grads = [torch.randn_like(p) for p in want]
        for p, grad in zip(want, grads, strict=True):
            p.grad = grad
        optimizer.step()
        adam(have, grads, first, second, step, [0.03, 0.03], betas)
        for a, b in zip(have, want, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-14)


def test_the_proximal_operator_on_a_grid():
    xi = 0.1
    v = torch.tensor(
        [-0.3, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.12, 0.19, 0.3], dtype=torch.float64
    )
    want = torch.tensor([-0.2, -0.1, 0.0, 0.0, 0.0, 0.0, 0.0, 0.02, 0.09, 0.2], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(v, xi), want, rtol=0, atol=1e-15)
    released = soft_threshold(v, xi, reference=True)
    assert released[7] == released[8] == 0  # .12 and .19: the dead zone is twice as wide
    torch.testing.assert_close(released[9], want[9])


@given(
    st.lists(st.lists(st.integers(0, 6), max_size=6), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=4, max_size=4),
    st.integers(0, 60),
    st.integers(0, 2),
)
def test_the_least_threshold_that_the_budget_pays_for(values, prices, budget, floor):
    """The result equals that of trying every threshold, with ties, zeros and unequal costs."""
    sizes = {
        f"layers.{i}.q:rank": torch.tensor(v, dtype=torch.float64) / 4 for i, v in enumerate(values)
    }
    cost = CostModel(0, tuple((price, (axis,)) for axis, price in zip(sizes, prices, strict=False)))

    def left(xi):
        gates = {axis: soft_threshold(v, xi) for axis, v in sizes.items()}
        return cost.total(
            {axis: max(int((g != 0).sum()), min(floor, len(g))) for axis, g in gates.items()}
        )

    every = [k / 4 for k in range(7)]
    largest = max([0.0, *torch.cat(list(sizes.values())).tolist()])
    xi = threshold_for(sizes, cost, budget, floor)
    assert xi == next((one for one in every if left(one) <= budget), largest)


def test_what_is_left_of_a_budget_buys_no_unit_whose_gate_is_zero():
    scores = {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([1.0, 0.0, 0.0])}
    allocator = SoRA(**PHASES)
    allocator.engine.check_steps(TOTAL)
    plan = allocator.plan(
        scores, CostModel(0, ((5, ("a",)), (1, ("b",)))), 9, TOTAL
    )  # a second of "a" is 11
    assert plan == {"a": Resize((0,)), "b": Resize((0,))}


def test_lasso_recovery():
    """Orthonormal design: proximal gradient steps settle at the soft-thresholded truth."""
    torch.manual_seed(0)
    design = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64)).Q
    truth = torch.tensor([2.0, -1.0, 0.5, 0.05, -0.02, 0.0], dtype=torch.float64)
    target, xi, lr = design @ truth, 0.1, 0.3
    g = torch.randn(6, dtype=torch.float64)
    for _ in range(200):
        g = soft_threshold(g - lr * design.T @ (design @ g - target), lr * xi)
    torch.testing.assert_close(g, soft_threshold(truth, xi), rtol=0, atol=1e-12)
    assert int((g == 0).sum()) == 3


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
        MiSS,
    ],
    ids=["LoRA", "SVD", "hybrid", "NOLA", "TT", "Kronecker", "MELoRA", "PiCa", "MiSS"],
)
def test_a_run_ends_in_the_plain_method_and_folding_changes_nothing(method):
    class Look(SoRA):
        def carry_out(self, state, plan, step, apply):
            layers = self.run.model.maps if self.acts_at(step) else []
            before = [layer(x) for layer in layers]
            done = super().carry_out(state, plan, step, apply)
            for layer, want in zip(layers, before, strict=True):
                torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-6)
            return done

    x = torch.randn(5, 16)
    model, allocator = Toy(method), Look(xi=4.0, **PHASES)
    start = sum(sizes(model).values())
    fit(model, allocator)
    assert all(axis.gate is None for axis in rank_axes(model).values())
    assert not allocator.engine.state
    assert (
        allocator.events[-1]["allocated"]
        == allocator.events[-1]["active"]
        == sum(sizes(model).values())
        <= start
    )
    assert "every gate is zero" not in allocator.events[-1]["reason"]
    assert sum(sizes(model).values()) >= 1


def test_the_proximal_step_finds_units_to_drop():
    model, allocator = Toy(LORA4), SoRA(xi=8.0, **PHASES)
    fit(model, allocator)
    assert 1 <= sum(sizes(model).values()) < 12
    assert allocator.events[0]["budget"] is None


@pytest.mark.tables
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_finds_the_planted_ranks_by_its_default_xi_alone(seed):
    """Without a budget, and with the decay of the release, the planted ranks are found."""

    class Decays(Planted):
        def configure_optimizers(self):
            return torch.optim.AdamW(
                [p for p in self.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
            )

    model = Decays("SVD", seed, 8)
    fit(model, SoRA(every=50, warmup=200, final=300), steps=1500)
    assert (
        sum(abs(have - want) for have, want in zip(sizes(model.maps).values(), RANKS, strict=True))
        <= 2
    )


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_a_budget_is_never_exceeded_at_the_end(unit):
    model = Toy(LORA4, widths=(12, 6, 9))
    budget = 6 if unit == "ranks" else 150
    allocator = SoRA(budget, xi=0.0, unit=unit, **PHASES)
    fit(model, allocator)
    assert allocator.events[-1]["total"] <= budget
    assert allocator.events[-1]["total"] >= budget - 60
    # Between the events the open units are within the curve as well.
    assert [event["active"] for event in allocator.events] == sorted(
        (e["active"] for e in allocator.events), reverse=True
    )


def test_a_gate_of_zero_has_a_gradient_and_may_come_back():
    revived = []

    class Look(SoRA):
        def update(self, state, axes):
            zero = {key: (state.values(axis) == 0) for key, axis in axes.items()}
            super().update(state, axes)
            for key, was in zero.items():
                revived.append(int((state.values(axes[key])[was] != 0).sum()))

        def finish_step(self, state, axes):
            super().finish_step(state, axes)
            if self.run.steps_done == 3:
                for axis in axes.values():
                    state.values(axis)[0] = 0

    fit(Toy(LORA4), Look(xi=0.1, **PHASES))
    assert sum(revived) > 0


def test_a_trained_adapter_starts_with_open_gates():
    model = Toy(LORA4)
    fit(model, steps=3)
    x, want = torch.randn(4, 16), None
    want = [layer(x) for layer in model.maps]

    class Look(SoRA):
        def install(self, state, axes):
            super().install(state, axes)
            for layer, y in zip(self.run.model.maps, want, strict=True):
                assert torch.equal(layer(x), y)

    fit(model, Look(**PHASES))


def test_steps_that_are_not_finite_move_no_gate():
    class Spiky(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * (
                float("inf") if self.global_step == 3 else 1
            )

        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                if p.grad is not None and not p.grad.isfinite().all():
                    p.grad = None

    gates = []

    class Look(SoRA):
        def finish_step(self, state, axes):
            super().finish_step(state, axes)
            tracked = axes.values() if state else ()
            gates.append([state.values(axis).detach().clone() for axis in tracked])

    fit(Spiky(LORA4), Look(**PHASES))
    assert all(torch.equal(a, b) for a, b in zip(gates[2], gates[3], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(gates[3], gates[4], strict=True))


def test_a_gradient_scaler_leaves_no_trace():
    """A gate is in no optimizer, so the allocator has to divide its gradient by the loss scale."""

    def gradients(scale):
        seen, final = [], []

        class Look(SoRA):
            def update(self, state, axes):
                seen.append(torch.cat([state.values(axis).grad for axis in axes.values()]))
                super().update(state, axes)

            def carry_out(self, state, plan, step, apply):
                gates = [state.values(axis).detach() for axis in self.run.axes.values()]
                final.append(torch.cat(gates))
                return super().carry_out(state, plan, step, apply)

        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        plugins = MixedPrecision("16-mixed", "cpu", scaler)
        fit(Toy(LORA4), Look(l1=1.0, **PHASES), plugins=plugins)
        assert len(seen) == 18
        return torch.stack(seen), final[0]

    (few, gates), (many, others) = gradients(2.0**4), gradients(2.0**8)
    torch.testing.assert_close(few, many, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(gates, others, rtol=2e-2, atol=2e-3)


def test_gates_whose_gradient_alone_is_not_finite_do_not_move():
    before, after = [], []

    class Look(SoRA):
        def before_pass(self, state, axes):
            if self.run.steps_done == 3:
                before.extend(state.values(axis).detach().clone() for axis in axes.values())

        def on_before_optimizer_step(self, *args):
            if self.run.steps_done == 3:
                self.gate_parameters()[0].grad.fill_(float("inf"))
            super().on_before_optimizer_step(*args)

        def finish_step(self, state, axes):
            super().finish_step(state, axes)
            if self.run.steps_done == 4:
                after.extend(state.values(axis).detach().clone() for axis in axes.values())
                assert all(state.values(axis).grad is None for axis in axes.values())

    fit(Toy(LORA4), Look(**PHASES))
    assert len(before) == 3
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_skipped_step_does_not_count_in_the_gates_adam():
    """As torch's own does not: its bias correction goes by the steps that were made."""
    counted = {}

    class Look(SoRA):
        def on_before_optimizer_step(self, *args):
            if self.run.steps_done in (0, 1, 5):
                self.gate_parameters()[0].grad.fill_(float("nan"))
            super().on_before_optimizer_step(*args)
            for _, name, tracked in self.engine.state.items():
                if name == "steps":
                    counted[self.run.steps_done + 1] = int(tracked.tensor)

    fit(Toy(LORA4), Look(**PHASES))
    made = [step for step in range(1, 19) if step not in (1, 2, 6)]
    assert counted == {step: sum(other <= step for other in made) for step in range(1, 19)}


def test_gates_are_float32_over_a_half_precision_adapter():
    model, allocator = Toy(LORA4), SoRA(**PHASES)
    model.to(torch.bfloat16)
    allocator.start(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), TOTAL
    )
    axis = next(iter(allocator.run.axes.values()))
    assert allocator.engine.state.values(axis).dtype == torch.float32
    assert model.maps[0](torch.randn(2, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact_to_the_bit(accumulate, tmp_path):
    def make():
        return SoRA(2, xi=1.0, **PHASES)

    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    whole, allocator = Toy(LORA4), make()
    trainer = fit(whole, allocator, checkpoint, accumulate_grad_batches=accumulate)
    want = everything(whole, trainer)
    for step in (4, 12, 14, 17, 18, 21):
        model, resumed = Toy(LORA4), make()
        again = fit(
            model,
            resumed,
            ckpt_path=tmp_path / f"step={step}.ckpt",
            accumulate_grad_batches=accumulate,
        )
        have = everything(model, again)
        assert have.keys() == want.keys()
        assert not [key for key in want if not torch.equal(have[key], want[key])], step
        assert 0 in sizes(model).values()
        assert resumed.events == allocator.events


def test_the_learning_rate_is_that_of_the_run():
    rates = []

    class Gates(TrainedGates):
        def adam_step(self, axes, gradients, learning_rates):
            super().adam_step(axes, gradients, learning_rates)
            rates.append(next(iter(learning_rates.values())))
            assert set(learning_rates.values()) == {rates[-1]}

    class Look(SoRA):
        def init_state(self, axes):
            return Gates("g")

    fit(Toy(LORA4), Look(gate_lr_ratio=2.0, **PHASES))
    assert rates[0] == pytest.approx(2 * 1e-2 / 3)  # LinearLR starts at a third
    assert rates == sorted(rates)
    assert len(rates) == 18 < TOTAL


@pytest.mark.parametrize(
    "arguments",
    [{"xi": -1.0}, {"l1": -1.0}, {"gate_lr_ratio": 0.0}, {"prox": "soft"}, {"prox_scale": "x"}],
)
def test_arguments_out_of_range(arguments):
    with pytest.raises(ValueError, match=r"strengths are|use 'exact'"):
        SoRA(**arguments)


def test_it_does_not_stand_beside_another_that_moves():
    with pytest.raises(ValueError, match="would both move the ranks"):
        fit(Toy(LORA4), SoRA(**PHASES), AdaLoRA(6, **PHASES))
