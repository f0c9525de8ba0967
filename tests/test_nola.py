"""What only NOLA promises."""

import copy
import math

import pytest
import torch
from test_hyperadapt import meta
from test_lora import LLAMA_7B, total
from torch import nn

from adaptrank import testing
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import NOLA
from adaptrank.parameterizations import nola as module
from adaptrank.testing import builder, perturb


def drawn(layer, side, ids):
    shape = layer.matrix_shape(side)
    return torch.stack([module._draw(int(layer.seed), side, j, shape) for j in ids]).double()


def test_closed_count():
    testing.check_parameter_count(builder(NOLA, nn.Linear(48, 24)), lambda m, n: 32 + 32)


@pytest.mark.parametrize(
    "arguments",
    [
        {"rank": 3, "k_a": 10, "k_b": 6, "chunk": 4},
        {"rank": 3, "k_a": 10, "k_b": 6, "chunk": 4, "materialize": True},
        {"rank": 2, "k_a": 5, "k_b": 7, "init": "paper"},
        {"rank": 2, "k_a": 5, "k_b": 7, "init": "released"},
    ],
)
def test_variants(arguments):
    base = testing.example_bases(NOLA)[0]
    build = builder(NOLA, base, **arguments)
    testing.check_contract(build, count=lambda m, n: arguments["k_a"] + arguments["k_b"])
    testing.check_cost(builder(NOLA, copy.deepcopy(base).float(), **arguments))
    testing.check_low_precision(builder(NOLA, copy.deepcopy(base).to(torch.bfloat16), **arguments))
    testing.check_conv1d_twin(NOLA, arguments=arguments)


LLAMA_2_70B = {
    **dict.fromkeys("qo", (8192, 8192)),
    **dict.fromkeys("kv", (1024, 8192)),
    **dict.fromkeys(("gate", "up"), (28672, 8192)),
    "down": (8192, 28672),
}


@pytest.mark.parametrize(
    ("shapes", "blocks", "count"),
    [
        (LLAMA_2_70B, 80, 573_440),
        ({"q": (1024, 1024), "v": (1024, 1024)}, 24, 49_152),
        (LLAMA_7B, 32, 163_840),
    ],
)
def test_printed_counts_and_nothing_is_drawn_on_the_meta_device(shapes, blocks, count, monkeypatch):
    monkeypatch.setattr(module, "_draw", None)
    model = adapt(
        meta(shapes, blocks),
        "all-linear",
        lambda base: NOLA(base, k_a=512, k_b=512, materialize=True),
    )
    assert total(model) == count


def test_a_layer_of_the_meta_device_gets_its_matrices_when_it_is_loaded():
    one, two = NOLA(nn.Linear(48, 24)), NOLA(nn.Linear(48, 24, device="meta"))
    perturb(one)
    two.load_state_dict(one.state_dict(), assign=True)
    x = torch.randn(3, 48)
    assert torch.equal(two(x), one(x))


def test_a_unit_of_either_side_costs_one_number():
    layer = NOLA(nn.Linear(48, 24))
    assert [
        cost_model(layer).marginal(axis, {":alpha": 32, ":beta": 32})
        for axis in (":alpha", ":beta")
    ] == [1, 1]


def test_the_formula_written_out():
    layer = NOLA(nn.Linear(48, 24).double(), rank=3, alpha=6, k_a=10, k_b=6)
    perturb(layer)
    A = layer.A0 + torch.einsum("k,krn->rn", layer.alpha, drawn(layer, "a", range(10))) / math.sqrt(
        10
    )
    B = torch.einsum("k,kmr->mr", layer.beta, drawn(layer, "b", range(6))) / math.sqrt(6)
    torch.testing.assert_close(layer.weight, layer.base.weight + 2 * B @ A, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_coefficients_are_products_with_those_of_lora():
    layer = NOLA(nn.Linear(48, 24).double(), rank=3, alpha=3, k_a=10, k_b=6, chunk=4)
    perturb(layer)
    x = torch.randn(5, 48).double()
    layer(x).square().sum().backward()
    bases_a, bases_b = (
        drawn(layer, "a", range(10)) / math.sqrt(10),
        drawn(layer, "b", range(6)) / math.sqrt(6),
    )
    A = (layer.A0 + torch.einsum("k,krn->rn", layer.alpha, bases_a)).detach().requires_grad_()
    B = torch.einsum("k,kmr->mr", layer.beta, bases_b).detach().requires_grad_()
    (layer.base(x) + x @ A.T @ B.T).square().sum().backward()
    torch.testing.assert_close(
        layer.alpha.grad, (bases_a * A.grad).sum((1, 2)), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        layer.beta.grad, (bases_b * B.grad).sum((1, 2)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_materialized_matrices_are_the_drawn_ones_to_the_bit(dtype):
    x, found = torch.randn(5, 48, dtype=dtype), []
    base = nn.Linear(48, 24).to(dtype)
    for materialize in (False, True):
        layer = builder(NOLA, base, k_a=40, k_b=20, chunk=16, materialize=materialize)()
        perturb(layer)
        y = layer(x)
        y.square().sum().backward()
        found.append((y, layer.alpha.grad, layer.beta.grad))
        assert (layer.bases_a is not None) == materialize
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_global_random_numbers_are_left_alone_and_do_not_matter():
    layer = NOLA(nn.Linear(48, 24))
    perturb(layer)
    x = torch.randn(5, 48)
    state = torch.get_rng_state()
    y = layer(x)
    y.sum().backward()
    layer.refresh()
    _ = layer.weight
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(layer(x), y)


def test_layers_differ_and_a_seed_repeats_them():
    one, two = NOLA(nn.Linear(48, 24)), NOLA(nn.Linear(48, 24))
    assert one.seed != two.seed
    torch.manual_seed(0)
    first = NOLA(nn.Linear(48, 24)).seed
    torch.manual_seed(0)
    assert NOLA(nn.Linear(48, 24)).seed == first


def test_a_matrix_is_its_seed_its_side_and_its_number_for_ever():
    """Saved adapters hold nothing else: were these numbers others, each of them would be another
    adapter."""
    torch.testing.assert_close(
        module._draw(3, "a", 5, (2, 2)),
        torch.tensor([[-0.5490400791, -0.4616463184], [-0.5176324844, 0.2349183559]]),
        rtol=0,
        atol=1e-9,
    )
    others = [(3, "a", 5), (3, "b", 5), (3, "a", 6), (4, "a", 5)]
    assert len({module._draw(*each, (2, 2)).sum().item() for each in others}) == 4
    assert len({module._draw(1, "a", j, (4, 4)).sum().item() for j in range(512)}) > 500


def test_what_is_saved_is_the_seed_and_the_numbers_of_the_matrices():
    layer = NOLA(nn.Linear(48, 24), materialize=True)
    assert set(layer.state_dict()) == {
        "alpha",
        "beta",
        "seed",
        "ids_a",
        "ids_b",
        "base.weight",
        "base.bias",
    }
    assert layer.state_dict()["seed"].dtype == layer.ids_a.dtype == torch.int64


@pytest.mark.parametrize("materialize", [False, True])
def test_growth_and_pruning_leave_the_other_matrices_and_the_scale(materialize):
    layer = NOLA(nn.Linear(48, 24).double(), k_a=6, k_b=6, materialize=materialize)
    perturb(layer)
    axis = rank_axes(layer)[":alpha"]
    axis.resize([4, 1], 3, generator(0, ":alpha", 1))
    ids = layer.ids_a.tolist()
    assert ids[:2] == [4, 1]
    assert len(set(ids)) == 5
    assert min(ids[2:]) > 6
    assert layer.c == (6**-0.5, 6**-0.5)
    perturb(layer)
    x = torch.randn(3, 48).double()
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-10, atol=1e-10)


def test_a_backward_pass_after_a_resize_is_that_of_its_forward():
    layer = NOLA(nn.Linear(48, 24).double(), k_a=6, k_b=6)
    perturb(layer)
    x = torch.randn(3, 48, requires_grad=True, dtype=torch.float64)
    (want,) = torch.autograd.grad(layer(x).square().sum(), x)
    loss = layer(x).square().sum()
    rank_axes(layer)[":alpha"].resize([0, 3])
    torch.testing.assert_close(torch.autograd.grad(loss, x)[0], want, rtol=0, atol=0)


def test_inits():
    base = nn.Linear(48, 24).double()
    anchored, paper, released = (
        NOLA(copy.deepcopy(base), init=init) for init in ("anchored", "paper", "released")
    )
    x = torch.randn(5, 48).double()
    assert anchored.A0.abs().max() <= 1 / math.sqrt(48)
    assert not anchored.alpha.any()
    assert paper.A0 is released.A0 is None
    assert paper.alpha.all()
    assert not paper.beta.any()
    assert torch.equal(anchored(x), base(x))
    assert torch.equal(paper(x), base(x))
    assert not torch.equal(released(x), base(x))
    assert set(released.alpha.tolist()) == {1 / 32}
    for layer, waits in ((anchored, True), (paper, True), (released, False)):
        layer(x).square().sum().backward()
        assert layer.beta.grad.any()
        assert layer.alpha.grad.any() != waits


def test_memory_does_not_grow_with_the_number_of_matrices():
    """What is kept for the backward pass is A and B, not what they were made of."""
    layer, kept = NOLA(nn.Linear(48, 24), k_a=256, k_b=256), []
    own = {t.data_ptr() for t in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(2, 48))
    assert max(t.numel() for t in kept if t.data_ptr() not in own) <= 8 * 48


def test_dropout_is_on_the_way_to_a_only():
    layer = NOLA(nn.Linear(48, 24), dropout=0.5)
    x = torch.randn(5, 48)
    assert torch.equal(layer(x), layer.base(x))
    perturb(layer)
    assert not torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("name", ["rank", "k_a", "k_b", "chunk"])
def test_nothing_to_sum_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0.*use 1 or more of each"):
        NOLA(nn.Linear(48, 24), **{name: 0})
