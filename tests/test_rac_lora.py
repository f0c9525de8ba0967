"""RAC-LoRA: a chain of updates with one factor frozen at a random frame."""

from functools import partial
from typing import ClassVar

import pytest
import torch
from test_allocators import Toy, fit
from torch import nn

from adaptrank import testing
from adaptrank._errors import UserError
from adaptrank.allocation import EVA, AdaLoRA, ElaLoRA
from adaptrank.injection import adapt
from adaptrank.parameterizations import SVD, DoRA, HyperAdapt, LoRA, wrapped_layers
from adaptrank.strategies import RACLoRA, ledger_of
from adaptrank.strategies.methods.rac_lora import complete_frame, random_frame

SIDES = ["A", "B"]


def one_layer(m=12, n=9, rank=3, alpha=6.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(n, m, bias=False).double())
    return adapt(model, "all-linear", partial(LoRA, rank=rank, alpha=alpha))


def least_squares(model, target, x):
    """Return half the mean square of the error of a linear layer."""
    return 0.5 * (model(x) - x @ target.T).square().sum() / len(x)


def factors(layer, side):
    """Return the trained factor, and the frame with columns of length one."""
    trained, frozen = (layer.A, layer.B) if side == "A" else (layer.B, layer.A)
    return trained, frozen, frozen.detach() if side == "A" else frozen.detach().T


# ---- frames


@pytest.mark.parametrize("sketch", ["orthonormal", "gaussian"])
def test_a_frame_is_uniform_so_that_the_mean_projector_is_r_over_n(sketch):
    n, r, draws = 6, 2, 300
    mean = torch.zeros(n, n, dtype=torch.float64)
    for number in range(draws):
        frame = random_frame(n, r, sketch, torch.Generator().manual_seed(number))
        if sketch == "orthonormal":
            torch.testing.assert_close(frame.T @ frame, torch.eye(r, dtype=frame.dtype))
            # The signs of the columns are those of the Gaussian matrix.
            gaussian = random_frame(n, r, "gaussian", torch.Generator().manual_seed(number))
            assert ((frame.T @ gaussian).diagonal() > 0).all()
        mean += frame @ frame.T / draws
    # An entry of one projector has a standard deviation below 0.35.
    wanted = r / n * torch.eye(n, dtype=torch.float64)
    assert float((mean - wanted).abs().max()) < 5 * 0.35 / draws**0.5


def test_a_frame_depends_on_seed_round_and_layer_alone():
    frames = {}
    for noise in (0, 8):
        torch.manual_seed(noise)
        model = adapt(nn.ModuleList(nn.Linear(9, 9) for _ in range(2)), "all-linear", LoRA)
        strategy = RACLoRA(every=1)
        strategy.start(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
        torch.rand(noise)
        for number in range(2):
            for place, layer in enumerate(model):
                frames.setdefault((number, place), []).append(layer.B.detach().clone())
            strategy.step()
    for first, second in frames.values():
        assert torch.equal(first, second)
    different = [first for first, _ in frames.values()]
    assert all(not torch.equal(different[0], other) for other in different[1:])


def test_columns_are_completed_and_the_orthonormal_ones_stay():
    frame = random_frame(8, 5, "orthonormal", torch.Generator().manual_seed(0)).float()
    kept = frame.clone()
    complete_frame(frame, torch.zeros(4, 5))
    assert torch.equal(frame, kept)
    frame[:, 3:] = torch.randn(8, 2)
    in_use = frame.clone()
    complete_frame(in_use, torch.ones(4, 5))
    assert torch.equal(in_use, frame)
    complete_frame(frame, torch.zeros(4, 5))
    assert torch.equal(frame[:, :3], kept[:, :3])
    torch.testing.assert_close(frame.T @ frame, torch.eye(5), rtol=0, atol=1e-6)


# ---- links


@pytest.mark.parametrize("side", SIDES)
def test_one_link_of_gradient_descent_is_a_projected_full_step(side):
    model = one_layer()
    layer, rate = wrapped_layers(model)["0"], 0.3
    target = torch.randn(12, 9, dtype=torch.float64)
    x = torch.randn(40, 9, dtype=torch.float64)
    strategy = RACLoRA(every=1, train=side)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    strategy.start(model, optimizer, 3)
    for _ in range(2):
        W, frame = layer.dense().detach(), factors(layer, side)[2]
        G = (W - target) @ x.T @ x / len(x)
        H = frame @ frame.T
        torch.testing.assert_close(H @ H, H)
        gamma = rate * layer.scale**2
        wanted = W - gamma * (H @ G if side == "A" else G @ H)
        optimizer.zero_grad()
        least_squares(model, target, x).backward()
        optimizer.step()
        strategy.step()
        torch.testing.assert_close(layer.dense().detach(), wanted, rtol=0, atol=1e-12)


def run_quadratic(rank, every, steps, size=16):
    """Return the final loss over the first one of gradient descent at rate 1 / L."""
    model = one_layer(size, size, rank, alpha=float(rank))
    random = torch.Generator().manual_seed(1)
    basis = random_frame(size, size, "orthonormal", random)
    x = basis * torch.linspace(1, 1.5, size, dtype=torch.float64).sqrt() * size**0.5
    target = torch.randn(size, size, generator=random, dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(x.T @ x / len(x))[-1])
    strategy = RACLoRA(every=every)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1 / largest)
    first = float(least_squares(model, target, x).detach())
    strategy.start(model, optimizer, steps + 1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = least_squares(model, target, x)
        loss.backward()
        optimizer.step()
        strategy.step()
    return float(least_squares(model, target, x).detach()) / first


def test_a_quadratic_converges_and_with_one_frame_for_good_it_does_not():
    assert run_quadratic(rank=2, every=1, steps=200) < 1e-7
    assert run_quadratic(rank=8, every=60, steps=60) > 0.3


@pytest.mark.parametrize("side", SIDES)
def test_the_frozen_factor_has_no_gradient_and_no_state(side):
    model = one_layer()
    layer, strategy = wrapped_layers(model)["0"], RACLoRA(every=2, train=side)
    strategy.prepare(model)
    trained, frozen, _ = factors(layer, side)
    assert [p for p in model.parameters() if p.requires_grad] == [trained]
    optimizer = torch.optim.Adam([layer.A, layer.B], lr=0.1)
    strategy.start(model, optimizer, 6)
    x = torch.randn(5, 9, dtype=torch.float64)
    for step in range(6):
        optimizer.zero_grad()
        fixed = frozen.detach().clone()
        before = model(x).detach()
        model(x).square().mean().backward()
        optimizer.step()
        assert frozen.grad is None
        assert frozen not in optimizer.state
        assert torch.equal(frozen, fixed)
        assert not torch.equal(model(x), before)
        before = model(x).detach()
        strategy.step()
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)
        if step % 2:
            assert not torch.equal(frozen, fixed) or step == 5
            assert (trained in optimizer.state) is (step == 5)
    assert strategy.round_events[1]["trained"] == trained.numel()
    assert strategy.round_events[1]["trains"] == side


def test_a_coin_chooses_the_factor_of_each_link():
    model = one_layer()
    layer, strategy = wrapped_layers(model)["0"], RACLoRA(every=1, train="coin")
    strategy.prepare(model)
    assert layer.A.requires_grad
    assert layer.B.requires_grad
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    strategy.start(model, optimizer, 12)
    x = torch.randn(5, 9, dtype=torch.float64)
    for step in range(12):
        side = strategy.side(step)
        trained, frozen, frame = factors(layer, side)
        assert trained.requires_grad
        assert not frozen.requires_grad
        assert not trained.any()
        torch.testing.assert_close(frame.T @ frame, torch.eye(3, dtype=frame.dtype))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert list(optimizer.state) == [trained]
        before = model(x).detach()
        strategy.step()
        torch.testing.assert_close(model(x).detach(), before, rtol=0, atol=1e-12)
    assert {event["trains"] for event in strategy.round_events} == {"A", "B"}


@pytest.mark.parametrize("side", SIDES)
def test_an_embedding_keeps_its_function(side):
    torch.manual_seed(0)
    model = nn.Sequential(LoRA(nn.Embedding(20, 8).double(), rank=2))
    tokens, strategy = torch.randint(20, (4, 6)), RACLoRA(every=2, train=side)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    strategy.start(model, optimizer, 6)
    start = model(tokens).detach()
    for _ in range(6):
        optimizer.zero_grad()
        (model(tokens) - 1).square().mean().backward()
        optimizer.step()
        before = model(tokens).detach()
        strategy.step()
        torch.testing.assert_close(model(tokens).detach(), before, rtol=0, atol=1e-12)
    assert not torch.allclose(model(tokens), start)


# ---- with allocators


@pytest.mark.parametrize("side", SIDES)
def test_pruning_and_growth_follow_in_both_factors(side):
    """A fresh unit has no effect, and its column is orthogonal to the others."""
    grown = []

    class Watched(RACLoRA, registered=False):
        def follow(self, number):
            sizes = {path: layer.axis_size("rank") for path, layer in self.layers.items()}
            before = {path: layer.dense() for path, layer in self.layers.items()}
            super().follow(number)
            for path, layer in self.layers.items():
                assert torch.equal(layer.dense(), before[path])
                _, _, frame = factors(layer, side)
                assert frame.shape[1] == sizes[path]
                identity = torch.eye(sizes[path])
                torch.testing.assert_close(frame.T @ frame, identity, rtol=0, atol=1e-5)
            grown.append(sizes)

    allocator = ElaLoRA(every=3, warmup=3, final=3)
    model = Toy(partial(LoRA, rank=3))
    fit(model, Watched(every=12, train=side), allocator)
    assert any(event.get("grown") for event in allocator.events)
    assert len(grown) > 2
    assert any(len(set(sizes.values())) > 1 for sizes in grown)
    model = Toy(partial(LoRA, rank=3))
    fit(model, RACLoRA(every=12, train=side), AdaLoRA(budget=5, every=3, warmup=3, final=3))
    assert sum(layer.axis_size("rank") for layer in model.maps) == 5


def test_a_frame_cannot_outgrow_its_layer():
    model = adapt(nn.Sequential(nn.Linear(16, 12)), "all-linear", partial(LoRA, rank=13))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"0 has 13 units, .* at most 12 orthonormal columns"):
        RACLoRA(every=2).start(model, optimizer, 4)
    RACLoRA(every=2, sketch="gaussian").start(model, optimizer, 4)


# ---- starts and refusals


@pytest.mark.parametrize("side", [*SIDES, "coin"])
def test_an_adapter_that_a_run_starts_from_is_kept(side):
    model = one_layer()
    testing.perturb(model)
    x = torch.randn(5, 9, dtype=torch.float64)
    want = model(x).detach()
    RACLoRA(train=side).start(model, torch.optim.SGD(model.parameters(), lr=0.1), 600)
    torch.testing.assert_close(model(x).detach(), want, rtol=0, atol=1e-12)
    assert len(ledger_of(model[0]).A) == 3


def test_refusals():
    def start(method, strategy, allocators=()):
        model = adapt(nn.Sequential(nn.Linear(16, 12)), "all-linear", method)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        strategy.start(model, optimizer, 4, allocators=allocators)

    for method in (SVD, DoRA, HyperAdapt):
        with pytest.raises(UserError, match=f"{method.__name__} has no such two; use LoRA"):
            start(method, RACLoRA(every=2))

    class Half(LoRA, listed=False):
        """A method whose axis does not name one of its two factors."""

        axes: ClassVar = {"rank": {"B": 1}}

    with pytest.raises(UserError, match="Half has no such two"):
        start(Half, RACLoRA(every=2))
    with pytest.raises(UserError, match="train='coin' that changes from link to link"):
        start(LoRA, RACLoRA(every=2, train="coin"), [AdaLoRA(budget=2)])
    with pytest.raises(UserError, match="RACLoRA and EVA: it sets the factors at the start"):
        start(LoRA, RACLoRA(every=2), [EVA()])
    for name, value in (("train", "both"), ("sketch", "sparse")):
        with pytest.raises(UserError, match=f"{name}='{value}' is unknown"):
            RACLoRA(**{name: value})


def test_lora_plus_is_refused_because_one_factor_trains():
    toy = Toy(partial(LoRA, rank=2))
    toy.lora_plus_ratio = 16.0
    with pytest.raises(UserError, match=r"lora_plus_ratio=16\.0 .* leave it at 1\.0"):
        fit(toy, RACLoRA(every=12))
    toy.lora_plus_ratio = 1.0
    fit(toy, RACLoRA(every=12))
