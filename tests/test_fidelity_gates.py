"""SoRA, BeamLoRA, LoRAPrune and DyLoRA against references written from the released rules."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adaptrank.allocation import BeamLoRA, DyLoRA, LoRAPrune, SoRA
from adaptrank.allocation.plans import Resize
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA

STEPS = 1000
PHASES = {"every": 50, "warmup": 0, "final": 0}


class Layers(nn.Module):
    """Some adapted layers of different ranks, and a head that trains whole."""

    def __init__(self, ranks):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 5).double() for _ in ranks)
        patterns = {f"{i}": rank for i, rank in enumerate(ranks)}
        adapt(self.layers, "all-linear", partial(LoRA, rank=1), rank_pattern=patterns)
        self.head = nn.Linear(5, 2).double()


def head_first(model, **options):
    """One group for the head, then one for each layer, then LoRA+: A and B of the last apart."""
    *layers, last = model.layers
    groups = [{"params": list(model.head.parameters()), "lr": 7.0}]
    groups += [
        {"params": [layer.A, layer.B], "lr": 0.01 * (i + 1)} for i, layer in enumerate(layers)
    ]
    groups += [{"params": [last.A], "lr": 5.0}, {"params": [last.B], "lr": 0.09}]
    return torch.optim.AdamW(groups, lr=3.0, **options)


def gates_of(allocator):
    return {key: allocator.engine.state.values(a) for key, a in allocator.run.axes.items()}


# ---- learning rates


def test_each_axis_follows_the_group_of_its_closing_factor():
    model, allocator = Layers((3, 2, 4)), SoRA(**PHASES)
    optimizer = head_first(model)
    factors = [lambda step: 0.5**step, lambda step: 1.0, lambda step: 0.9**step]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [factors[i % 3] for i in range(len(optimizer.param_groups))]
    )
    allocator.start(model, optimizer, STEPS)
    keys = ["layers.0:rank", "layers.1:rank", "layers.2:rank"]
    for step in range(4):
        want = [0.01, 0.02 * 0.9**step, 0.09 * 1.0]
        have = allocator.run.learning_rates(allocator.run.axes)
        assert have == pytest.approx(dict(zip(keys, want, strict=True)))
        optimizer.step()
        schedule.step()


def test_the_rates_come_from_several_optimizers_and_without_one_they_are_zero():
    model, allocator = Layers((3, 2, 4)), SoRA(**PHASES)
    first, second, _ = model.layers
    second.B.requires_grad_(False)
    optimizers = [
        torch.optim.SGD(model.head.parameters(), lr=7.0),
        torch.optim.AdamW([first.A, first.B], lr=0.1),
        torch.optim.SGD([second.A], lr=torch.tensor(0.25)),
    ]
    allocator.start(model, optimizers, STEPS)
    assert list(allocator.run.learning_rates(allocator.run.axes).values()) == [0.1, 0.25]
    assert list(allocator.run.learning_rates(allocator.run.left_out).values()) == [0.0]


@pytest.mark.parametrize("policy", [SoRA, BeamLoRA])
def test_a_head_listed_first_does_not_drive_the_gates(policy):
    """The first step of Adam is the learning rate, whatever the gradient."""
    model = Layers((3, 2, 4))
    arguments = {"xi": 0.0} if policy is SoRA else {}
    allocator = policy(**arguments, gate_lr_ratio=2.0, **PHASES)
    allocator.start(model, head_first(model), STEPS)
    before = {key: gate.detach().clone() for key, gate in gates_of(allocator).items()}
    for gate in gates_of(allocator).values():
        gate.grad = torch.full_like(gate, 100.0)
    allocator.before_step()
    for (key, gate), rate in zip(gates_of(allocator).items(), (0.01, 0.02, 0.09), strict=True):
        moved = before[key] - gate.detach()
        torch.testing.assert_close(moved, torch.full_like(moved, 2 * rate), rtol=1e-5, atol=0)


# ---- SoRA


def released_gate_step(gate, grad, moments, step, rate, xi):
    """AdamW of transformers without decay, then the released shrinkage, number by number."""
    values, firsts, seconds = [], [], []
    for g, d, m, v in zip(*(x.tolist() for x in (gate, grad, *moments)), strict=True):
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
        size = rate * math.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        g -= size * m / (math.sqrt(v) + 1e-6)
        if abs(g) > xi:
            g -= math.copysign(xi, g)
        values.append(0.0 if abs(g) < xi else g)
        firsts.append(m)
        seconds.append(v)
    return [torch.tensor(x, dtype=torch.float64) for x in (values, firsts, seconds)]


@pytest.mark.parametrize("prox_scale", ["none", "lr"])
def test_soras_gates_step_as_released(prox_scale):
    """Random gates, moments and gradients of all sizes, each axis at a rate of its own."""
    model, l1 = Layers((3, 1, 6)), 0.7
    allocator = SoRA(xi=0.3, prox="reference", prox_scale=prox_scale, l1=l1, **PHASES)
    optimizer = head_first(model)
    allocator.start(model, optimizer, STEPS)
    state, axes = allocator.engine.state, allocator.run.axes
    count, zeros, kept = sum(map(len, axes.values())), 0, 0
    state.adam_step(
        axes,
        {key: torch.zeros_like(g) for key, g in gates_of(allocator).items()},
        dict.fromkeys(axes, 0.0),
    )
    for trial in range(100):
        step = int(torch.randint(1, 400, ()))
        steps = next(t.tensor for _, name, t in state.items() if name == "steps")
        steps.fill_(step - 1)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.05 * (1 + (trial * (number + 1)) % 7)
        rates = [optimizer.param_groups[i]["lr"] for i in (1, 2, 4)]
        want = {}
        for (key, axis), rate in zip(axes.items(), rates, strict=True):
            gate = state.values(axis)
            scale = 10 ** float(torch.empty(()).uniform_(-7, 1))
            gate.data.copy_(torch.randn(len(axis)) * (torch.rand(len(axis)) > 0.2))
            gate.grad = scale * torch.randn(len(axis), dtype=torch.float64)
            moments = [state.track(axis, name, None) for name in "mv"]
            moments[0].copy_(scale * torch.randn(len(axis)))
            moments[1].copy_(scale**2 * torch.rand(len(axis)))
            loss_grad = gate.grad + l1 / count * gate.detach().sign()
            xi = 0.3 * rate if prox_scale == "lr" else 0.3
            want[key] = released_gate_step(gate.detach(), loss_grad, moments, step, rate, xi)
        with torch.no_grad():
            allocator.update(state, axes)
        for key, axis in axes.items():
            have = [state.values(axis), *(state.track(axis, name, None) for name in "mv")]
            for a, b in zip(have, want[key], strict=True):
                torch.testing.assert_close(a.detach(), b, rtol=1e-11, atol=1e-13)
            zeros += int((have[0] == 0).sum())
            kept += int((have[0] != 0).sum())
    assert min(zeros, kept) > 100


def test_gates_without_a_gradient_are_not_shrunk():
    """As in the release, whose optimizer skips them."""
    model, allocator = Layers((3, 2, 4)), SoRA(xi=0.01, prox_scale="none", **PHASES)
    allocator.start(model, head_first(model), STEPS)
    gates = gates_of(allocator)
    before = {key: gate.detach().clone() for key, gate in gates.items()}
    gates["layers.1:rank"].grad = torch.zeros(2).double()
    allocator.before_step()
    still = {key: torch.equal(gate.detach(), before[key]) for key, gate in gates.items()}
    assert list(still.values()) == [True, False, True]


def test_a_budget_raises_the_threshold_no_further_than_it_must():
    """An axis at a higher rate closes units by itself, and the others keep theirs."""
    model, allocator = Layers((3, 2, 4)), SoRA(5, xi=10.0, every=50, warmup=0, final=0.5)
    allocator.start(model, head_first(model), STEPS)
    allocator.engine.progress.steps_done = 499
    gates = gates_of(allocator)
    for gate in gates.values():
        gate.data.copy_(torch.linspace(0.15, 0.8, len(gate)))
        gate.grad = torch.zeros_like(gate)
    allocator.before_step()
    # Each xi is 0.1, 0.2 and 0.9. These alone leave what the budget pays for.
    open_units = [int((gate != 0).sum()) for gate in gates.values()]
    assert open_units == [3, 1, 0]


# ---- BeamLoRA


def test_beamloras_logits_train_as_with_pytorchs_adam():
    """The release has them in the optimizer of the factors, each with its schedule."""
    model, allocator = Layers((3, 2, 5)), BeamLoRA(**PHASES)
    optimizer = head_first(model)
    allocator.start(model, optimizer, STEPS)
    copies = [nn.Parameter(gate.detach().clone()) for gate in gates_of(allocator).values()]
    groups = [{"params": [p]} for p in copies]
    twin = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)
    for step in range(40):
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * (1 + (step * (number + 1)) % 5)
        for group, number in zip(twin.param_groups, (1, 2, 4), strict=True):
            group["lr"] = optimizer.param_groups[number]["lr"]
        for gate, p in zip(gates_of(allocator).values(), copies, strict=True):
            p.grad = torch.randn_like(p)
            gate.grad = p.grad.clone()
        allocator.before_step()
        twin.step()
        for gate, p in zip(gates_of(allocator).values(), copies, strict=True):
            torch.testing.assert_close(gate.detach(), p.detach(), rtol=1e-12, atol=1e-14)
            gate.grad = None


def released_masks(logits, tau, kept):
    """Units after the point where the sorted weights of all layers pass their share."""
    weights = [torch.softmax(s / tau, -1) * len(s) for s in logits]
    entries = [(float(w), i, unit) for i, row in enumerate(weights) for unit, w in enumerate(row)]
    entries.sort(reverse=True)
    total, masks = 0.0, [set() for _ in logits]
    for weight, i, unit in entries:
        total += weight
        if total > kept * sum(map(len, logits)) + 1e-9:
            masks[i].add(unit)
    return masks


def test_beamlora_prunes_and_copies_what_the_release_does():
    """Random logits at all steps. A layer that loses more than half is capped, as documented."""
    model, allocator = Layers((6, 6, 6, 6)), BeamLoRA(p0=0.7, until=0.67, every=10, final=10)
    allocator.start(model, head_first(model), STEPS)
    state, axes = allocator.engine.state, allocator.run.axes
    exact = capped = 0
    for trial in range(200):
        step = 1 + trial * 4
        for axis in axes.values():
            state.values(axis).data.copy_(0.02 * torch.randn(6) * (1 + trial % 3))
        scores = {key: s.detach() for key, s in allocator.score_units(state, axes).items()}
        plan = allocator.plan(scores, allocator.run.cost(), 24, step)
        cut = 0.3 * (1 + math.cos(math.pi * min(1.0, step / 670))) / 2
        logits = [state.values(axis).detach() for axis in axes.values()]
        for key, mask in zip(axes, released_masks(logits, 0.05, 1 - cut), strict=True):
            keep = plan.get(key, Resize(tuple(range(6)))).keep
            targets = {unit for unit in range(6) if keep[unit] != unit}
            order = sorted(range(6), key=lambda unit: float(scores[key][unit]))
            count = min(len(mask), 3)
            assert targets == set(order[:count])
            assert {keep[unit] for unit in targets} == set(order[6 - count :])
            assert targets == mask or len(mask) > 3
            exact, capped = exact + (0 < len(mask) <= 3), capped + (len(mask) > 3)
    assert exact > 200
    assert capped > 20


def test_an_event_of_beamlora_starts_the_logits_without_moments():
    model, allocator = Layers((4, 4)), BeamLoRA(p0=0.5, until=1.0, every=2, final=2)
    optimizer = head_first(model)
    allocator.start(model, optimizer, 20)
    state, axes = allocator.engine.state, allocator.run.axes
    for _ in range(2):
        for layer in model.layers:
            layer.A.grad, layer.B.grad = torch.randn_like(layer.A), torch.randn_like(layer.B)
        for gate in gates_of(allocator).values():
            gate.grad = torch.randn_like(gate)
        assert all(state.track(axis, "m", state.values(axis)).numel() for axis in axes.values())
        allocator.before_step()
        optimizer.step()
        allocator.step()
    assert allocator.events
    assert not any(state.track(axis, name, None).any() for axis in axes.values() for name in "mv")


# ---- LoRAPrune


class Block(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(2, channels), nn.Linear(channels, 2)


@pytest.mark.parametrize("count", [4, 9, 10, 12, 19, 20, 32])
@pytest.mark.parametrize("wrapped_from", [0, 2])
def test_loraprune_leaves_the_released_layers_whole(count, wrapped_from):
    model = nn.Sequential(*(Block() for _ in range(count)))
    targets = [f"{i}.up_proj" for i in range(wrapped_from, count)]
    adapt(model, targets, partial(LoRA, rank=1))
    layers = [int(key.split(".")[0].partition(":")[0]) for key in LoRAPrune().find_axes(model)]
    first = int(0.1 * count)
    assert layers == [i for i in range(count) if first <= i < count - 1 and i >= wrapped_from]


def test_loraprune_refuses_a_model_without_a_layer_between():
    model = nn.Sequential(Block(), Block())
    adapt(model, ["1.up_proj"], partial(LoRA, rank=1))
    with pytest.raises(ValueError, match="no other layer has an adapter; adapt the layers between"):
        LoRAPrune().find_axes(model)


def released_local_prune(importance, mask, ratio, target):
    """The lowest int(n ratio) of importance times mask, unless the target is reached."""
    closed = mask.count(0)
    if closed / len(mask) >= target:
        return mask
    values = [value * open_ for value, open_ in zip(importance, mask, strict=True)]
    lowest = sorted(range(len(mask)), key=lambda group: values[group])[: int(len(mask) * ratio)]
    return [0 if group in lowest else 1 for group in range(len(mask))]


@pytest.mark.parametrize("ties", [False, True])
def test_masks_of_loraprune_are_the_released_ones_over_a_schedule(ties):
    """Averages are drawn anew at each event, so that without masks groups would come back.

    Where open groups have an average of 0 the release may open a masked one. Here none comes back.
    """
    torch.manual_seed(0)
    model = nn.Sequential(Block(7), Block(20), Block(33), Block(5))
    adapt(model, [f"{i}.up_proj" for i in range(4)], partial(LoRA, rank=1))
    allocator, target = LoRAPrune(0.6, every=2, warmup=4, final=4), 0.6
    parameters = [p for p in model.parameters() if p.requires_grad]
    allocator.start(model, torch.optim.SGD(parameters), 64)
    state, axes = allocator.engine.state, allocator.run.axes
    masks, returns = {key: [1] * len(axis) for key, axis in axes.items()}, 0
    for step in range(1, 65):
        averages = {}
        for key, axis in axes.items():
            values = torch.rand(len(axis)).double() + 0.01
            if ties:
                values *= torch.rand(len(axis)) > 0.9
            state.importance(axis, torch.zeros_like(values)).copy_(values)
            averages[key] = values.tolist()
        event = allocator.step()
        if event is None:
            continue
        ratio = target * (1 - (1 - (step - 4) / 56) ** 3)
        for key, mask in masks.items():
            masks[key] = released_local_prune(averages[key], mask, ratio, target)
            closed = {group for group, is_open in enumerate(masks[key]) if not is_open}
            now = set(event["closed"].get(key, ()))
            assert len(now) == len(closed)
            if ties:
                masks[key] = [0 if group in now else 1 for group in range(len(mask))]
                assert all(masks[key][group] <= mask[group] for group in range(len(mask)))
            else:
                assert now == closed
            order = sorted(range(len(mask)), key=lambda group: averages[key][group])
            returns += now != set(order[: len(now)])
    assert len(allocator.events) == 28
    assert returns > 20


def test_a_run_of_loraprune_masks_what_the_release_would():
    """Importance, averages and masks of every step, from the same gradients."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=3,
        num_attention_heads=4,
        use_cache=False,
    )
    model = adapt(LlamaForCausalLM(config).double(), "all-linear", partial(LoRA, rank=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    total, target = 16, 0.6
    allocator = LoRAPrune(target, beta=0.9, every=2, warmup=0, final=0)
    allocator.start(model, optimizer, total)
    parts = {
        "mlp:channels": [("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)],
        "self_attn:heads": [("q_proj", 0), ("k_proj", 0), ("v_proj", 0), ("o_proj", 1)],
    }
    averages, masks = {}, {}
    for step in range(1, total + 1):
        ids = torch.randint(16, (4, 6), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        for index in (0, 1):
            for group, layers in parts.items():
                block = getattr(model.model.layers[index], group.partition(":")[0])
                count = 12 if group == "mlp:channels" else 4
                new = torch.zeros(count).double()
                for name, dim in layers:
                    layer = getattr(block, name)
                    a, b, da, db = layer.A, layer.B, layer.A.grad, layer.B.grad
                    estimate = db @ a + b @ da - db @ da
                    weight = layer.base.weight + layer.scale * b @ a
                    values = (estimate * weight).abs().detach().sum(1 - dim)
                    values = values.view(count, -1).sum(1)
                    new += values / values.norm()
                key = f"model.layers.{index}.{group}"
                averages[key] = 0.9 * averages.get(key, 0 * new) + 0.1 * new
                mask = masks.setdefault(key, [1] * count)
                if step % 2 == 0:
                    ratio = target * (1 - (1 - step / total) ** 3)
                    masks[key] = released_local_prune(averages[key].tolist(), mask, ratio, target)
        allocator.before_step()
        optimizer.step()
        event = allocator.step()
        optimizer.zero_grad()
        if event is not None:
            want = {k: [g for g, o in enumerate(m) if not o] for k, m in masks.items()}
            have = {key: list(units) for key, units in event["closed"].items()}
            assert have == {key: units for key, units in want.items() if units}, step
    assert sum(len(units) for units in have.values()) == 2 * (7 + 2)


# ---- DyLoRA


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rule", ["published", "drawn"])
def test_dylora_steps_as_released(frozen, rule):
    """Gradients by hand for the drawn units, then AdamW by hand for every entry.

    The control is the other rule, which differs from the third step on.
    """
    model, rank, rate, decay = Layers((4, 4)), 4, 0.02, 0.1
    allocator = DyLoRA(frozen=frozen, seed=1, rule=rule)
    trained = [p for layer in model.layers for p in (layer.A, layer.B)]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay)
    torch.manual_seed(1)
    for layer in model.layers:
        layer.B.data.normal_()
    allocator.start(model, optimizer, 30)
    twins = [p.detach().clone() for p in trained]
    first, second = ([torch.zeros_like(p) for p in twins] for _ in range(2))
    x = torch.randn(6, 4).double()
    largest = 0.0
    for step in range(1, 13):
        b = allocator.drawn(step, rank)
        units = slice(b - 1, b) if frozen else slice(0, b)
        for number, layer in enumerate(model.layers):
            A, B = twins[2 * number], twins[2 * number + 1]
            scale = layer.scale * rank / b
            y = x @ (layer.base.weight + scale * B[:, :b] @ A[:b]).T + layer.base.bias
            G = (2 * (y - 1) / y.numel()).T @ x
            grads = [torch.zeros_like(A), torch.zeros_like(B)]
            grads[0][units] = scale * B[:, units].T @ G.detach()
            grads[1][:, units] = scale * G.detach() @ A[units].T
            for place, grad in enumerate(grads, 2 * number):
                first[place] = 0.9 * first[place] + 0.1 * grad
                second[place] = 0.999 * second[place] + 0.001 * grad**2
                root = (second[place] / (1 - 0.999**step)).sqrt() + 1e-8
                twins[place] = (1 - rate * decay) * twins[place] - rate * (
                    first[place] / (1 - 0.9**step) / root
                )
        sum((layer(x) - 1).square().mean() for layer in model.layers).backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
        for p, twin, m, v in zip(trained, twins, first, second, strict=True):
            largest = max(largest, float((p.detach() - twin).abs().max()))
            if rule == "published":
                torch.testing.assert_close(p.detach(), twin, rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(optimizer.state[p]["exp_avg"], m, rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(
                    optimizer.state[p]["exp_avg_sq"], v, rtol=1e-9, atol=1e-12
                )
    assert (largest > 1e-3) == (rule == "drawn")


# ---- axes without units


def trained(model, allocator, optimizer, steps):
    """Train a model of `Layers` to regress on ones, in a plain loop."""
    allocator.start(model, optimizer, steps)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3)).double()
    for _ in range(steps):
        sum((layer(x) - 1).square().mean() for layer in model.layers).backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
        optimizer.zero_grad()
    allocator.finish()


POLICIES = {
    "SoRA": lambda: SoRA(floor=0, xi=0.0, every=4, warmup=0, final=2),
    "SoRA to a budget": lambda: SoRA(2, floor=0, xi=0.0, every=4, warmup=0, final=2),
    "BeamLoRA": lambda: BeamLoRA(p0=0.5, until=1.0, every=4, final=2),
    "BeamLoRA exact": lambda: BeamLoRA(p0=0.5, until=1.0, every=4, final=2, split="exact"),
    "DyLoRA": lambda: DyLoRA(truncate=2),
    "DyLoRA drawn": lambda: DyLoRA(frozen=False, rule="drawn"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_an_axis_without_units_takes_part_and_stays_empty(name):
    model, allocator = Layers((3, 2, 4)), POLICIES[name]()
    rank_axes(model)["layers.1:rank"].resize([])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    trained(model, allocator, optimizer, 12)
    sizes = {key: len(axis) for key, axis in rank_axes(model).items()}
    assert sizes["layers.1:rank"] == 0
    assert sum(sizes.values()) == {"SoRA to a budget": 2, "DyLoRA": 4}.get(name, 7)
    assert all(axis.gate is None for axis in rank_axes(model).values())
    assert all(p.isfinite().all() for p in model.parameters())


def test_sora_prunes_an_axis_whose_gates_are_all_zero():
    """With a floor of 0, as in the release, the units of one layer leave and it is idle."""

    class Closing(SoRA):
        def finish_step(self, state, axes):
            super().finish_step(state, axes)
            if state:
                state.values(axes["layers.1:rank"]).data.zero_()

    model, allocator = Layers((3, 2, 4)), Closing(floor=0, xi=0.0, every=4, warmup=0, final=2)
    trained(model, allocator, head_first(model), 12)
    assert [len(axis) for axis in rank_axes(model).values()] == [3, 0, 4]
    assert model.layers[1].idle
    x = torch.randn(3, 4).double()
    assert torch.equal(model.layers[1](x), model.layers[1].base(x))
