"""Ablation scores: exact with cached prefixes, and to first order."""

from functools import partial

import pytest
import torch
from test_allocators import SVD4, Toy, fit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from adaptrank.allocation import AdaLoRA, ElaLoRA
from adaptrank.allocation.context import evaluating
from adaptrank.allocation.scores import ablation
from adaptrank.allocation.scores.ablation import exact, first_order
from adaptrank.allocation.scores.virtual_gates import gates_at
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import NOLA, DoRA, HyperAdapt, LoRA, PiCa, TensorTrain
from adaptrank.testing import perturb

LORA2 = partial(LoRA, rank=2)


class Here:
    """What an allocator is to a score that looks at data."""

    beta, seed, steps_done = 0.85, 0, 0

    def __init__(self, model, loss, examples):
        self.model, self._loss, self.examples, self.calls = model, loss, examples, 0

    def loss(self, batch):
        self.calls += 1
        with evaluating(self.model):
            return self._loss(batch)

    def reduce(self, tensor):
        return tensor


def llama(layers=3, dropout=0.0, method=LORA2):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        attention_dropout=dropout,
    )
    model = adapt(LlamaForCausalLM(config).double(), ["q_proj", "down_proj"], method)
    for layer in model.modules():
        if hasattr(layer, "gates"):
            perturb(layer, std=0.3)
    ids = torch.randint(32, (2, 5))
    return Here(
        model, lambda batch: model(input_ids=batch, labels=batch).loss, [ids, ids.flip(0) // 2]
    )


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    model = adapt(BertForSequenceClassification(config).double(), ["query", "dense"], LORA2)
    for layer in model.modules():
        if hasattr(layer, "gates"):
            perturb(layer, std=0.3)
    ids, labels = torch.randint(32, (3, 5)), torch.tensor([0, 1, 1])
    return Here(model, lambda batch: model(input_ids=batch, labels=labels).loss, [ids])


@pytest.mark.parametrize(
    "make",
    [
        llama,
        partial(llama, dropout=0.5),
        partial(llama, method=[HyperAdapt, LORA2]),
        partial(llama, method=PiCa),
        bert,
    ],
)
def test_cached_prefixes_change_nothing(make):
    run = make()
    axes = rank_axes(run.model)
    run.model.train()
    cached, whole = exact(axes, run), exact(axes, run, cached=False)
    assert cached.keys() == whole.keys() == axes.keys()
    for key in axes:
        torch.testing.assert_close(cached[key], whole[key], rtol=0, atol=1e-12)
    assert run.model.training
    assert all(axis.gate is None for axis in axes.values())


def test_blocks_before_the_unit_are_not_computed():
    layers = 4
    run, calls = llama(layers=layers), []
    for block in run.model.model.layers:
        block.mlp.register_forward_hook(lambda *_: calls.append(1))
    axes = rank_axes(run.model)
    units = sum(map(len, axes.values()))
    exact(axes, run)
    saved = len(calls)
    calls.clear()
    exact(axes, run, cached=False)
    assert len(calls) == 2 * 2 * layers * (units + 1)
    tried = sum(
        layers - upto for upto in range(1, layers)
    )  # every prefix once, before it is trusted
    assert (
        saved
        == 2
        * 2
        * (
            sum(len(axis) * (layers - int(key.split(".")[2])) for key, axis in axes.items())
            + layers
        )
        + tried
    )
    assert saved < len(calls) * (layers + 2) / (2 * layers), "about half: a mean over the blocks"


def test_the_score_is_the_analytic_one_on_a_linear_model():
    """y = sum_u x U_u: without a unit the loss is that of the sum without it."""
    torch.manual_seed(0)
    base = nn.Linear(8, 8, bias=False).double()
    nn.init.zeros_(base.weight)
    model = nn.Sequential(LoRA(base, rank=3, alpha=3))
    layer = model[0]
    perturb(layer, std=1.0)
    x, target = torch.randn(20, 8).double(), torch.randn(20, 8).double()
    run = Here(model, lambda batch: (model(x) - target).square().mean(), [None])
    (have,) = exact(rank_axes(model), run).values()
    units = [torch.outer(layer.B[:, u], layer.A[u]) for u in range(3)]

    def loss(W):
        return (x @ W.T - target).square().mean()

    total = sum(units)
    want = torch.stack([loss(total - U) - loss(U) for U in units])
    torch.testing.assert_close(have, want.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        LORA2,
        SVD4,
        partial(DoRA, **DoRA.exact_gradient),
        [HyperAdapt, LORA2],
        partial(TensorTrain),
        PiCa,
    ],
)
def test_first_order_is_the_derivative_of_the_ablations(method):
    """Against finite differences of the gates."""
    model = Toy(method, dtype=torch.float64)
    for layer in model.maps:
        for wrapper in layer.nest:
            perturb(wrapper, std=0.2)
    run = Here(model, lambda batch: model.loss(batch), [0, 1])
    axes = rank_axes(model)
    have = first_order(axes, run)
    h = 1e-5
    for key, axis in axes.items():
        for unit in range(min(len(axis), 2)):
            want = 0.0
            for at in (1.0, 0.0):
                losses = []
                for sign in (1, -1):
                    gates = gates_at(axes, at)
                    gates = {k: g.detach() for k, g in gates.items()}
                    gates[key][unit] += sign * h
                    stack = [axes[k].gated(gates[k]) for k in axes]
                    for context in stack:
                        context.__enter__()
                    losses.append(float(sum(run.loss(b) for b in run.examples)) / 2)
                    for context in reversed(stack):
                        context.__exit__(None, None, None)
                want -= (losses[0] - losses[1]) / (2 * h)
            assert float(have[key][unit]) == pytest.approx(want, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("score", [exact, first_order])
@pytest.mark.parametrize("mode", [True, False])
def test_gates_come_back_after_an_exception(score, mode):
    run = llama(dropout=0.5)
    run.model.train(mode)
    state, kept = (
        torch.random.get_rng_state(),
        {k: v.clone() for k, v in run.model.state_dict().items()},
    )
    axes, count = rank_axes(run.model), [0]

    def fails(batch):
        count[0] += 1
        if count[0] == (9 if score is exact else 3):
            raise KeyError("on the way")
        return run.model(input_ids=batch, labels=batch).loss

    run._loss = fails
    with pytest.raises(KeyError):
        score(axes, run)
    assert all(axis.gate is None for axis in axes.values())
    assert all(module.training is mode for module in run.model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, kept[key]) for key, value in run.model.state_dict().items())
    assert not any("forward" in block.__dict__ for block in run.model.model.layers)
    assert not any(block._forward_hooks for block in run.model.model.layers)


def test_a_block_that_runs_twice_is_computed_each_time():
    torch.manual_seed(0)
    blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)).double()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = blocks

        def forward(self, x):
            for block in [*self.blocks, self.blocks[0]]:
                x = torch.tanh(block(x))
            return x

    model = adapt(Twice(), "all-linear", LORA2)
    for layer in model.blocks:
        perturb(layer, std=0.5)
    run = Here(model, lambda batch: model(batch).square().mean(), [torch.randn(4, 6).double()])
    axes = rank_axes(model)
    for key, values in exact(axes, run, cached=False).items():
        torch.testing.assert_close(exact(axes, run)[key], values, rtol=0, atol=1e-14)


class Blocks(nn.Module):
    """Four blocks in a row.

    `block(module, x, left)` may leave something in `left` for later blocks.
    """

    def __init__(self, block):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(4)).double()
        self.left, self.ran = [], []
        for index, one in enumerate(self.blocks):
            one.forward = partial(self.compute, block, index)

    def compute(self, block, index, x):
        self.ran.append(index)
        return block(self.blocks[index][0], x, self.left)

    def forward(self, x):
        self.left.clear()
        x = x.clone()
        for block in self.blocks:
            x = block(x)
        return x


def plain(layer, x, left):
    return torch.tanh(layer(x))


def in_place(layer, x, left):
    return x.add_(torch.tanh(layer(x)))


def leaves_something(layer, x, left):
    left.append(layer(x))
    return torch.tanh(x + left[0])


def leaves_a_sum(layer, x, left):
    left.append(layer(x))
    return torch.tanh(x + sum(left))


@pytest.mark.parametrize(
    ("block", "replays"),
    [(plain, True), (in_place, False), (leaves_something, False), (leaves_a_sum, False)],
)
def test_a_prefix_is_used_only_where_replaying_it_gives_the_same_loss(block, replays):
    """The forward of these blocks is patched already, as accelerate does it.

    The patches are there again afterwards.
    """
    model = adapt(Blocks(block), "all-linear", LORA2)
    for one in model.blocks:
        perturb(one[0], std=0.5)
    patched = [one.__dict__["forward"] for one in model.blocks]
    run = Here(model, lambda batch: model(batch).square().mean(), [torch.randn(4, 6).double()])
    axes = rank_axes(model)
    whole = exact(axes, run, cached=False)
    model.ran.clear()
    cached = exact(axes, run)
    for key in axes:
        torch.testing.assert_close(cached[key], whole[key], rtol=0, atol=1e-12)
    own = next(iter(axes.values()))
    assert (model.ran.count(0) == 2 * (1 + len(own))) is replays, (
        "in the two clean passes, and for its own units"
    )
    assert [one.__dict__["forward"] for one in model.blocks] == patched


def test_without_a_list_of_blocks_every_pass_is_whole():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    adapt(model, "all-linear", LORA2)
    run = Here(model, lambda batch: model(batch).square().mean(), [torch.randn(4, 6).double()])
    axes = rank_axes(model)
    cached, whole = exact(axes, run), exact(axes, run, cached=False)
    assert all(torch.equal(cached[key], whole[key]) for key in axes)
    assert run.calls == 2 * 2 * (1 + sum(map(len, axes.values())))


@pytest.mark.parametrize(
    "importance", ["ablation", "ablation_first_order", "random", "uniform", "ablation_per_cost"]
)
@pytest.mark.parametrize("make", [lambda **k: AdaLoRA(6, soft=False, **k), ElaLoRA])
def test_any_allocator_takes_any_score(importance, make):
    allocator = make(importance=importance, every=4, warmup=6, final=6)
    fit(Toy(SVD4), allocator)
    assert [event["step"] for event in allocator.events] == [10, 14, 18]
    assert not any("skipped" in event for event in allocator.events)


def test_too_many_units_are_refused_at_the_start(monkeypatch):
    monkeypatch.setattr(ablation, "MAX_UNITS", 100)
    with pytest.raises(
        ValueError,
        match=r"each of 192 units, and takes at most 100. Use importance='ablation_first_order'",
    ):
        fit(Toy(NOLA), AdaLoRA(importance="ablation"))
    fit(Toy(NOLA), AdaLoRA(importance="ablation_first_order", every=4, warmup=6, final=6))


def test_a_score_that_does_not_exist():
    with pytest.raises(
        ValueError,
        match=r"importance='sensitivty' is no score. Did you mean 'sensitivity'\? There are ",
    ):
        fit(Toy(), AdaLoRA(importance="sensitivty"))
