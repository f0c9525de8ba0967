"""Tests of NOLA beside the common contract."""

import copy
import hashlib
import math

import pytest
import torch
from test_hyperadapt import meta
from test_lora import LLAMA_7B, total
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from adaptrank import testing
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.injection import adapt
from adaptrank.parameterizations import NOLA
from adaptrank.parameterizations import nola as module
from adaptrank.parameterizations.nola import DRAWS
from adaptrank.testing import builder, perturb


def drawn(layer, side):
    return torch.stack([*layer.matrices(side)]).double()


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
    monkeypatch.setattr(module, "random_rows", None)
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
    A = layer.A0 + torch.einsum("k,krn->rn", layer.alpha, drawn(layer, "a")) / math.sqrt(10)
    B = torch.einsum("k,kmr->mr", layer.beta, drawn(layer, "b")) / math.sqrt(6)
    torch.testing.assert_close(layer.weight, layer.base.weight + 2 * B @ A, rtol=1e-12, atol=1e-12)


def test_gradients_of_the_coefficients_are_products_with_those_of_lora():
    layer = NOLA(nn.Linear(48, 24).double(), rank=3, alpha=3, k_a=10, k_b=6, chunk=4)
    perturb(layer)
    x = torch.randn(5, 48).double()
    layer(x).square().sum().backward()
    bases_a, bases_b = (
        drawn(layer, "a") / math.sqrt(10),
        drawn(layer, "b") / math.sqrt(6),
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


class Operations(TorchDispatchMode):
    """Lists the names of the operations that are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def operations(**arguments):
    layer = NOLA(nn.Linear(48, 24), **arguments)
    perturb(layer)
    with Operations() as recorded:
        layer(torch.randn(5, 48)).sum().backward()
    return recorded.names


def test_a_chunk_takes_the_same_operations_however_many_matrices_it_has():
    assert operations(k_a=4, k_b=4, chunk=4) == operations(k_a=64, k_b=64, chunk=64)
    kept = operations(materialize=True)
    assert not any("xor" in name for name in kept)


@pytest.mark.parametrize("materialize", [False, True])
def test_nothing_is_read_from_the_device(materialize):
    """A tensor without values raises an error where a number of it is asked for."""
    layer = NOLA(nn.Linear(48, 24), k_a=40, k_b=20, chunk=16, materialize=materialize)
    with FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(5, 48)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_matrices_are_summed_in_float32_under_autocast(dtype):
    """They hold whole numbers up to 2^23, which are infinite in float16."""
    layer = NOLA(nn.Linear(48, 24))
    perturb(layer)
    A, B = layer.factors()[::-1]
    with torch.autocast("cpu", dtype):
        under_autocast = layer.factors()[::-1]
        under_autocast[0].square().sum().backward()
    assert torch.equal(under_autocast[0], A)
    assert torch.equal(under_autocast[1], B)
    grad, layer.alpha.grad = layer.alpha.grad, None
    A.square().sum().backward()
    assert torch.equal(layer.alpha.grad, grad)


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


WORD = (1 << 64) - 1


def mixed(value):
    """Return a hash of 64 bits, in numbers of Python: the twin of what tensors compute."""
    value = (value + 1) * 0x9E3779B97F4A7C15 & WORD
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & WORD
    return value ^ value >> 31


def number(seed, stream, j, row, column):
    """Return one number of a random matrix, in numbers of Python."""
    key = mixed(mixed(mixed(mixed(seed) + stream) + j) + row)
    low, high = key & 0xFFFFFFFF, key >> 32 | 1
    bits = (mixed(column) >> 32 ^ low) * high >> 8 & 0xFFFFFF
    return (bits - (bits >> 23 << 24)) / 2**23


@pytest.mark.parametrize("seed", [DRAWS, DRAWS + 12345678901234567, 2 * DRAWS - 2])
def test_a_number_is_a_hash_of_seed_side_matrix_row_and_column(seed):
    """Saved adapters hold nothing else: were the numbers others, each would be another adapter."""
    layer = NOLA(nn.Linear(7, 5), rank=2, k_a=3, k_b=2)
    ids = [0, 77, DRAWS - 1]
    layer.load_state_dict(
        layer.state_dict()
        | {"seed": torch.tensor(seed), "ids_a": torch.tensor(ids), "ids_b": torch.tensor(ids[1:])}
    )
    of_a = [[[number(seed, 1, j, i, c) for c in range(7)] for i in range(2)] for j in ids]
    of_b = [[[number(seed, 2, j, i, c) for i in range(2)] for c in range(5)] for j in ids[1:]]
    of_A0 = [[number(seed, 0, 0, i, c) for c in range(7)] for i in range(2)]
    assert torch.equal(drawn(layer, "a"), torch.tensor(of_a).double())
    assert torch.equal(drawn(layer, "b"), torch.tensor(of_b).double())
    assert torch.equal(layer.A0, torch.tensor(of_A0) / math.sqrt(7))


def uniformity(values, bins=256):
    """Return how far a chi-square of values in [-1, 1) is from its mean, in standard deviations."""
    counts = torch.bincount(((values + 1) / 2 * bins).long().flatten(), minlength=bins).double()
    expected = values.numel() / bins
    chi_square = ((counts - expected) ** 2 / expected).sum()
    return (chi_square.item() - (bins - 1)) / math.sqrt(2 * (bins - 1))


def dependence(one, two):
    """Return how far correlation and joint distribution are from independence, in deviations."""
    correlation = 3 * (one * two).mean().item() * math.sqrt(one.numel())
    cells = ((one + 1) * 8).floor() * 16 + ((two + 1) * 8).floor()
    return max(abs(correlation), abs(uniformity(cells / 128 - 1)))


def test_numbers_are_uniform_and_independent():
    """Neighbours are compared: matrices, rows, columns, sides and seeds. The seed is fixed."""
    one, two = (NOLA(nn.Linear(128, 128), k_a=128, k_b=128) for _ in range(2))
    one.seed.fill_(DRAWS + 1)
    two.seed.fill_(DRAWS + 2)
    one.refresh()
    two.refresh()
    A, B = drawn(one, "a"), drawn(one, "b").transpose(1, 2)
    assert -1 <= A.min() < -0.9999
    assert 0.9999 < A.max() < 1
    assert abs(A.mean()) < 3 / math.sqrt(3 * A.numel())
    # The variance of u^2 is 4 / 45, where u is uniform in (-1, 1).
    assert abs(A.square().mean() - 1 / 3) < 3 * math.sqrt(4 / 45 / A.numel())
    assert abs(uniformity(A)) < 3
    neighbours = [
        (A[1:], A[:-1]),
        (A[:, 1:], A[:, :-1]),
        (A[..., 1:], A[..., :-1]),
        (A, B),
        (A, drawn(two, "a")),
    ]
    assert all(dependence(*pair) < 3.5 for pair in neighbours)


def test_random_matrices_span_as_many_directions_as_independent_ones():
    """The singular values lie where the law of Marchenko and Pastur has them."""
    layer = NOLA(nn.Linear(128, 8), k_a=256)
    layer.seed.fill_(DRAWS + 1)
    layer.refresh()
    values = torch.linalg.svdvals(drawn(layer, "a").flatten(1) * math.sqrt(3 / 1024))
    assert values[0] < 1.03 * (1 + 0.5)
    assert values[-1] > 0.97 * (1 - 0.5)


def generated(seed, side, j, shape):
    """Return a matrix as version 0.1 drew it."""
    digest = hashlib.blake2b(f"{seed}/{side}/{j}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.empty(shape).uniform_(-1, 1, generator=generator)


@pytest.mark.parametrize("materialize", [False, True])
def test_tensors_of_an_earlier_version_keep_their_matrices(materialize):
    """A seed below 2^62 is that of an earlier version. It has other matrices."""
    layer = NOLA(nn.Linear(48, 24), rank=3, k_a=5, k_b=4, chunk=2, materialize=materialize)
    perturb(layer)
    present = copy.deepcopy(layer.state_dict())
    layer.load_state_dict(present | {"seed": torch.tensor(DRAWS - 1)})
    of_a = torch.stack([generated(DRAWS - 1, "a", j, (3, 48)) for j in range(5)])
    of_b = torch.stack([generated(DRAWS - 1, "b", j, (24, 3)) for j in range(4)])
    A = generated(DRAWS - 1, "A0", 0, (3, 48)) / math.sqrt(48)
    A = A + torch.einsum("k,krn->rn", layer.alpha, of_a) / math.sqrt(5)
    B = torch.einsum("k,kmr->mr", layer.beta, of_b) / math.sqrt(4)
    x = torch.randn(3, 48)
    want = layer.base(x) + 8 / 3 * x @ A.T @ B.T
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.definition(x), want, rtol=1e-5, atol=1e-5)
    # A shrunken layer keeps them, too, and tensors of this version bring hashed ones back.
    rank_axes(layer)[":alpha"].resize([4, 1])
    assert torch.equal(torch.stack([*layer.matrices("a")]), of_a[[4, 1]])
    rank_axes(layer)[":alpha"].resize_to(5)
    layer.load_state_dict(present)
    assert not torch.equal(torch.stack([*layer.matrices("a")]), of_a)


def test_a_reader_of_an_earlier_version_refuses_new_tensors():
    """It takes seeds below 2^62 only, and would draw other matrices."""
    seeds = [int(NOLA(nn.Linear(8, 8), rank=1).seed) for _ in range(20)]
    assert min(seeds) >= DRAWS
    assert max(seeds) < 2**63


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
    assert (layer.c_a, layer.c_b) == (6**-0.5, 6**-0.5)
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


def test_kept_matrices_survive_a_cast_to_half_precision():
    torch.manual_seed(0)
    layer = NOLA(nn.Linear(12, 8), rank=2, materialize=True)
    nn.init.normal_(layer.alpha)
    nn.init.normal_(layer.beta)
    x = torch.randn(3, 12)
    want = layer(x)
    torch.testing.assert_close(layer.half()(x.half()).float(), want, rtol=2e-2, atol=2e-2)
