"""What only tensor trains promise: TensorTrain, TensorTrainAdapter, and the train of a matrix."""

import math

import pytest
import torch
from test_hyperadapt import meta
from test_lora import total
from torch import nn

from adaptrank import testing
from adaptrank.artifacts import merge
from adaptrank.axes import rank_axes
from adaptrank.inject import adapt
from adaptrank.parameterizations import HyperAdapt, LoRA, TensorTrain, TensorTrainAdapter
from adaptrank.parameterizations import _trains as trains

ROBERTA = {"q": (768, 768), "v": (768, 768)}


def random_cores(modes, rank=4):
    return [torch.randn(shape, dtype=torch.float64) for shape in trains.core_shapes(modes, rank)]


# ---- trains


@pytest.mark.parametrize("split", [1, 2, 3])
def test_contraction_is_an_einsum(split):
    cores = random_cores([4, 3, 2, 5])
    want = torch.einsum("ian,nbo,ocp,pdj->abcd", *cores)
    rows = math.prod([4, 3, 2, 5][:split])
    torch.testing.assert_close(trains.dense(cores, rows), want.reshape(rows, -1), rtol=1e-12, atol=1e-12)
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


@pytest.mark.parametrize("bond", [1, 2, 3])
def test_dropping_the_smallest_canonical_singular_value_errs_by_exactly_that(bond):
    """The train cut at a bond is a product L R; with both sides orthonormalized, the middle's singular values are the errors."""
    cores = random_cores([4, 4, 4, 4])
    L, R = trains.left(cores[:bond]), trains.right(cores[bond:])
    (ql, rl), (qr, rr) = torch.linalg.qr(L), torch.linalg.qr(R.T)
    U, S, Vh = torch.linalg.svd(rl @ rr.T)
    cut = (ql @ U[:, :-1] * S[:-1]) @ (Vh[:-1] @ qr.T)
    torch.testing.assert_close((L @ R - cut).norm(), S[-1], rtol=1e-10, atol=1e-10)


def test_the_released_start_has_the_stated_deviation():
    cores = [torch.empty(shape) for shape in trains.core_shapes([8, 8, 12, 8], 5)]
    found = []
    for _ in range(40):
        for core in cores:
            trains.draw(core, 776, 4)
        found.append(trains.dense(cores, 768).square().mean())
    torch.testing.assert_close(torch.stack(found).mean().sqrt().item(), 776**-0.5, rtol=0.15, atol=0)


# ---- LoRA in tensor trains


@pytest.mark.parametrize(
    "arguments",
    [{"tt_rank": 1}, {"in_modes": [3, 16], "out_modes": [2, 3, 4]}, {"rank": 3, "tt_rank": 2, "in_modes": [48]}],
)
def test_tensor_train_variants(arguments):
    build = testing.builder(TensorTrain, nn.Linear(48, 24).double(), **arguments)
    testing.check_contract(build)
    testing.check_cost(testing.builder(TensorTrain, nn.Linear(48, 24), **arguments))


def test_printed_count_of_a_factor_pair():
    """1,160 numbers a matrix of RoBERTa-base, against LoRA's 12,288 of the same rank."""
    model = meta(ROBERTA, 12)
    adapt(model, "all-linear", lambda base: TensorTrain(base, in_modes=[8, 8, 12], out_modes=[12, 8, 8]))
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


def test_tensor_train_errors():
    with pytest.raises(ValueError, match="init='nonsense' is unknown; use 'zero_last' or 'released'"):
        TensorTrain(nn.Linear(48, 24), init="nonsense")
    with pytest.raises(ValueError, match=r"in_modes=\[5, 7\] does not multiply to 48; use \[6, 8\], or leave it out"):
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
    testing.check_low_precision(testing.builder(TensorTrainAdapter, nn.Linear(48, 24).bfloat16(), **arguments))


def test_count_of_an_adapter():
    """[8, 8, 12 | 8, 8] with bonds of 5: 1,560 numbers in cores, and the biases, which the paper's table may leave out."""
    model = meta({"output": (768, 768)}, 1)
    adapt(model, "all-linear", lambda base: TensorTrainAdapter(base, modes=[8, 8, 12]))
    layer = model[0]["output"]
    assert [tuple(core.shape) for core in layer.cores("D")] == [(1, 8, 5), (5, 8, 5), (5, 12, 5), (5, 8, 5), (5, 8, 1)]
    assert total(model) == 1_560 + 64 + 768


@pytest.mark.parametrize("position", ["output", "input"])
def test_the_released_start_of_an_adapter(position):
    build = testing.builder(TensorTrainAdapter, nn.Linear(48, 24).double(), init="released", position=position)
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
    with pytest.raises(ValueError, match="TensorTrainAdapter has no dense form and cannot be merged"):
        merge(nn.Sequential(layer))
    with pytest.raises(ValueError, match=r"put TensorTrainAdapter outermost, \[HyperAdapt, TensorTrainAdapter\]"):
        HyperAdapt(TensorTrainAdapter(nn.Linear(48, 24)))


def test_adapter_errors():
    with pytest.raises(ValueError, match="init='nonsense' is unknown; use one of zero_last, released"):
        TensorTrainAdapter(nn.Linear(48, 24), init="nonsense")
    with pytest.raises(ValueError, match="position='middle' is unknown; use one of output, input"):
        TensorTrainAdapter(nn.Linear(48, 24), position="middle")
    with pytest.raises(ValueError, match=r"modes=\[5\] does not multiply to 24; use \[4, 6\]"):
        TensorTrainAdapter(nn.Linear(48, 24), modes=[5])
    with pytest.raises(ValueError, match="bottleneck=0, tt_rank=5"):
        TensorTrainAdapter(nn.Linear(48, 24), bottleneck=0)
