"""LoRA-RITE: the path of B A does not depend on how it is split, and equals the specified step."""

import copy
import io
from functools import partial

import pytest
import rite_reference
import torch
from step_reads import DeviceReads
from torch import nn

from adaptrank.allocation import AdaLoRA, Allocator, ElaLoRA
from adaptrank.allocation.plans import Resize
from adaptrank.artifacts import planning
from adaptrank.axes import generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.optimizers import LoRARITE
from adaptrank.optimizers.factor_pairs import left_factor
from adaptrank.parameterizations import DoRA, LoRA, MELoRA, MiSS, PiCa, SBoRA, wrappers
from adaptrank.testing import perturb


class Two(nn.Module):
    """Two layers with adapters. The batch of a step is drawn from its number."""

    def __init__(self, method=LoRA, dtype=torch.float64, zero=False, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 16)
        self.to(dtype)
        adapt(self, "all-linear", partial(method, **{"rank": 4, **arguments}))
        if not zero:
            for wrapper in wrappers(self):
                perturb(wrapper, 0.3)
        self.dtype = dtype

    def loss(self, step):
        random = torch.Generator().manual_seed(step)
        x = torch.randn(16, 12, generator=random, dtype=torch.float64).to(self.dtype)
        return (self.second(self.first(x).tanh()) - x[:, :1]).square().mean()


def train(model, optimizer, steps, first=0):
    for number in range(first, first + steps):
        optimizer.zero_grad()
        model.loss(number).backward()
        optimizer.step()
    return model


def changes(model):
    return [(U @ V).detach().double() for U, V in (w.factors() for w in wrappers(model))]


def distance(one, other):
    """Return the largest relative distance of two lists of matrices."""
    return max(
        float((a - b).norm() / b.norm()) for a, b in zip(changes(one), changes(other), strict=True)
    )


def gauge(model, T):
    """Split the changes in another way: (B T, T^-1 A)."""
    for wrapper in wrappers(model):
        wrapper.B.data = wrapper.B.data @ T.to(wrapper.B)
        wrapper.A.data = torch.linalg.solve(T.to(wrapper.A), wrapper.A.data)


def bases():
    random = torch.Generator().manual_seed(5)
    Q1, Q2 = (torch.linalg.qr(torch.randn(4, 4, generator=random).double()).Q for _ in range(2))
    return {
        "orthogonal": Q1,
        "random": Q1 @ torch.diag(torch.linspace(0.5, 3, 4).double()) @ Q2,
        "large": 50 * torch.eye(4).double(),
        "ill-conditioned": torch.diag(torch.logspace(3, -3, 4).double()) @ Q2,
    }


T = bases()
RITE = partial(LoRARITE, lr=0.02)
SETTINGS = {
    "as it is": {},
    "decay, active clip": {"weight_decay": 0.1, "clip": 0.01},
    "no escape, no clip": {"escape": False, "clip": None},
}


# ---- invariance


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_path_does_not_depend_on_the_split(settings):
    start, plain = changes(Two()), Two()
    train(plain, RITE(plain, **SETTINGS[settings]), 40)
    moved = [float((a - b).norm() / b.norm()) for a, b in zip(changes(plain), start, strict=True)]
    assert min(moved) > 0.1
    bounds = {"random": 1e-12, "ill-conditioned": 1e-8}
    if settings == "as it is":
        bounds["large"] = 1e-12
    for name, bound in bounds.items():
        model = Two()
        gauge(model, T[name])
        train(model, RITE(model, **SETTINGS[settings]), 40)
        assert distance(model, plain) < bound, name


def test_adam_on_the_same_model_depends_on_it():
    paths = []
    for basis in (None, T["random"]):
        model = Two()
        if basis is not None:
            gauge(model, basis)
        trained = [p for p in model.parameters() if p.requires_grad]
        paths.append(train(model, torch.optim.AdamW(trained, lr=0.02), 40))
    assert distance(*paths) > 0.1


def test_in_float32_it_holds_to_rounding():
    paths = []
    for basis in (None, T["random"]):
        model = Two(dtype=torch.float32)
        if basis is not None:
            gauge(model, basis)
        paths.append(train(model, RITE(model), 20))
    assert distance(*paths) < 1e-5


def test_another_split_in_the_middle_changes_nothing():
    """An allocator may bring the factors into another form without telling the optimizer."""
    plain, split = Two(), Two()
    optimizer = RITE(split)
    train(plain, RITE(plain), 18)
    for first in (0, 6, 12):
        train(split, optimizer, 6, first)
        canonical(split)
    assert distance(split, plain) < 1e-12


def canonical(model):
    """Bring each pair into the form of the singular value decomposition of its product."""
    for wrapper in wrappers(model):
        U, S, Vh = torch.linalg.svd(wrapper.B.data @ wrapper.A.data, full_matrices=False)
        r = wrapper.B.shape[1]
        wrapper.B.data = U[:, :r] * S[:r].sqrt()
        wrapper.A.data = S[:r].sqrt()[:, None] * Vh[:r]


def test_the_scale_is_left_out_of_the_step():
    paths = []
    for scale in (1.0, 4.0):
        model = Two(alpha=4 * scale)
        for wrapper in wrappers(model):
            wrapper.B.data /= scale
        paths.append(train(model, RITE(model), 10))
    assert distance(*paths) < 1e-12
    with_scale = Two(alpha=16.0)
    for wrapper in wrappers(with_scale):
        wrapper.B.data /= 4
    train(with_scale, RITE(with_scale, scale_invariant=False), 10)
    assert distance(with_scale, paths[0]) > 0.1


def test_the_order_of_parameters_does_not_matter():
    plain, shuffled = Two(), Two()
    trained = [p for p in shuffled.parameters() if p.requires_grad]
    order = torch.randperm(len(trained), generator=torch.Generator().manual_seed(3)).tolist()
    optimizer = LoRARITE([trained[i] for i in order], lr=0.02).bind(shuffled)
    train(plain, RITE(plain), 8)
    train(shuffled, optimizer, 8)
    assert distance(shuffled, plain) == 0


# ---- the reference


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_is_the_specified_one(settings):
    given = {"lr": 0.02, **SETTINGS[settings]}
    model = Two(alpha=6.0)
    optimizer = LoRARITE(model, **given)
    specified = dict(given)
    specified["decay"] = specified.pop("weight_decay", 0.0)
    layers = [model.first, model.second]
    states = [rite_reference.start(*layer.shape, 4) for layer in layers]
    own = [(layer.B.detach().clone(), layer.A.detach().clone()) for layer in layers]
    for number in range(12):
        optimizer.zero_grad()
        model.loss(number).backward()
        pairs = []
        for layer, (B, A), state in zip(layers, own, states, strict=True):
            pairs.append((B, A, dense_gradient(layer), layer.scale, state))
        own = rite_reference.step(pairs, **specified)
        optimizer.step()
        for layer, (B, A) in zip(layers, own, strict=True):
            torch.testing.assert_close(layer.B.data, B, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(layer.A.data, A, rtol=1e-11, atol=1e-12)


def dense_gradient(layer):
    """Return G with gB = s G A^T and gA = s B^T G. Only these projections of it are used."""
    s, B, A = layer.scale, layer.B.detach(), layer.A.detach()
    rest = layer.B.grad / s @ torch.linalg.pinv(A.T)
    of_A = torch.linalg.pinv(B.T) @ (layer.A.grad / s - B.T @ rest)
    return rest + of_A


def test_a_single_unit_is_a_formula_of_numbers():
    """For r = 1 a side is a vector, and its second moment a number."""
    layer = LoRA(nn.Linear(5, 3).double(), rank=1, alpha=2.0)
    perturb(layer, 0.5)
    b, a = (factor.detach().clone().flatten() for factor in (layer.B, layer.A))
    layer(torch.randn(7, 5).double()).square().mean().backward()
    g_b, g_a = layer.B.grad.flatten(), layer.A.grad.flatten()
    LoRARITE(layer, lr=0.1, clip=None, eps=1e-6).step()
    h_a, h_b = g_a / b.norm() / 2, g_b / a.norm() / 2
    for new, old, h, dual in ((layer.A, a, h_a, b), (layer.B, b, h_b, a)):
        root = (h.square().sum() / len(h)).sqrt()
        want = old - 0.1 * h / (root + 1e-6) / dual.norm() / 2
        torch.testing.assert_close(new.detach().flatten(), want, rtol=1e-12, atol=1e-14)


def test_from_zero_the_first_step_moves_B_by_equal_singular_values():
    model = Two(zero=True)
    A = [wrapper.A.detach().clone() for wrapper in wrappers(model)]
    optimizer = RITE(model)
    train(model, optimizer, 1)
    for wrapper, before in zip(wrappers(model), A, strict=True):
        assert torch.equal(wrapper.A, before)
        values = torch.linalg.svdvals(wrapper.scale * wrapper.B.data @ wrapper.A.data)[:4]
        torch.testing.assert_close(values, values[:1].expand(4), rtol=1e-3, atol=0)
    train(model, optimizer, 5, 1)
    assert all(
        w.A.isfinite().all() and not torch.equal(w.A, a)
        for w, a in zip(wrappers(model), A, strict=True)
    )


# ---- degenerate cases


@pytest.mark.parametrize(
    "case", ["deficient", "zero gradient", "no gradient", "frozen", "full", "more than full"]
)
def test_degenerate_pairs_stay_finite(case):
    model = Two(rank={"full": 8, "more than full": 14}.get(case, 4))
    layer = model.first
    optimizer = RITE(model)
    if case == "deficient":
        layer.B.data[:, 2:] = layer.B.data[:, :2]
    if case == "frozen":
        layer.A.requires_grad_(False)
    A = layer.A.detach().clone()
    for number in range(4):
        optimizer.zero_grad()
        model.loss(number).backward()
        if case == "zero gradient":
            layer.A.grad.zero_()
            layer.B.grad.zero_()
        if case == "no gradient":
            layer.A.grad = layer.B.grad = None
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert optimizer.skipped_steps == 0
    if case in ("frozen", "no gradient", "zero gradient"):
        assert torch.equal(layer.A, A)
    assert (layer.B in optimizer.state) is (case != "no gradient")


def test_gradients_that_are_not_finite_skip_their_pair_and_are_counted():
    model, other = Two(), Two()
    optimizer, plain = RITE(model, clip=None), RITE(other, clip=None)
    train(model, optimizer, 3)
    train(other, plain, 3)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    for each, steps in ((model, optimizer), (other, plain)):
        steps.zero_grad()
        each.loss(3).backward()
        if each is model:
            each.first.A.grad[0, 0] = torch.nan
        steps.step()
    after = model.state_dict()
    names = ("first.A", "first.B")
    assert all(torch.equal(after[name], before[name]) for name in names)
    assert optimizer.skipped_steps == 2  # both sides of one pair
    for label in (0, 1):
        for key, value in state[label].items():
            if key != "skipped":
                assert torch.equal(optimizer.state_dict()["state"][label][key], value), key
    # The other pair has made its step.
    assert torch.equal(after["second.B"], other.second.B)
    train(model, optimizer, 2, 4)
    assert model.first.A.isfinite().all()


def test_a_norm_that_is_not_finite_reaches_no_other_pair():
    model = Two()
    optimizer = RITE(model, clip=0.01)
    model.loss(0).backward()
    model.first.B.grad[0, 0] = torch.inf
    before = model.second.B.detach().clone()
    optimizer.step()
    assert model.second.B.isfinite().all()
    assert not torch.equal(model.second.B, before)


def test_a_step_reads_nothing_from_the_device():
    model = nn.ModuleList([Two(dtype=torch.float32), Two(MELoRA, torch.float32, rank=1, minis=4)])
    optimizer = LoRARITE(model, weight_decay=0.1)
    reads = DeviceReads()
    reads.place([*model.parameters(), *model.buffers()])
    for number in range(3):
        optimizer.zero_grad()
        (model[0].loss(number) + model[1].loss(number)).backward()
        with reads:
            optimizer.step()
    assert not reads.reads, "\n".join(reads.reads)


# ---- state


def test_the_state_is_plain_and_goes_on_to_the_bit():
    model = Two(dtype=torch.float32)
    optimizer = RITE(model)
    train(model, optimizer, 5)
    only_axis(model).resize([0, 2, 3], optimizers=[optimizer])
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    train(model, optimizer, 5, 5)
    resumed = Two(dtype=torch.float32)
    only_axis(resumed).resize([0, 2, 3])
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    again = RITE(resumed)
    again.load_state_dict(state)
    train(resumed, again, 5, 5)
    assert all(map(torch.equal, model.state_dict().values(), resumed.state_dict().values()))
    with pytest.raises(ValueError, match="has form 9; this version reads up to 1"):
        again.load_state_dict({**state, "format": 9})


def only_axis(model):
    return next(iter(rank_axes(model).values()))


def test_the_state_has_as_many_numbers_as_the_forecast_says():
    for model in (Two(), Two(DoRA), Two(rank=14), Two(MELoRA, rank=1, minis=4)):
        optimizer = RITE(model)
        model.loss(0).backward()
        optimizer.step()
        kept = sum(
            value.numel()
            for state in optimizer.state.values()
            for key, value in state.items()
            if key != "step"
        )
        assert optimizer.state_numbers(model) == kept
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert planning.states_of(RITE, model) == pytest.approx(kept / trained)


def test_factors_in_half_precision_have_a_copy_that_small_steps_add_up_in():
    model = Two(dtype=torch.float32)
    for wrapper in wrappers(model):
        wrapper.to(torch.bfloat16)
    optimizer = LoRARITE(model, lr=1e-5)
    x = torch.randn(8, 12, dtype=torch.bfloat16)
    before = model.first.B.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model.first(x).square().mean().backward()
        optimizer.step()
    state = optimizer.state[model.first.B]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert not torch.equal(state["master"], before.float())
    assert torch.equal(state["master"].bfloat16(), model.first.B)
    again = LoRARITE(model, lr=1e-5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for key, value in state.items():
        assert torch.equal(again.state[model.first.B][key], value)
        assert again.state[model.first.B][key].dtype == torch.float32
    # A change from outside counts.
    model.first.B.data.fill_(3.0)
    model.first(x).square().mean().backward()
    again.step()
    assert (model.first.B - 3).abs().max() < 0.1


# ---- other methods


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (DoRA, {}),
        (MELoRA, {"rank": [2, 1, 1, 2], "minis": 4}),
        (PiCa, {}),
        (PiCa, {"side": "output"}),
        (SBoRA, {}),
        (SBoRA, {"variant": "fb"}),
        (MiSS, {}),
    ],
)
def test_other_methods_train(method, arguments):
    model = Two(method, **arguments)
    before = float(model.loss(99).detach())
    train(model, LoRARITE(model, lr=0.02), 12)
    assert float(model.loss(99).detach()) < 0.9 * before


def test_the_minis_of_a_layer_are_pairs_of_their_own():
    """Each block is stepped as a LoRA of its own would be, but for the common clip."""
    x = torch.randn(16, 12).double()
    whole = MELoRA(nn.Linear(12, 8, bias=False).double(), rank=[3, 1], minis=2)
    perturb(whole, 0.3)
    W = whole.innermost.weight
    parts = []
    for mini in range(2):
        rows, columns = slice(4 * mini, 4 * mini + 4), slice(6 * mini, 6 * mini + 6)
        base = nn.Linear(6, 4, bias=False).double()
        base.weight.data = W[rows, columns].clone()
        units = whole.block == mini
        part = LoRA(base, rank=int(units.sum()), alpha=16.0)
        part.A.data, part.B.data = whole.A.data[units], whole.B.data[:, units]
        parts.append((part, columns))
    one, two = LoRARITE(whole, clip=None), LoRARITE(nn.ModuleList(p for p, _ in parts), clip=None)
    for _ in range(4):
        outputs = [part(x[:, columns]) for part, columns in parts]
        off_diagonal = x @ (W - torch.block_diag(W[:4, :6], W[4:, 6:])).T
        one.zero_grad()
        two.zero_grad()
        whole(x).square().mean().backward()
        (torch.cat(outputs, 1) + off_diagonal).square().mean().backward()
        one.step()
        two.step()
    for mini, (part, _) in enumerate(parts):
        units = whole.block == mini
        torch.testing.assert_close(whole.A.data[units], part.A.data, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(whole.B.data[:, units], part.B.data, rtol=1e-10, atol=1e-12)


def test_a_magnitude_a_head_and_a_bias_are_adams():
    model = nn.ModuleDict({"two": Two(DoRA), "head": nn.Linear(16, 2).double()})
    optimizer = LoRARITE(model, lr=0.02, weight_decay=0.1, adamw_lr=0.01)
    (model["head"](model["two"].second(torch.randn(4, 8).double()))).square().mean().backward()
    magnitude, W, bias = (
        model["two"].second.m,
        model["head"].weight,
        model["head"].bias,
    )
    twins = [p.detach().clone().requires_grad_() for p in (magnitude, W, bias)]
    for twin, p in zip(twins, (magnitude, W, bias), strict=True):
        twin.grad = p.grad.clone()
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 10)
    decays = [{"params": [twins[1]]}, {"params": [twins[0], twins[2]], "weight_decay": 0.0}]
    adam = torch.optim.AdamW(decays, lr=0.005, weight_decay=0.1)
    optimizer.step()
    adam.step()
    schedule.step()
    for twin, p in zip(twins, (magnitude, W, bias), strict=True):
        torch.testing.assert_close(p.detach(), twin.detach(), rtol=1e-12, atol=1e-14)


# ---- changes of ranks


class Singular(Allocator):
    """Prune the smallest singular values of the changes, which no split of them can alter."""

    def score(self, axis):
        (layer, _), *_ = axis.members
        U, S, Vh = torch.linalg.svd(layer.B.data @ layer.A.data, full_matrices=False)
        r = len(axis)
        layer.B.data.copy_(U[:, :r] * S[:r].sqrt())
        layer.A.data.copy_(S[:r].sqrt()[:, None] * Vh[:r])
        return S[:r]


def allocated(model, optimizer, allocator, steps=16):
    allocator.start(model, optimizer, steps)
    for number in range(steps):
        optimizer.zero_grad()
        model.loss(number).backward()
        allocator.before_step()
        optimizer.step()
        allocator.step()
    allocator.finish()
    return [len(axis) for axis in rank_axes(model).values()]


def test_pruning_by_singular_values_keeps_the_invariance():
    paths, sizes = [], []
    for basis in (None, T["random"]):
        model = Two()
        if basis is not None:
            gauge(model, basis)
        allocator = Singular(budget=4, every=4, warmup=4, final=4, floor=1)
        sizes.append(allocated(model, RITE(model, weight_decay=0.1), allocator))
        paths.append(model)
    assert sizes[0] == sizes[1]
    assert sum(sizes[0]) == 4
    assert distance(*paths) < 1e-11


class Moved(ElaLoRA):
    """Two units leave the first layer and two fresh ones join the second, at the first event."""

    importance = "magnitude"

    def plan(self, scores, cost, budget, step):
        if step > 8:
            return {}
        first, second = scores
        return {first: Resize((0, 1)), second: Resize((0, 1, 2, 3), 2)}


def test_growing_keeps_the_invariance_under_rotations():
    paths = []
    for basis in (None, T["orthogonal"]):
        model = Two()
        if basis is not None:
            gauge(model.second, basis)
        optimizer = RITE(model)
        assert allocated(model, optimizer, Moved(every=4, warmup=4, final=4)) == [2, 6]
        paths.append(model)
    assert distance(*paths) < 1e-10


@pytest.mark.parametrize("removes", [False, True])
def test_after_growth_steps_are_hardly_longer(removes):
    """Without a second moment in fresh directions the second one would be six times as long."""
    model = Two()
    optimizer = LoRARITE(model, lr=1e-4, betas=(0.0, 0.999))
    train(model, optimizer, 30)
    *_, axis = rank_axes(model).values()
    lengths = []
    for number in range(30, 34):
        if number == 31:
            keep = [0, 1, 3] if removes else None
            axis.resize(keep, 2, generator(0, "a", 1), [optimizer])
        before = changes(model)[1]
        train(model, optimizer, 1, number)
        lengths.append((changes(model)[1] - before).norm())
    assert max(lengths[1:]) < 1.5 * lengths[0]
    assert optimizer.state[model.second.B]["V"].shape[-1] == len(axis)


def test_removed_mass_does_not_count_as_escaped():
    model = Two()
    optimizer = RITE(model)
    train(model, optimizer, 6)
    canonical(model)
    train(model, optimizer, 1, 6)
    rho = [float(optimizer.state[p]["rho"]) for p in (model.first.A, model.first.B)]
    only_axis(model).resize([0, 1], optimizers=[optimizer])
    assert optimizer.state[model.first.B]["changed"] == 1
    train(model, optimizer, 1, 7)
    for p, before in zip((model.first.A, model.first.B), rho, strict=True):
        assert float(optimizer.state[p]["rho"]) <= before
        assert "changed" not in optimizer.state[p]
        assert float(optimizer.state[p]["t"]) == 8


def test_momentum_does_not_revive_closed_units():
    model = Two()
    optimizer = RITE(model)
    train(model, optimizer, 6)
    layer, axis = model.first, only_axis(model)
    axis.close([1, 2], [optimizer])
    for p in (layer.A, layer.B):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert layer.B.data[:, [1, 2]].abs().max() < 1e-14
    assert layer.B.data[:, [0, 3]].abs().max() > 1e-3
    # What is not closed goes on as if the transport had happened at the step.
    state = optimizer.state[layer.B]
    assert float(state["t"]) == 7


def test_closing_is_a_transport_that_the_next_step_would_have_made():
    plain, closed = Two(), Two()
    one, other = RITE(plain), RITE(closed)
    train(plain, one, 6)
    train(closed, other, 6)
    # No unit closes, but the state is transported before the step.
    other.close(left_factor(closed.first), ())
    train(plain, one, 3, 6)
    train(closed, other, 3, 6)
    assert distance(closed, plain) < 1e-12


def test_an_allocator_that_closes_prunes_and_empties_trains_on():
    model = Two()
    optimizer = RITE(model)
    allocator = AdaLoRA(budget=3, every=2, warmup=2, final=4, floor=0)
    sizes = allocated(model, optimizer, allocator, steps=20)
    assert sum(sizes) == 3
    assert all(p.isfinite().all() for p in model.parameters())
    for axis in rank_axes(model).values():
        axis.resize([], optimizers=[optimizer])
        axis.resize([], 2, generator(0, "a", 1), [optimizer])
    train(model, optimizer, 3, 20)
    assert model.loss(0).isfinite()
