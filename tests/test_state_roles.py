"""Optimizer state is carried by its role, and a state of unknown role is refused by name."""

from functools import partial

import pytest
import torch
from torch import nn

from adaptrank.allocation import AdaLoRA, BeamLoRA, DyLoRA, ElaLoRA, SoRA
from adaptrank.axes import STATE_ROLES, Role, check_optimizer, generator, rank_axes
from adaptrank.axes.state_roles import SUPPORTED, UNSUPPORTED
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA

SHIPPED = [
    name
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name != "Optimizer"
]


class ScheduleFree(torch.optim.Optimizer):
    """SGD without a schedule: the parameter lies between a base sequence `z` and its average."""

    def __init__(self, params, lr=0.05, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            weight = 1 / (group["k"] + 1)
            for p in group["params"]:
                if p.grad is None:
                    continue
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, weight)
                p.add_(p.grad, alpha=group["lr"] * (group["beta"] * (1 - weight) - 1))
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class Lookahead(torch.optim.SGD):
    """SGD whose slow weights are mixed in at every second step."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            slow = state.setdefault("slow", p.detach().clone())
            state["n"] = state.get("n", 0) + 1
            if state["n"] % 2 == 0:
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)


class Wrapping(torch.optim.Optimizer):
    """Slow weights around another optimizer, which keeps its own state."""

    def __init__(self, inner):
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow_buffer", p.detach().clone())


COPYING = {
    "z": ScheduleFree,
    "slow": partial(Lookahead, lr=0.05),
    "slow_buffer": lambda p: Wrapping(torch.optim.Adam(p, lr=0.05)),
}


def lora(rank=4, m=24, n=48):
    layer = LoRA(nn.Linear(n, m), rank=rank)
    layer.B.data.normal_().mul_(0.1)
    return layer


def train(layer, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(torch.randn(8, layer.shape[1])) - 1).square().mean().backward()
        optimizer.step()


def only_axis(layer):
    return next(iter(rank_axes(layer).values()))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_optimizer_of_torch_is_carried_or_refused_before_its_first_step(name):
    layer = lora()
    assert name in SUPPORTED or name in UNSUPPORTED
    optimizer = getattr(torch.optim, name)([layer.A, layer.B])
    if name in UNSUPPORTED:
        with pytest.raises(TypeError, match=rf"^{name} keeps state that cannot follow a rank; use"):
            check_optimizer(optimizer)
        return
    train(layer, optimizer)
    check_optimizer(optimizer)
    only_axis(layer).resize([2, 0], 3, generator(0, "a", 1), [optimizer])
    for parameter in (layer.A, layer.B):
        for key, value in optimizer.state[parameter].items():
            if STATE_ROLES[key] is not Role.COUNT:
                assert value.shape == parameter.shape, key
    train(layer, optimizer)
    assert layer.A.isfinite().all()
    assert layer.B.isfinite().all()


@pytest.mark.parametrize("key", COPYING)
def test_a_copy_of_the_weights_has_the_values_of_fresh_units(key):
    layer = lora()
    optimizer = COPYING[key]([layer.A, layer.B])
    train(layer, optimizer)
    check_optimizer(optimizer)
    before = optimizer.state[layer.A][key].clone()
    only_axis(layer).resize([3, 1], 4, generator(0, "a", 1), [optimizer])
    copy = optimizer.state[layer.A][key]
    assert torch.equal(copy[:2], before[[3, 1]])
    assert torch.equal(copy[2:], layer.A.detach()[2:])
    assert not optimizer.state[layer.B][key][:, 2:].any()
    fresh = layer.A.detach()[2:].clone()
    train(layer, optimizer, steps=4)
    assert layer.A.detach()[2:].norm() > 0.8 * fresh.norm()


@pytest.mark.parametrize("key", COPYING)
def test_a_copy_of_the_weights_does_not_revive_a_closed_unit(key):
    layer = lora()
    optimizer = COPYING[key]([layer.A, layer.B])
    train(layer, optimizer)
    only_axis(layer).close([1], [optimizer])
    assert not optimizer.state[layer.B][key][:, 1].any()
    assert optimizer.state[layer.B][key][:, 0].any()
    assert optimizer.state[layer.A][key][1].any()


def test_a_gate_is_folded_into_a_copy_of_the_weights():
    layer, gate = lora(), torch.tensor([1.0, 0.0, 2.0, 0.5])
    optimizer = ScheduleFree([layer.A, layer.B])
    train(layer, optimizer)
    before = optimizer.state[layer.B]["z"].clone()
    axis = only_axis(layer)
    axis.gate = gate
    axis.fold([optimizer])
    torch.testing.assert_close(optimizer.state[layer.B]["z"], before * gate)


def test_the_state_of_a_wrapped_optimizer_follows_too():
    layer = lora()
    inner = torch.optim.Adam([layer.A, layer.B], lr=0.05)
    optimizer = Wrapping(inner)
    train(layer, optimizer)
    only_axis(layer).resize([0], 2, generator(0, "a", 1), [optimizer])
    assert inner.state[layer.A]["exp_avg"].shape == layer.A.shape
    train(layer, optimizer)


class Blocks(nn.Module):
    """Two adapted layers, trained in a loop of one's own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        adapt(self.layers, "all-linear", partial(LoRA, rank=4))

    def loss(self, x):
        return (self.layers(x) - x.roll(1, -1)).square().mean()


def run(allocator, make, steps=8):
    model = Blocks()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    allocator.start(model, optimizer, steps, batches=[torch.randn(8, 16)] * 8, loss=model.loss)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss(torch.randn(8, 16)).backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
    allocator.finish()
    return model, optimizer


PHASES = {"every": 2, "warmup": 2, "final": 2}
ALLOCATORS = {
    "AdaLoRA": lambda: AdaLoRA(budget=5, **PHASES),
    "ElaLoRA": lambda: ElaLoRA(swaps=2, **PHASES),
    "SoRA": lambda: SoRA(budget=5, **PHASES),
    "BeamLoRA": lambda: BeamLoRA(p0=0.5, **PHASES),
    "BeamLoRA exact": lambda: BeamLoRA(p0=0.5, split="exact", **PHASES),
    "DyLoRA": lambda: DyLoRA(truncate=2),
}


@pytest.mark.parametrize("key", ["z", "slow"])
@pytest.mark.parametrize("name", ALLOCATORS)
def test_every_allocator_keeps_copies_of_the_weights_near_the_weights(name, key):
    model, optimizer = run(ALLOCATORS[name](), COPYING[key])
    for parameter in model.parameters():
        if parameter.requires_grad and parameter in optimizer.state:
            copy = optimizer.state[parameter][key]
            assert copy.shape == parameter.shape
            assert (copy - parameter).norm() <= 0.5 * parameter.norm() + 0.1


def unknown(key, shape=None, when=0):
    class Unknown(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            for p in self.param_groups[0]["params"]:
                state = self.state[p]
                state["n"] = state.get("n", 0) + 1
                if state["n"] > when:
                    state[key] = torch.zeros(shape or p.shape)

    return partial(Unknown, lr=0.01)


@pytest.mark.parametrize("when", [0, 3])
def test_a_state_of_unknown_role_is_refused_before_any_event(when):
    allocator = ALLOCATORS["AdaLoRA"]()
    with pytest.raises(
        TypeError,
        match=r"^Unknown keeps state .* \(its 'mystery' has an unknown role\).*STATE_ROLES",
    ):
        run(allocator, unknown("mystery", when=when))
    assert not allocator.events


def test_a_role_can_be_named(monkeypatch):
    monkeypatch.setitem(STATE_ROLES, "mystery", Role.FIRST_MOMENT)
    run(ALLOCATORS["AdaLoRA"](), unknown("mystery"))


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ([torch.zeros(3, 3)], r"its 'Q' is a list of tensors"),
        ({"a": torch.zeros(4)}, r"its 'Q' is a dict of tensors"),
    ],
)
def test_tensors_in_a_list_or_a_mapping_are_refused(value, sentence):
    layer = lora()
    optimizer = torch.optim.SGD([layer.A], lr=0.1)
    optimizer.state[layer.A]["Q"] = value
    with pytest.raises(TypeError, match=sentence):
        check_optimizer(optimizer)


def test_an_optimizer_that_moves_no_axis_is_not_judged():
    model = Blocks()
    head = nn.Linear(3, 3)
    adapters = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    allocator = ALLOCATORS["AdaLoRA"]()
    allocator.start(model, [torch.optim.ASGD(head.parameters()), adapters], 8)
    allocator.finish()


def test_factored_moments_follow_in_the_dimension_that_they_have():
    transformers = pytest.importorskip("transformers")
    layer = lora()
    optimizer = transformers.Adafactor([layer.A, layer.B], lr=1e-2, relative_step=False)
    train(layer, optimizer)
    check_optimizer(optimizer)
    rows = optimizer.state[layer.A]["exp_avg_sq_row"].clone()
    columns = optimizer.state[layer.A]["exp_avg_sq_col"].clone()
    only_axis(layer).resize([3, 1], 2, generator(0, "a", 1), [optimizer])
    state = optimizer.state[layer.A]
    assert torch.equal(state["exp_avg_sq_row"][:2], rows[[3, 1]])
    torch.testing.assert_close(state["exp_avg_sq_row"][2:], rows[[3, 1]].mean().expand(2))
    assert torch.equal(state["exp_avg_sq_col"], columns)
    assert optimizer.state[layer.B]["exp_avg_sq_col"].shape == (4,)
    train(layer, optimizer)


class EightBit(torch.optim.SGD):
    """State in the form of bitsandbytes: codes of 8 bits, a table, and a scale for each block."""

    def __init__(self, params, name="adam"):
        super().__init__(params, lr=0.0)
        self.optimizer_name = name
        table = torch.linspace(-1, 1, 256)
        for p in self.param_groups[0]["params"]:
            blocks = -(-p.numel() // 256)
            for number in "12":
                self.state[p][f"state{number}"] = torch.full(p.shape, 128, dtype=torch.uint8)
                self.state[p][f"qmap{number}"] = table
                self.state[p][f"absmax{number}"] = torch.ones(blocks)
            self.state[p]["step"] = 7


def test_blocks_of_8_bits_follow_unit_by_unit():
    from adaptrank.axes.block_quantized import decode, encode

    layer = lora(m=70, n=90)
    optimizer = EightBit([layer.A, layer.B])
    check_optimizer(optimizer)
    state = optimizer.state[layer.A]
    first, second = torch.randn(4, 90), torch.rand(4, 90) + 0.5
    encode(state, "1", first)
    encode(state, "2", second)
    torch.testing.assert_close(decode(state, "1"), first, rtol=0, atol=0.02)
    again = decode(state, "1")
    encode(state, "1", again)
    torch.testing.assert_close(decode(state, "1"), again)
    only_axis(layer).resize([3, 1], 3, generator(0, "a", 1), [optimizer])
    assert state["state1"].shape == state["state2"].shape == layer.A.shape
    assert len(state["absmax1"]) == -(-layer.A.numel() // 256)
    torch.testing.assert_close(decode(state, "1")[:2], first[[3, 1]], rtol=0, atol=0.04)
    assert decode(state, "1")[2:].abs().max() <= 0.03
    mean = second[[3, 1]].mean(0).expand(3, 90)
    torch.testing.assert_close(decode(state, "2")[2:], mean, rtol=0, atol=0.04)
    only_axis(layer).close([0], [optimizer])
    assert decode(optimizer.state[layer.B], "1")[:, 0].abs().max() <= 0.03
    assert state["step"] == 7


def test_the_single_state_of_rmsprop_in_8_bits_is_a_second_moment():
    from adaptrank.axes.state_roles import role_of

    layer = lora()
    assert role_of(EightBit([layer.A], "rmsprop"), "state1") is Role.SECOND_MOMENT
    assert role_of(EightBit([layer.A], "lion"), "state1") is Role.FIRST_MOMENT


def test_an_allocator_that_edits_single_moments_refuses_8_bits():
    with pytest.raises(TypeError, match="keeps 'state1' quantized, and this allocator changes"):
        run(DyLoRA(truncate=2, rule="drawn"), EightBit)


def test_a_small_block_of_8_bits_keeps_its_size():
    """bitsandbytes reads blocks of 256 elements, also where the first one was short."""
    from adaptrank.axes.block_quantized import decode

    layer = lora(m=70, n=90)
    optimizer = EightBit([layer.A, layer.B])
    only_axis(layer).resize([1], 4, generator(0, "a", 1), [optimizer])
    state = optimizer.state[layer.A]
    assert state["state1"].numel() == 450
    assert len(state["absmax1"]) == 2
    only_axis(layer).resize([0], 0, generator(0, "a", 1), [optimizer])
    assert len(optimizer.state[layer.A]["absmax1"]) == 1
    assert decode(optimizer.state[layer.A], "1").shape == (1, 90)


def test_one_moment_for_a_whole_tensor_stays():
    layer = lora(m=7, n=9)
    optimizer = torch.optim.SGD([layer.A, layer.B], lr=0.1)
    for tensor in (layer.A, layer.B):
        optimizer.state[tensor]["exp_avg_sq"] = torch.tensor(3.0)
    only_axis(layer).resize([1, 0], 2, generator(0, "a", 1), [optimizer])
    assert optimizer.state[layer.A]["exp_avg_sq"] == 3
    only_axis(layer).close([0], [optimizer])
