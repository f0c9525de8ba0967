"""Tests of MiSS beside the common contract."""

import copy

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.artifacts import merge, unmerge
from adaptrank.axes import generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import LoRA, MiSS, ModuleWrapper

LLAMA_32_3B = {"q": (3072, 3072), "v": (1024, 3072)}
VARIANTS = [
    {"rank": 4, "period": 12},
    {"rank": 7, "period": 10},  # ragged: 48 = 4 * 10 + 8
    {"rank": 48},
    {"scale": 0.5},
    {"variant": "mini"},
    {"variant": "mini", "rank": 5, "mini_rank": 1, "period": 9},
    {"variant": "bat", "rank": 6, "scale": 2.0},
]


def build(base=None, **arguments):
    layer = MiSS(base or nn.Linear(48, 24).double(), **arguments)
    testing.perturb(layer)
    return layer


def test_closed_count():
    testing.check_parameter_count(testing.builder(MiSS, nn.Linear(48, 24)), lambda m, n: 8 * m)


@pytest.mark.parametrize("arguments", VARIANTS, ids=str)
def test_the_contract_of_variants(arguments):
    for base in testing.example_bases(MiSS):
        testing.check_contract(testing.builder(MiSS, base, **arguments))
        testing.check_cost(testing.builder(MiSS, copy.deepcopy(base).float(), **arguments))
        testing.check_low_precision(
            testing.builder(MiSS, copy.deepcopy(base).bfloat16(), **arguments)
        )
    testing.check_gradients(testing.builder(MiSS, nn.Linear(48, 24).double(), **arguments))
    testing.check_conv1d_twin(MiSS, arguments=arguments)


@pytest.mark.parametrize("outer", [{"variant": "bat"}, {"variant": "mini"}], ids=str)
def test_variants_over_a_trained_change(outer):
    base = nn.Linear(48, 24).double()
    testing.check_contract(lambda: MiSS(LoRA(copy.deepcopy(base), init="orthogonal"), **outer))


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"variant": "linear"}, 7_340_032),
        ({"variant": "bat"}, 7_340_032),
        ({"variant": "mini", "mini_rank": 64}, 229_376),
    ],
)
def test_printed_counts(arguments, count):
    model = adapt(
        meta(LLAMA_32_3B, 28), "all-linear", lambda base: MiSS(base, rank=64, **arguments)
    )
    assert total(model) == count


@pytest.mark.parametrize(("rank", "n"), [(8, 48), (10, 48), (7, 48), (48, 48)])
def test_every_block_of_inputs_shares_the_shard(rank, n):
    layer = build(nn.Linear(n, 24).double(), rank=rank)
    change = layer.weight - layer.base.weight
    for channel in range(n):
        torch.testing.assert_close(
            change[:, channel], layer.D[channel % rank], rtol=1e-12, atol=1e-12
        )


def test_mini_tiles_the_shard_over_the_outputs():
    layer = build(variant="mini", rank=6, mini_rank=4)
    change = layer.weight - layer.base.weight
    for row in range(24):
        for channel in range(48):
            torch.testing.assert_close(
                change[row, channel], layer.D[channel % 6, row % 4], rtol=1e-12, atol=1e-12
            )
    assert torch.linalg.matrix_rank(change) == 4


def test_bat_changes_every_block_by_itself():
    layer = build(variant="bat", rank=6)
    W, have = layer.base.weight, layer.weight
    for j in range(4):
        D, rows = layer.D[j], slice(6 * j, 6 * j + 6)
        for t in range(8):
            columns = slice(6 * t, 6 * t + 6)
            change = have[rows, columns] - W[rows, columns]
            torch.testing.assert_close(change, W[rows, columns] @ D + D, rtol=1e-12, atol=1e-12)
            back = torch.linalg.solve((torch.eye(6).double() + D).T, (have[rows, columns] - D).T).T
            torch.testing.assert_close(back, W[rows, columns], rtol=1e-8, atol=1e-8)


def test_bat_is_taken_back_to_the_bit():
    model = adapt(
        nn.Sequential(nn.Linear(48, 24).bfloat16()),
        "all-linear",
        lambda base: MiSS(base, variant="bat"),
    )
    testing.perturb(model)
    before = model[0].base.weight.detach().clone()
    merge(model, keep_originals=True)
    assert not torch.equal(model[0].weight, before)
    unmerge(model)
    assert torch.equal(model[0].base.weight, before)


def test_removing_a_slot_leaves_the_period_and_every_other_channel():
    layer = build(rank=8)
    before = layer.weight.detach()
    rank_axes(layer)[":rank"].resize([0, 1, 2, 4, 5, 7])
    gone = [channel for channel in range(48) if channel % 8 in (3, 6)]
    stay = [channel for channel in range(48) if channel % 8 not in (3, 6)]
    assert torch.equal(layer.weight[:, gone], layer.base.weight[:, gone])
    torch.testing.assert_close(layer.weight[:, stay], before[:, stay], rtol=1e-12, atol=1e-12)
    assert layer.period == 8


def test_slots_come_back_and_no_slot_twice():
    layer = build(rank=4, period=9)
    axis = rank_axes(layer)[":rank"]
    for step in range(10):
        axis.resize(
            range(1, len(axis)),
            min(3, axis.limits()[1] - len(axis) + 1),
            generator(0, axis.key, step),
        )
        assert len(set(layer.slots.tolist())) == len(axis)
    axis.resize(grow=9 - len(axis), generator=generator(0, axis.key, 10))
    assert sorted(layer.slots.tolist()) == list(range(9))
    with pytest.raises(ValueError, match="holds at most 9 units"):
        axis.resize(grow=1)


def test_twice_the_period_with_the_shard_stacked_is_the_same_change():
    one, two = build(rank=6), MiSS(nn.Linear(48, 24).double(), rank=12)
    two.base.load_state_dict(one.base.state_dict())
    with torch.no_grad():
        two.D.copy_(torch.cat([one.D, one.D]))
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-14, atol=1e-14)
    two(torch.randn(5, 48, dtype=torch.float64)).square().sum().backward()
    assert not torch.allclose(two.D.grad[:6], two.D.grad[6:]), "the copies go different ways"


def test_slots_are_orthogonal_so_that_their_squares_add():
    layer = build(rank=8)
    change = layer.weight - layer.base.weight
    torch.testing.assert_close(change.square().sum(), (48 / 8) * layer.D.norm(dim=1).square().sum())


@pytest.mark.parametrize("variant", ["linear", "mini"])
def test_only_the_sums_of_the_blocks_are_kept(variant):
    layer = MiSS(nn.Linear(48, 24), rank=7, variant=variant)
    x, kept = torch.randn(1000, 48, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {tuple(t.shape) for t in kept if t.shape[0] == 1000} == {(1000, 7)}


@pytest.mark.parametrize("variant", ["linear", "mini", "bat"])
def test_every_number_has_a_gradient_at_once(variant):
    layer = MiSS(nn.Linear(48, 24), variant=variant)
    layer(torch.randn(5, 48)).square().sum().backward()
    assert layer.D.grad.abs().min() > 0


@pytest.mark.parametrize("variant", ["linear", "mini", "bat"])
def test_dropout_is_on_the_way_to_the_shard_only_and_off_in_evaluation(variant):
    layer = MiSS(nn.Linear(48, 24), dropout=0.5, variant=variant)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    testing.perturb(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5
    )


class Nonlinear(ModuleWrapper):
    """y + tanh(v) of a vector: a toy without a dense weight."""

    source = "toy"
    mergeable = False

    def __init__(self, base):
        super().__init__(base)
        self.v = self.zeros(self.shape[0])

    def delta(self, x, y):
        return self.v.tanh().expand_as(y)


def test_bat_alone_needs_a_weight_under_it():
    inner = Nonlinear(nn.Linear(48, 24))
    assert MiSS(inner)(torch.randn(2, 48)).shape == (2, 24)
    with pytest.raises(
        ValueError, match=r"MiSS takes the weight .* put Nonlinear outermost, \[MiSS, Nonlinear\]"
    ):
        MiSS(inner, variant="bat")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rank": 0}, "rank=0 with period=0 does not fit 48 inputs"),
        ({"rank": 49}, "use 1 <= rank <= period <= 48"),
        ({"rank": 8, "period": 4}, "rank=8 with period=4"),
        ({"variant": "Bat"}, "variant='Bat' is unknown"),
        (
            {"variant": "mini", "mini_rank": 7},
            r"does not divide 24 outputs; use one of \[1, 2, 3, 4, 6, 8, 12, 24\]",
        ),
        ({"variant": "bat", "rank": 16}, r"fit 24x48; .* a rank of \[1, 2, 3, 4, 6, 8, 12, 24\]"),
        ({"variant": "bat", "rank": 6, "period": 12}, "leave period out"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        MiSS(nn.Linear(48, 24), **arguments)
