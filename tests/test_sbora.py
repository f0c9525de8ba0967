"""Tests of SBoRA beside the common contract."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_hyperadapt import meta
from test_lora import LLAMA_7B, total
from torch import nn

from adaptrank import testing
from adaptrank.artifacts import load_adapter, merge, save_adapter, unmerge
from adaptrank.axes import generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import SBoRA

LLAMA3_8B = {
    "q": (4096, 4096),
    "k": (1024, 4096),
    "v": (1024, 4096),
    "up": (14336, 4096),
    "down": (4096, 14336),
}


def build(base=None, **arguments):
    layer = SBoRA(base or nn.Linear(48, 24).double(), **arguments)
    testing.perturb(layer)
    return layer


def test_closed_count():
    testing.check_parameter_count(testing.builder(SBoRA, nn.Linear(48, 24)), lambda m, n: 8 * m)


@pytest.mark.parametrize(
    "arguments", [{"variant": "fb"}, {"variant": "fb", "rank": 24}, {"rank": 48}], ids=str
)
def test_the_contract_of_variants(arguments):
    for base in testing.example_bases(SBoRA):
        testing.check_contract(testing.builder(SBoRA, base, **arguments))
        testing.check_cost(testing.builder(SBoRA, copy.deepcopy(base).float(), **arguments))
        testing.check_low_precision(
            testing.builder(SBoRA, copy.deepcopy(base).bfloat16(), **arguments)
        )
    testing.check_conv1d_twin(SBoRA, arguments=arguments)


@pytest.mark.parametrize(
    ("shapes", "variant", "count"),
    [
        (LLAMA_7B, "fa", 28_049_408),
        (LLAMA_7B, "fb", 28_049_408),
        (LLAMA3_8B, "fa", 25_165_824),
        (LLAMA3_8B, "fb", 31_457_280),
    ],
)
def test_printed_counts(shapes, variant, count):
    model = adapt(
        meta(shapes, 32), "all-linear", lambda base: SBoRA(base, rank=32, alpha=64, variant=variant)
    )
    assert total(model) == count


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_it_is_lora_with_a_factor_of_the_identity(variant):
    layer = build(rank=5, alpha=10, variant=variant)
    if variant == "fa":
        change = 2 * layer.B @ torch.eye(48, dtype=torch.float64)[layer.index]
    else:
        change = 2 * torch.eye(24, dtype=torch.float64)[:, layer.index] @ layer.A
    torch.testing.assert_close(layer.weight - layer.base.weight, change, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", ["fa", "fb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_leaves_every_other_row_or_column_to_the_bit(variant, dtype):
    model = adapt(
        nn.Sequential(nn.Linear(48, 24)).to(dtype),
        "all-linear",
        lambda base: SBoRA(base, variant=variant),
    )
    testing.perturb(model, 0.3)
    index, dim = model[0].index.tolist(), 1 if variant == "fa" else 0
    before = model[0].base.weight.detach().clone()
    merge(model, keep_originals=True)
    touched = (model[0].weight != before).any(1 - dim).nonzero().flatten().tolist()
    assert touched == index
    unmerge(model)
    assert torch.equal(model[0].base.weight, before)


@pytest.mark.parametrize(("variant", "most"), [("fa", 48), ("fb", 24)])
def test_no_position_is_ever_drawn_twice(variant, most):
    layer = build(variant=variant)
    axis = rank_axes(layer)[":rank"]
    for step in range(20):
        axis.resize(
            range(step % 3, len(axis)),
            min(4, axis.limits()[1] - len(axis)),
            generator(0, axis.key, step),
        )
        assert len(set(layer.index.tolist())) == len(axis)
    axis.resize(grow=most - len(axis), generator=generator(0, axis.key, 20))
    assert sorted(layer.index.tolist()) == list(range(most))
    with pytest.raises(ValueError, match=f"holds at most {most} units"):
        axis.resize(grow=1)


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_fresh_positions_depend_on_the_generator_alone(variant):
    def drawn(seed):
        layer = testing.builder(SBoRA, nn.Linear(48, 24), variant=variant)()
        torch.manual_seed(seed)
        rank_axes(layer)[":rank"].resize(grow=3, generator=generator(1, "a", 2))
        return layer.index

    assert torch.equal(drawn(0), drawn(1))


def test_the_first_positions_come_from_the_global_seed_for_each_layer_anew():
    def drawn():
        torch.manual_seed(3)
        return [SBoRA(nn.Linear(48, 24)).index.tolist() for _ in range(2)]

    assert drawn() == drawn()
    assert drawn()[0] != drawn()[1]
    with torch.device("meta"):
        assert SBoRA(nn.Linear(48, 24)).index.is_meta


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_units_are_orthogonal_so_that_their_squares_add(variant):
    layer = build(variant=variant)
    change = layer.weight - layer.base.weight
    factor = layer.B if variant == "fa" else layer.A.T
    torch.testing.assert_close(
        change.square().sum(), (layer.scale * factor.norm(dim=0)).square().sum()
    )


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_every_number_has_a_gradient_at_once(variant):
    layer = SBoRA(nn.Linear(48, 24), variant=variant)
    layer(torch.randn(5, 48)).square().sum().backward()
    assert (layer.B if variant == "fa" else layer.A).grad.abs().min() > 0


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_a_cast_leaves_the_positions_alone(variant):
    layer = SBoRA(nn.Linear(300, 300), variant=variant, rank=300)  # bfloat16 has no 257
    assert torch.equal(layer.to(torch.bfloat16).index, torch.arange(300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_keep_their_slice_of_the_input_alone(dtype):
    layer = SBoRA(nn.Linear(48, 24).to(dtype), dropout=0.5)
    x, kept = torch.randn(1000, 48, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x)
    assert {t.shape[-1] for t in kept if t.shape[0] == 1000} == {8}


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_dropout_is_on_the_way_to_the_factor_only_and_off_in_evaluation(variant):
    layer = SBoRA(nn.Linear(48, 24), dropout=0.5, variant=variant)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    testing.perturb(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5
    )


def test_an_adapter_comes_back_with_its_positions(tmp_path):
    def model(seed):
        base = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 48)).double()
        base.load_state_dict(weights)
        torch.manual_seed(seed)
        return base

    weights = nn.Sequential(nn.Linear(48, 24), nn.Linear(24, 48)).double().state_dict()
    one = adapt(model(1), "all-linear", lambda base: SBoRA(base, variant="fb"))
    testing.perturb(one)
    rank_axes(one)["0:rank"].resize([1, 2], 3, generator(0, "0:rank", 1))
    save_adapter(one, tmp_path)
    x = torch.randn(3, 48, dtype=torch.float64)
    assert torch.equal(load_adapter(model(2), tmp_path)(x), one(x))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rank": 0}, "rank=0 does not fit a layer of 48 columns; use 1 to 48"),
        ({"rank": 49}, "use 1 to 48"),
        ({"rank": 25, "variant": "fb"}, "rank=25 does not fit a layer of 24 rows; use 1 to 24"),
        ({"variant": "FA"}, "variant='FA' is unknown; use 'fa'"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        SBoRA(nn.Linear(48, 24), **arguments)


def test_an_index_that_is_written_to_in_place_is_read():
    layer, x = SBoRA(nn.Linear(6, 4), rank=2), torch.randn(3, 6)
    nn.init.normal_(layer.B)
    layer(x)
    layer.index.copy_(torch.tensor([5, 1]))
    torch.testing.assert_close(layer(x), F.linear(x, layer.dense(), layer.bias))
