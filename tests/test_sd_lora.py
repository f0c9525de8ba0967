"""SD-LoRA: frozen directions, trained magnitudes, and what happens between two tasks."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file, save_file
from test_allocators import Toy, everything, fit
from torch import nn

from adaptrank import testing
from adaptrank._errors import UserError
from adaptrank.allocation import AdaLoRA, SoRA
from adaptrank.artifacts import load_adapter, merge, save_adapter
from adaptrank.axes import fit_ranks, rank_axes, resize_stack
from adaptrank.injection import adapt
from adaptrank.parameterizations import DecoupledLoRA, LoRA, wrappers
from adaptrank.strategies import SDLoRA, SequentialTasks

TASKS = [4, 5, 3]
PAIR = partial(DecoupledLoRA, rank=3)


def blocks(method=PAIR, dtype=torch.float64, seed=0):
    """Two blocks of two layers of different shapes, adapted."""
    torch.manual_seed(seed)
    block = [nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12)) for _ in range(2)]
    model = nn.Sequential(*block).to(dtype)
    return adapt(model, "all-linear", method)


def loss(model, step):
    random = torch.Generator().manual_seed(step)
    x = torch.randn(6, 12, generator=random, dtype=torch.float64)
    return (model(x) - x.roll(step % 3, 1)).square().mean()


def train(model, strategy, tasks=TASKS, make=torch.optim.SGD, watch=None, lr=0.05):
    """Train in a plain loop. `watch` is called before and after each border."""
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=lr)
    strategy.start(model, optimizer, sum(tasks))
    for step in range(sum(tasks)):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        at_border = step + 1 in torch.tensor(tasks).cumsum(0)[:-1].tolist()
        if at_border and watch is not None:
            watch("before", optimizer)
        strategy.step()
        if at_border and watch is not None:
            watch("after", optimizer)
    strategy.finish()
    return optimizer


def grown(base=None, tasks=3, **arguments):
    """Return a wrapper with the directions of two tasks, over a linear layer in float64."""
    torch.manual_seed(1)
    layer = DecoupledLoRA(copy.deepcopy(base or nn.Linear(48, 24)).double(), **arguments)
    for task in range(tasks - 1):
        testing.perturb(layer, seed=task)
        layer.keep_direction()
        resize_stack(layer, "tasks", task + 2)
        layer.magnitudes.data[-1] = 0.8
        rank_axes(layer)[":rank"].resize([], 2, torch.Generator().manual_seed(task))
    return layer


def products(layer):
    """Return each direction as a matrix, (m, n)."""
    members = layer.directions()
    return [layer.B_past[:, own] @ layer.A_past[own] for own in members.T]


# ---- the parameterization


CHECKS = (
    testing.check_definition,
    testing.check_exact_gradients,
    testing.check_training,
    testing.check_parameter_count,
    testing.check_pruning,
    testing.check_growth,
    testing.check_gates,
    testing.check_merged,
    testing.check_factors,
    testing.check_copies,
    testing.check_switch,
)


@pytest.mark.parametrize("base", [nn.Linear(48, 24), nn.Embedding(48, 24)], ids=["linear", "words"])
def test_with_directions_it_keeps_the_contract(base):
    for check in CHECKS:
        check(partial(grown, base))
    if isinstance(base, nn.Linear):
        testing.check_cost(lambda: grown(base).float())


def test_a_wrapper_of_one_task_takes_the_sizes_of_another_with_three():
    layer, other = grown(), DecoupledLoRA(nn.Linear(48, 24).double(), rank=4)
    fit_ranks(other, layer.state_dict())
    other.load_state_dict(layer.state_dict())
    x = testing.normal_input(layer, (3,))
    assert torch.equal(other(x), layer(x))
    back = DecoupledLoRA(nn.Linear(48, 24).double(), rank=4)
    fit_ranks(layer, back.state_dict())
    layer.load_state_dict(back.state_dict())
    assert torch.equal(layer(x), back(x))
    assert len(layer.magnitudes) == 1


def test_only_the_pair_of_the_present_task_has_units():
    layer = grown()
    axes = rank_axes(layer)
    assert list(axes) == [":rank"]
    assert {slot.name for slot in axes[":rank"].slots()} == {"A", "B"}
    assert not layer.A_past.requires_grad
    assert not layer.mix.requires_grad
    axes[":rank"].resize([])
    x = testing.normal_input(layer, (3,))
    assert not layer.idle
    assert not torch.equal(layer(x), layer.base(x))


def test_the_length_of_a_direction_is_that_of_the_dense_product():
    for norm in ("product", "product_of_norms"):
        torch.manual_seed(0)
        layer = DecoupledLoRA(nn.Linear(40, 30).double(), rank=3, scale=1.7)
        testing.perturb(layer)
        B, A = layer.B.detach(), layer.A.detach()
        length = (B @ A).norm() if norm == "product" else B.norm() * A.norm()
        layer.keep_direction(norm)
        (direction,) = products(layer)
        torch.testing.assert_close(direction, B @ A / length, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.mix[0], (1.7 * length).expand(3), rtol=1e-12, atol=0)
    torch.testing.assert_close(products(grown())[0].norm().item(), 1.0, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("granularity", "count"), [("shared", 1), ("layer", 2), ("module", 4)])
def test_layers_share_magnitudes_as_far_as_they_say(granularity, count, tmp_path):
    method = partial(PAIR, granularity=granularity)
    model = blocks(method)
    train(model, SDLoRA(steps_per_task=TASKS))
    tensors = {id(wrapper.magnitudes): wrapper.magnitudes for wrapper in wrappers(model)}
    assert len(tensors) == count
    first, same_block, other_block, _ = wrappers(model)
    assert (first.magnitudes is same_block.magnitudes) == (granularity != "module")
    assert (first.magnitudes is other_block.magnitudes) == (granularity == "shared")
    assert all(len(magnitudes) == len(TASKS) for magnitudes in tensors.values())
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    loaded = blocks(method, seed=0)
    plain = load_adapter(unwrapped(), tmp_path)
    x = torch.randn(4, 12, dtype=torch.float64)
    assert torch.equal(plain(x), model(x))
    assert len({id(wrapper.magnitudes) for wrapper in wrappers(plain)}) == count
    again = load_adapter(loaded, tmp_path)
    assert torch.equal(again(x), model(x))
    torch.testing.assert_close(merge(plain)(x), model(x), rtol=1e-12, atol=1e-12)


def unwrapped():
    torch.manual_seed(0)
    block = [nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 12)) for _ in range(2)]
    return nn.Sequential(*block).double()


def test_a_file_with_sizes_that_do_not_fit_is_refused(tmp_path):
    model = blocks()
    train(model, SDLoRA(steps_per_task=TASKS))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    key = next(key for key in state if key.endswith("mix"))
    for damaged in (state[key][:2], state[key][:, :2], state[key][None], state[key][:0]):
        with pytest.raises(ValueError, match="damaged"):
            fit_ranks(blocks(), {**state, key: damaged})
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    stored = next(key for key in tensors if key.endswith("A_past"))
    tensors[stored] = tensors[stored][:, :-1].contiguous()
    assert stored in tensors
    save_file(tensors, file)
    with pytest.raises(ValueError, match="adapter"):
        load_adapter(unwrapped(), tmp_path)


# ---- the strategy


@pytest.mark.parametrize("norm", ["product", "product_of_norms"])
@pytest.mark.parametrize("granularity", ["shared", "module"])
def test_the_switch_of_tasks_leaves_the_function_as_it_is(norm, granularity):
    model = blocks(partial(PAIR, granularity=granularity, scale=1.3))
    x = torch.randn(5, 12, dtype=torch.float64)
    outputs = []

    def watch(when, optimizer):
        outputs.append(model(x).detach())

    train(model, SDLoRA(steps_per_task=TASKS, norm=norm), watch=watch)
    assert len(outputs) == 4
    for before, after in zip(outputs[::2], outputs[1::2], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-13)
    assert not torch.equal(outputs[0], outputs[2])


def test_directions_stay_to_the_bit_while_their_magnitudes_train():
    model, kept = blocks(), {}

    def watch(when, optimizer):
        for number, wrapper in enumerate(wrappers(model)):
            for name in ("A_past", "B_past", "mix"):
                kept[when, number, name] = getattr(wrapper, name).clone()
            kept[when, number, "magnitudes"] = wrapper.magnitudes.detach().clone()
        if when == "after":
            assert not optimizer.state

    train(model, SDLoRA(steps_per_task=TASKS), make=torch.optim.Adam, watch=watch)
    for number, wrapper in enumerate(wrappers(model)):
        before = {name: kept["after", number, name] for name in ("A_past", "B_past", "mix")}
        assert torch.equal(wrapper.A_past, before["A_past"])
        assert torch.equal(wrapper.B_past, before["B_past"])
        assert torch.equal(wrapper.mix, before["mix"])
        assert wrapper.mix.shape == (3, 6)
        assert not wrapper.mix[-1].any()
        assert (wrapper.magnitudes[:2] != kept["after", number, "magnitudes"][:2]).all()
        assert kept["after", number, "magnitudes"][2] == 0.8


def test_magnitudes_may_start_anew_in_each_task():
    model, seen = blocks(), []

    def watch(when, optimizer):
        seen.append((when, wrappers(model)[0].magnitudes.tolist()))

    train(model, SDLoRA(steps_per_task=TASKS, restart_magnitudes=True), watch=watch)
    assert [values for when, values in seen if when == "after"] == [[0.8] * 2, [0.8] * 3]
    assert seen[0][1] != [0.8]


def reference(layer, W, bias, tasks, lr, norm):
    """Train one layer by the released rule, on dense matrices: one magnitude for each task.

    It yields the weight at the end of each task, and is sent the fresh pair of the next one.
    """
    pair = (layer.B, layer.A)
    directions, magnitudes, step = [], [0.8], 0

    def weight(a, B, A):
        return W + a[-1] * B @ A + sum(a[k] * D for k, D in enumerate(directions))

    for steps in tasks:
        leaves = [
            torch.tensor(magnitudes, dtype=torch.float64),
            *(p.detach().clone() for p in pair),
        ]
        momentum = [torch.zeros_like(leaf) for leaf in leaves]
        for _ in range(steps):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            total = weight(*leaves)
            value = loss(lambda x, total=total: torch.tanh(x @ total.T + bias), step)
            grads = torch.autograd.grad(value, leaves)
            momentum = [0.9 * old + grad for old, grad in zip(momentum, grads, strict=True)]
            leaves = [leaf.detach() - lr * v for leaf, v in zip(leaves, momentum, strict=True)]
            step += 1
        a, B, A = leaves
        total = weight(a, B, A)
        length = (B @ A).norm() if norm == "product" else B.norm() * A.norm()
        directions.append(B @ A / length)
        magnitudes = [*a.tolist(), 0.8]
        pair = yield total


@pytest.mark.parametrize("norm", ["product", "product_of_norms"])
def test_it_trains_what_a_reference_on_dense_matrices_trains(norm):
    """The released rule: directions of length 1 without their lengths, SGD with momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh()).double()
    W, bias = model[0].weight.detach(), model[0].bias.detach()
    adapt(model, "all-linear", PAIR)
    layer = wrappers(model)[0]
    oracle = reference(layer, W, bias, TASKS, 0.05, norm)
    want = next(oracle)
    strategy = SDLoRA(steps_per_task=TASKS, norm=norm, fold_norm=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    strategy.start(model, optimizer, sum(TASKS))
    ends = torch.tensor(TASKS).cumsum(0).tolist()
    for step in range(sum(TASKS)):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
        have = layer.dense().detach().clone()
        strategy.step()
        if step + 1 in ends:
            torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-12)
            want = oracle.send((layer.B, layer.A)) if step + 1 < sum(TASKS) else None


def test_smaller_ranks_for_later_tasks():
    model = blocks(partial(DecoupledLoRA, rank=4))
    train(model, SDLoRA(steps_per_task=TASKS, ranks=[4, 2, 1]))
    layer = wrappers(model)[0]
    assert len(layer.A) == 1
    assert layer.A_past.shape[0] == 6
    with pytest.raises(UserError, match=r"has 2 ranks, and there are 3 tasks"):
        train(blocks(), SDLoRA(steps_per_task=TASKS, ranks=[4, 2]))


def test_a_dependent_direction_is_dropped_and_leaves_its_coefficients():
    layer = grown()
    first, second = products(layer)
    with torch.no_grad():
        # A combination of both directions, in factors.
        combined = torch.cat([0.3 * layer.B_past[:, :10], -0.5 * layer.B_past[:, 10:]], 1)
        rank_axes(layer)[":rank"].resize([], 12, torch.Generator())
        layer.A.copy_(layer.A_past)
        layer.B.copy_(combined)
    before = layer.dense().detach()
    assert not layer.keep_direction(tau=0.01)
    layer.B.data.zero_()
    torch.testing.assert_close(layer.dense(), before, rtol=0, atol=1e-10)
    assert layer.A_past.shape[0] == 12
    assert layer.mix.shape == (3, 12)
    strengths = layer.mix[2]
    torch.testing.assert_close(
        strengths[:10], torch.full((10,), 0.3, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(
        strengths[10:], torch.full((2,), -0.5, dtype=torch.float64), atol=1e-9, rtol=0
    )
    # The directions themselves are known again, though the third task has coefficients of both.
    assert layer.directions().sum(0).tolist() == [10, 2]
    assert torch.equal(products(layer)[0], first)
    assert torch.equal(products(layer)[1], second)


def test_the_rest_of_a_fit_is_that_of_dense_least_squares():
    layer = grown()
    testing.perturb(layer, seed=5)
    D = (layer.B @ layer.A).detach()
    D = D / D.norm()
    basis = torch.stack([direction.flatten() for direction in products(layer)], 1)
    rest = float((D.flatten() - basis @ torch.linalg.lstsq(basis, D.flatten()).solution).norm())
    assert 0.1 < rest < 1
    assert not copy.deepcopy(layer).keep_direction(tau=rest + 1e-6)
    assert layer.keep_direction(tau=rest - 1e-6)


def test_a_pair_that_never_moved_leaves_nothing():
    layer = DecoupledLoRA(nn.Linear(8, 6))
    assert not layer.keep_direction()
    assert not len(layer.A_past)
    resize_stack(layer, "tasks", 2)
    assert torch.equal(layer.weight, layer.base_weight)


def test_a_run_that_goes_on_from_an_adapter_begins_with_a_fresh_pair(tmp_path):
    model = blocks()
    train(model, SDLoRA(steps_per_task=TASKS))
    x = torch.randn(3, 12, dtype=torch.float64)
    want = model(x).detach()
    strategy = SDLoRA(steps_per_task=[4, 4], seed=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    strategy.start(model, optimizer, 8)
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-13)
    assert all(len(w.magnitudes) == 4 and not w.B.any() for w in wrappers(model))


# ---- in a run


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_exact_to_the_bit(accumulate, tmp_path):
    """Stopped inside of a task, one step before a border, on it, and one step after."""

    def parts():
        strategy = SDLoRA(steps_per_task=[8, 8, 8], tau=0.99, ranks=[3, 3, 2])
        return Toy(PAIR, make=torch.optim.AdamW), strategy

    whole, strategy = parts()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    want = everything(whole, fit(whole, strategy, checkpoint, accumulate_grad_batches=accumulate))
    assert [event["step"] for event in strategy.round_events] == [0, 8, 16]
    for step in (3, 7, 8, 9) if accumulate == 1 else (8,):
        model, resumed = parts()
        path = tmp_path / f"step={step}.ckpt"
        have = everything(
            model, fit(model, resumed, ckpt_path=path, accumulate_grad_batches=accumulate)
        )
        assert have.keys() == want.keys()
        different = [key for key in want if not torch.equal(have[key], want[key])]
        assert not different, f"cut at {step}: {different}"


def test_an_allocator_moves_the_pair_of_the_present_task_alone():
    allocator = AdaLoRA(budget=6, every=3, warmup=1, final=2)
    model = Toy(partial(DecoupledLoRA, rank=4))
    fit(model, SDLoRA(steps_per_task=[8, 8, 8]), allocator)
    assert sum(len(axis) for axis in rank_axes(model).values()) == 6
    assert all(len(layer.magnitudes) == 3 for layer in model.maps)


def test_the_learning_rate_starts_anew_in_each_task():
    rates, model = [], blocks()
    strategy = SDLoRA(steps_per_task=TASKS, schedule="linear")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    strategy.start(model, optimizer, sum(TASKS))
    optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
    for _ in range(sum(TASKS)):
        optimizer.step()
        strategy.step()
    expected = [1 - t / length for length in TASKS for t in range(length)]
    assert rates == pytest.approx(expected)


def test_sequential_tasks_drops_the_state_of_the_optimizer_and_nothing_else():
    model, counts, weights = blocks(partial(LoRA, rank=2)), [], []

    def watch(when, optimizer):
        counts.append(len(optimizer.state))
        weights.append([p.detach().clone() for p in model.parameters()])

    make = partial(torch.optim.SGD, momentum=0.9)
    train(model, SequentialTasks(steps_per_task=TASKS), make=make, watch=watch)
    assert counts == [8, 0, 8, 0]
    for before, after in zip(weights[::2], weights[1::2], strict=True):
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SDLoRA(norm="frobenius"), "norm='frobenius' is unknown"),
        (lambda: SDLoRA(ranks=[3, 0]), "list of ranks of 1 or more"),
        (lambda: SDLoRA(tau=1.5), "tau=1.5 makes no sense"),
        (lambda: SDLoRA(steps_per_task=[]), "a list of steps"),
        (lambda: SDLoRA(schedule="step"), "schedule='step' is unknown"),
        (lambda: DecoupledLoRA(nn.Linear(4, 4), granularity="rows"), "use one of shared, layer"),
        (lambda: DecoupledLoRA(nn.Linear(4, 4), magnitude=0), "magnitude=0 makes no sense"),
        (lambda: train(blocks(), SDLoRA()), "this run has no tasks"),
        (lambda: train(blocks(partial(LoRA, rank=2)), SDLoRA(steps_per_task=TASKS)), "has LoRA"),
        (lambda: fit(Toy(PAIR), SDLoRA(steps_per_task=[8, 8, 8]), SoRA()), "its gates"),
    ],
)
def test_what_does_not_fit_is_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()
