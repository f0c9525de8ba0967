"""Tests of TensorTrain, TensorTrainAdapter and the train of a matrix."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.artifacts import merge
from adaptrank.axes import rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import HyperAdapt, LoRA, TensorTrain, TensorTrainAdapter
from adaptrank.parameterizations import tensor_train_cores as trains

ROBERTA = {"q": (768, 768), "v": (768, 768)}


def random_cores(modes, rank=4):
    return [torch.randn(shape, dtype=torch.float64) for shape in trains.core_shapes(modes, rank)]


# ---- trains


@pytest.mark.parametrize("split", [1, 2, 3])
def test_contraction_is_an_einsum(split):
    cores = random_cores([4, 3, 2, 5])
    want = torch.einsum("ian,nbo,ocp,pdj->abcd", *cores)
    rows = math.prod([4, 3, 2, 5][:split])
    torch.testing.assert_close(
        trains.dense(cores, rows), want.reshape(rows, -1), rtol=1e-12, atol=1e-12
    )
    thin = trains.left(cores[:split]) @ trains.right(cores[split:])
    torch.testing.assert_close(thin, want.reshape(rows, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "modes"),
    [
        (768, [8, 8, 12]),
        (48, [6, 8]),
        (576, [8, 8, 9]),
        (4096, [16, 16, 16]),
        (11008, [16, 16, 43]),
        (7, [7]),
        (1, [1]),
    ],
)
def test_automatic_modes(size, modes):
    assert trains.modes_of(size) == modes
    assert math.prod(modes) == size


def test_bonds_are_clamped_to_what_their_modes_can_use():
    assert trains.bonds([4, 3, 2, 5]) == [4, 10, 5]
    assert trains.core_shapes([4, 3, 2, 5], 6) == [(1, 4, 4), (4, 3, 6), (6, 2, 5), (5, 5, 1)]


def test_each_core_of_the_released_start_has_the_stated_deviation():
    """r_k^(-1/2) sigma^(1/d), of the bond behind it; the matrix alone would not tell which bond."""
    for shape in trains.core_shapes([80, 80, 120, 80], 50):
        core = torch.empty(shape)
        trains.draw(core, 776, 4)
        torch.testing.assert_close(
            core.std().item(), shape[2] ** -0.5 * 776 ** (-1 / 8), rtol=0.05, atol=0
        )


def canonical(cores, bond):
    """The same train with its centre at a bond, whose units then have the singular values for
    lengths; and those values."""
    cores = [core.clone() for core in cores]
    for k in range(bond - 1):
        r, n, _ = cores[k].shape
        q, rest = torch.linalg.qr(cores[k].flatten(0, 1))
        cores[k], cores[k + 1] = q.reshape(r, n, -1), torch.tensordot(rest, cores[k + 1], 1)
    for k in range(len(cores) - 1, bond, -1):
        _, n, r = cores[k].shape
        q, rest = torch.linalg.qr(cores[k].flatten(1).T)
        cores[k], cores[k - 1] = q.T.reshape(-1, n, r), torch.tensordot(cores[k - 1], rest.T, 1)
    (r, n, _), (_, m, t) = cores[bond - 1].shape, cores[bond].shape
    U, S, Vh = torch.linalg.svd(
        cores[bond - 1].flatten(0, 1) @ cores[bond].flatten(1), full_matrices=False
    )
    rank = cores[bond].shape[0]
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    cores[bond - 1], cores[bond] = (U * S).reshape(r, n, -1), Vh.reshape(-1, m, t)
    return cores, S


@pytest.mark.parametrize("bond", [1, 2, 3])
def test_dropping_the_smallest_canonical_singular_value_errs_by_exactly_that(bond):
    cores = random_cores([4, 4, 4, 4])
    want = trains.dense(cores, 16)
    cores, S = canonical(cores, bond)
    torch.testing.assert_close(trains.dense(cores, 16), want, rtol=1e-11, atol=1e-11)
    whole = want.reshape(4**bond, -1)
    torch.testing.assert_close(S, torch.linalg.svdvals(whole)[: len(S)], rtol=1e-11, atol=1e-11)
    cores[bond - 1], cores[bond] = cores[bond - 1][:, :, :-1], cores[bond][:-1]
    torch.testing.assert_close(
        (trains.dense(cores, 16) - want).norm(), S[-1], rtol=1e-10, atol=1e-10
    )


def test_pruning_a_canonical_unit_of_a_layer_errs_by_its_singular_value():
    """A bond of A is an axis: taking its last unit away is the best truncation, once the train is
    canonical there."""
    layer = TensorTrain(nn.Linear(64, 24).double(), in_modes=[4, 4, 4])
    testing.perturb(layer)
    cores, S = canonical([core.detach() for core in layer.cores("A")], 2)
    with torch.no_grad():
        for have, core in zip(layer.cores("A"), cores, strict=True):
            have.copy_(core)
    before = trains.dense(layer.cores("A"), 64)
    rank_axes(layer)[":a2"].resize(range(len(S) - 1))
    torch.testing.assert_close(
        (trains.dense(layer.cores("A"), 64) - before).norm(), S[-1], rtol=1e-10, atol=1e-10
    )


def test_autocast_rounds_a_contracted_train_once_not_once_a_core():
    cores = [core.float() for core in random_cores([8, 8, 12, 8])]
    with torch.autocast("cpu", torch.bfloat16):
        have = trains.left(cores[:3]), trains.right(cores[1:])
    assert torch.equal(have[0], trains.left(cores[:3]))
    assert torch.equal(have[1], trains.right(cores[1:]))


def test_under_autocast_what_is_contracted_between_the_trains_is_exact_too():
    layer, x = TensorTrain(nn.Linear(48, 24)), torch.randn(64, 48)
    testing.perturb(layer)
    (*inputs, last), (first, *outputs) = layer.cores("A"), layer.cores("B")
    between = layer.scale * last.flatten(1) @ first.flatten(0, 1)
    U, V = trains.right(outputs).T, (trains.left(inputs) @ between).T
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.delta(x, None), F.linear(F.linear(x, V), U))


def autocast_error(method):
    layer, x = method(nn.Linear(768, 768)), torch.randn(64, 768)
    testing.perturb(layer, 0.05)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        have = layer.delta(x, None).double()
    want = (layer.double()(x.double()) - layer.base(x.double())).detach()
    return (have - want).norm() / want.norm()


def test_under_autocast_it_is_about_as_exact_as_lora():
    torch.manual_seed(0)
    assert autocast_error(TensorTrain) < 1.5 * autocast_error(LoRA)


def test_the_released_start_has_the_stated_deviation():
    cores = [torch.empty(shape) for shape in trains.core_shapes([8, 8, 12, 8], 5)]
    found = []
    for _ in range(40):
        for core in cores:
            trains.draw(core, 776, 4)
        found.append(trains.dense(cores, 768).square().mean())
    torch.testing.assert_close(
        torch.stack(found).mean().sqrt().item(), 776**-0.5, rtol=0.15, atol=0
    )


# ---- LoRA in tensor trains


@pytest.mark.parametrize(
    "arguments",
    [
        {"tt_rank": 1},
        {"in_modes": [3, 16], "out_modes": [2, 3, 4]},
        {"rank": 3, "tt_rank": 2, "in_modes": [48]},
    ],
)
def test_tensor_train_variants(arguments):
    build = testing.builder(TensorTrain, nn.Linear(48, 24).double(), **arguments)
    testing.check_contract(build)
    testing.check_cost(testing.builder(TensorTrain, nn.Linear(48, 24), **arguments))


@pytest.mark.parametrize(
    ("method", "zero"), [(TensorTrain, {"B_3"}), (TensorTrainAdapter, {"U_4", "down", "up"})]
)
def test_what_starts_at_zero(method, zero):
    layer = method(nn.Linear(48, 24))
    assert {name for name, parameter in layer.own_parameters() if not parameter.any()} == zero


def test_printed_count_of_a_factor_pair():
    """1,160 numbers a matrix of RoBERTa-base, against LoRA's 12,288 of the same rank."""
    model = meta(ROBERTA, 12)
    adapt(
        model,
        "all-linear",
        lambda base: TensorTrain(base, in_modes=[8, 8, 12], out_modes=[12, 8, 8]),
    )
    assert total(model) == 24 * 1_160


def test_the_released_start_is_not_the_frozen_layer():
    build = testing.builder(TensorTrain, nn.Linear(48, 24).double(), init="released")
    testing.check_contract(build)


def test_the_rank_of_the_change_is_bounded_by_the_middle_bond():
    layer = TensorTrain(nn.Linear(48, 24).double(), tt_rank=3)
    testing.perturb(layer)
    assert torch.linalg.matrix_rank(layer.weight - layer.base_weight) == 3


def test_scale_of_a_unit_stays_when_bonds_move():
    layer = TensorTrain(nn.Linear(48, 24))
    for axis in rank_axes(layer).values():
        axis.resize([0, 1])
    assert layer.scale == 2
    assert [core.shape[0] for core in layer.cores("A")[1:]] == [2, 2]


def test_dropout_is_on_the_way_to_a_only_and_off_in_evaluation():
    layer, x = TensorTrain(nn.Linear(48, 24), dropout=0.5), torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    testing.perturb(layer, 0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-4, atol=1e-4
    )


def test_tensor_train_errors():
    with pytest.raises(
        ValueError, match="init='nonsense' is unknown; use 'zero_last' or 'released'"
    ):
        TensorTrain(nn.Linear(48, 24), init="nonsense")
    with pytest.raises(
        ValueError,
        match=r"in_modes=\[5, 7\] does not multiply to 48; use \[6, 8\], or leave it out",
    ):
        TensorTrain(nn.Linear(48, 24), in_modes=[5, 7])
    with pytest.raises(ValueError, match="rank=0, tt_rank=5: use 1 or more of both"):
        TensorTrain(nn.Linear(48, 24), rank=0)


# ---- the bottleneck adapter


@pytest.mark.parametrize("position", ["output", "input"])
@pytest.mark.parametrize("activation", ["relu", "tanh", "gelu"])
def test_adapter_variants(position, activation):
    arguments = {"position": position, "activation": activation, "bottleneck": 12}
    build = testing.builder(TensorTrainAdapter, nn.Linear(48, 24).double(), **arguments)
    testing.check_contract(build)
    testing.check_cost(testing.builder(TensorTrainAdapter, nn.Linear(48, 24), **arguments))
    testing.check_low_precision(
        testing.builder(TensorTrainAdapter, nn.Linear(48, 24).bfloat16(), **arguments)
    )


def test_count_of_an_adapter():
    """[8, 8, 12 | 8, 8] with bonds of 5: 1,560 numbers in cores, and the biases, which the paper's
    table may leave out."""
    model = meta({"output": (768, 768)}, 1)
    adapt(model, "all-linear", lambda base: TensorTrainAdapter(base, modes=[8, 8, 12]))
    layer = model[0]["output"]
    assert [tuple(core.shape) for core in layer.cores("D")] == [
        (1, 8, 5),
        (5, 8, 5),
        (5, 12, 5),
        (5, 8, 5),
        (5, 8, 1),
    ]
    assert total(model) == 1_560 + 64 + 768


@pytest.mark.parametrize("position", ["output", "input"])
def test_the_released_start_of_an_adapter(position):
    build = testing.builder(
        TensorTrainAdapter, nn.Linear(48, 24).double(), init="released", position=position
    )
    testing.check_contract(build)


def test_the_released_start_of_an_adapter_draws_everything():
    layer = TensorTrainAdapter(nn.Linear(48, 24), init="released")
    assert all(parameter.any() for _, parameter in layer.own_parameters())
    x = torch.randn(3, 48)
    assert not torch.allclose(layer(x), layer.base(x))


def test_an_adapter_is_outermost_and_does_not_merge():
    inner = HyperAdapt(nn.Linear(48, 24).double())
    layer = TensorTrainAdapter(LoRA(inner))
    testing.perturb(layer)
    x = torch.randn(3, 48, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-10, atol=1e-10)
    with pytest.raises(
        ValueError, match="TensorTrainAdapter has no dense form and cannot be merged"
    ):
        merge(nn.Sequential(layer))
    with pytest.raises(
        ValueError, match=r"put TensorTrainAdapter outermost, \[HyperAdapt, TensorTrainAdapter\]"
    ):
        HyperAdapt(TensorTrainAdapter(nn.Linear(48, 24)))


@pytest.mark.parametrize("position", ["output", "input"])
@pytest.mark.parametrize("off", [(), (0,), (2,), (0, 2), (1,), (0, 1, 2)])
def test_the_definition_of_a_nest_sees_every_adapter_that_is_on(position, off):
    """Also behind a LoRA that has no dense form of its own there, for an adapter is inside."""
    layer = nn.Linear(48, 24).double()
    for make in (TensorTrainAdapter, LoRA, TensorTrainAdapter):
        layer = make(layer, **({} if make is LoRA else {"position": position}))
    testing.perturb(layer)
    for number in off:
        layer.nest[number].enabled = False
    x = torch.randn(3, 48, dtype=torch.float64)
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("position", ["output", "input"])
@pytest.mark.parametrize("inner", [None, LoRA])
def test_the_definition_over_half_precision_is_exact(position, inner):
    """In the adapter's dtype, as that of every other method: what is rounded is the frozen weight
    alone."""
    base = nn.Linear(48, 24).to(torch.bfloat16)
    layer = TensorTrainAdapter(inner(base) if inner else base, position=position)
    testing.perturb(layer)
    x = torch.randn(3, 48)
    have, want = layer.definition(x), copy.deepcopy(layer).double().definition(x.double())
    assert have.dtype == torch.float32
    torch.testing.assert_close(have.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", ["output", "input"])
def test_the_scale_of_an_adapter(position):
    arguments = {"position": position, "bottleneck": 12, "scale": 0.5}
    build = testing.builder(TensorTrainAdapter, nn.Linear(48, 24).double(), **arguments)
    for check in (testing.check_definition, testing.check_exact_gradients):
        check(build)
    half, whole = (
        build(),
        testing.builder(
            TensorTrainAdapter, nn.Linear(48, 24).double(), **arguments | {"scale": 1.0}
        )(),
    )
    whole.load_state_dict(half.state_dict())
    h = torch.randn(3, half.width, dtype=torch.float64)
    change, whole_change = half._add_change(h) - h, whole._add_change(h) - h
    torch.testing.assert_close(2 * change, whole_change, rtol=1e-12, atol=1e-12)


def test_dropout_of_an_adapter_is_on_the_way_to_d_only_and_off_in_evaluation():
    layer, x = (
        TensorTrainAdapter(nn.Linear(48, 24).double(), dropout=0.5),
        torch.randn(5, 48).double(),
    )
    assert torch.equal(layer(x), layer.base(x))
    testing.perturb(layer, 0.5)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-10, atol=1e-10)


def test_adapter_errors():
    with pytest.raises(
        ValueError, match="init='nonsense' is unknown; use one of zero_last, released"
    ):
        TensorTrainAdapter(nn.Linear(48, 24), init="nonsense")
    with pytest.raises(ValueError, match="position='middle' is unknown; use one of output, input"):
        TensorTrainAdapter(nn.Linear(48, 24), position="middle")
    with pytest.raises(ValueError, match=r"modes=\[5\] does not multiply to 24; use \[4, 6\]"):
        TensorTrainAdapter(nn.Linear(48, 24), modes=[5])
    with pytest.raises(ValueError, match="bottleneck=0, tt_rank=5"):
        TensorTrainAdapter(nn.Linear(48, 24), bottleneck=0)
