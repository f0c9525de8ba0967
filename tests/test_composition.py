"""Operators on changes against dense references, and adapters composed on a base."""

import copy
import json
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptrank import adapt, compose, load_adapter, merge, save_adapter
from adaptrank.composition.changes import (
    Dense,
    Product,
    inner,
    rank_for,
    shared_ranks,
    total,
    truncated,
)
from adaptrank.composition.compression import Compression
from adaptrank.composition.operators import OPERATORS, options_of
from adaptrank.composition.similarity import Similarity, pair_lines, sign_conflict
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    Kronecker,
    LNTune,
    LoRA,
    MELoRA,
    PiCa,
    SBoRA,
    wrapped_layers,
)
from adaptrank.testing import perturb

SHAPE = (24, 40)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def product(rank, seed, shape=SHAPE):
    random = torch.Generator().manual_seed(seed)
    m, n = shape
    return Product(
        torch.randn(m, rank, generator=random, dtype=torch.float64),
        torch.randn(rank, n, generator=random, dtype=torch.float64),
    )


def regauged(change, seed=9):
    """Return the same matrix with other factors."""
    T = torch.randn(
        change.rank, change.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return Product(change.U @ T, torch.linalg.solve(T, change.V))


THREE = [product(3, 0), product(5, 1), product(1, 2)]


# ---- changes


@given(st.lists(st.tuples(st.integers(1, 6), st.floats(-3, 3)), min_size=1, max_size=4))
def test_sums_of_products_are_exact(parts):
    changes = [product(rank, i) for i, (rank, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    whole = total(changes, weights)
    assert isinstance(whole, Product)
    assert whole.rank == sum(rank for rank, _ in parts)
    want = sum(w * c.dense() for c, w in zip(changes, weights, strict=True))
    torch.testing.assert_close(whole.dense(), want, **EXACT)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("second", [0, 1])
def test_inner_products_and_norms_are_those_of_the_matrices(first, second):
    a, b = product(3, 0), product(7, 1)
    forms = [a, Dense(a.dense())][first], [b, Dense(b.dense())][second]
    assert math.isclose(inner(*forms), float((a.dense() * b.dense()).sum()), rel_tol=1e-12)
    assert math.isclose(forms[0].norm(), float(a.dense().norm()), rel_tol=1e-12)


def test_the_spectrum_of_a_product_is_that_of_its_matrix():
    change = product(5, 3)
    small, whole = change.spectrum, Dense(change.dense()).spectrum
    torch.testing.assert_close(small.S, whole.S[:5], **EXACT)
    torch.testing.assert_close(small.U, whole.U[:, :5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(small.Vh, whole.Vh[:5], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((small.U * small.S) @ small.Vh, change.dense(), **EXACT)


@pytest.mark.parametrize("rank", [1, 3, 5, 8])
def test_compression_is_the_best_of_its_rank_and_says_its_error(rank):
    change = product(5, 4)
    small = truncated(change, rank)
    U, S, Vh = torch.linalg.svd(change.dense())
    torch.testing.assert_close(
        small.dense(), (U[:, :rank] * S[:rank]) @ Vh[:rank], rtol=1e-9, atol=1e-9
    )
    error = float((small.dense() - change.dense()).norm())
    assert math.isclose(error, float(S[rank:].norm()), rel_tol=1e-8, abs_tol=1e-9)
    torch.testing.assert_close(small.U.norm(dim=0), small.V.norm(dim=1))


def test_the_rank_for_an_energy_or_an_error():
    change = Dense(torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5])).double())
    squares = torch.tensor([16, 4, 1, 0.25]).double()
    assert rank_for(change, energy=float(squares[:2].sum() / squares.sum())) == 2
    assert rank_for(change, energy=0.999) == 4
    assert rank_for(change, error=math.sqrt(0.25 / 21.25) + 1e-9) == 3
    assert rank_for(change, energy=1e-9) == 1
    assert rank_for(Dense(torch.zeros(3, 4)), energy=0.5) == 1


def test_a_shared_budget_goes_where_the_energy_is():
    strong = Product(100 * product(4, 0).U, product(4, 0).V)
    weak = product(4, 1)
    ranks = shared_ranks([strong, weak], budget=5 * sum(SHAPE))
    assert ranks == [4, 1]
    with pytest.raises(ValueError, match="one direction for each of 2 layers"):
        shared_ranks([strong, weak], budget=sum(SHAPE))


# ---- operators


def dense_ties(matrices, weights, density, elect="total"):
    """TIES entry by entry, as the paper describes it."""
    trimmed = []
    for D in matrices:
        flat = D.flatten().tolist()
        order = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))[
            : math.ceil(density * len(flat))
        ]
        trimmed.append([v if i in set(order) else 0.0 for i, v in enumerate(flat)])
    out = []
    for entries in zip(*trimmed, strict=True):
        voted = [w * v for w, v in zip(weights, entries, strict=True)]
        vote = sum(voted) if elect == "total" else sum((v > 0) - (v < 0) for v in voted)
        sign = -1 if vote < 0 else 1
        agree = [v for v in voted if v * sign > 0]
        out.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(out, dtype=torch.float64).view_as(matrices[0])


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
def test_ties_is_what_the_paper_says_entry_by_entry(density, elect):
    weights = (1.0, 0.5, -2.0)
    have = OPERATORS["ties"](THREE, weights, density=density, elect=elect).dense()
    torch.testing.assert_close(
        have, dense_ties([c.dense() for c in THREE], weights, density, elect), **EXACT
    )


def test_ties_can_divide_by_weights_and_scale():
    one = product(2, 5)
    mean = OPERATORS["ties"]([one, one], (1.0, 3.0), density=1.0).dense()
    torch.testing.assert_close(mean, 2 * one.dense(), **EXACT)
    by_weights = OPERATORS["ties"](
        [one, one], (1.0, 3.0), density=1.0, normalize="weights", scale=0.5
    ).dense()
    torch.testing.assert_close(by_weights, 0.5 * one.dense(), **EXACT)


FULL = {
    "sum": {},
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
    "dare_ties": {"drop": 0.0},
    "magnitude_prune": {"density": 1.0},
    "knots": {"density": 1.0},
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_one_adapter_alone_is_itself_its_scale_applied_once(operator):
    layer = LoRA(nn.Linear(40, 24).double(), rank=4, alpha=8.0)
    perturb(layer)
    change = Product(*layer.low_rank())
    assert layer.scale == 2
    have = OPERATORS[operator]([change, THREE[1]], (1.0, 0.0), "k", **FULL[operator]).dense()
    torch.testing.assert_close(have, layer.dense() - layer.base_weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("operator", OPERATORS)
def test_no_operator_depends_on_how_a_product_is_factored(operator):
    options = {"drop": 0.3} if "dare" in operator else {} if operator == "sum" else {"density": 0.4}
    weights = (1.0, -0.5, 2.0)
    one = OPERATORS[operator](THREE, weights, "k", **options).dense()
    two = OPERATORS[operator]([regauged(c) for c in THREE], weights, "k", **options).dense()
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-7)


def test_dare_is_the_sum_in_its_mean_and_a_function_of_its_seed():
    weights = (1.0, -0.5, 2.0)
    drawn = [
        OPERATORS["dare"](THREE, weights, "k", drop=0.5, seed=seed).dense() for seed in range(2000)
    ]
    mean, want = torch.stack(drawn).mean(0), total(THREE, weights).dense()
    deviation = torch.stack(drawn).std(0) / math.sqrt(2000)
    assert ((mean - want).abs() / deviation).max() < 5
    assert torch.equal(drawn[3], OPERATORS["dare"](THREE, weights, "k", drop=0.5, seed=3).dense())
    assert not torch.equal(
        drawn[3], OPERATORS["dare"](THREE, weights, "other", drop=0.5, seed=3).dense()
    )
    twins = OPERATORS["dare"]([THREE[0], THREE[0]], (1.0, -1.0), "k", drop=0.5).dense()
    assert twins.abs().max() > 0, "each adapter draws its own"


def test_magnitude_pruning_keeps_the_largest():
    D = THREE[1].dense()
    have = OPERATORS["magnitude_prune"]([Dense(D)], (1.0,), density=0.1).dense()
    assert int((have != 0).sum()) == math.ceil(0.1 * D.numel())
    assert have.abs()[have != 0].min() >= D.abs()[have == 0].max()


@pytest.mark.parametrize("dense", [False, True])
def test_knots_with_the_sum_is_the_sum_and_both_routes_agree(dense):
    changes = [Dense(c.dense()) for c in THREE] if dense else THREE
    weights = (1.0, -0.5, 2.0)
    have = OPERATORS["knots"](changes, weights, within="sum").dense()
    torch.testing.assert_close(have, total(THREE, weights).dense(), rtol=1e-10, atol=1e-10)
    merged = OPERATORS["knots"](changes, weights, within="ties", density=0.5)
    assert merged.rank <= 9
    by_hand = _knots_by_hand([c.dense() for c in THREE], weights, 0.5)
    torch.testing.assert_close(merged.dense(), by_hand, rtol=1e-8, atol=1e-8)


def _knots_by_hand(matrices, weights, density):
    U, S, Vh = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    kept = 1e-9 * S[0] < S
    blocks = [S[kept, None] * block[kept] for block in Vh.split([D.shape[1] for D in matrices], 1)]
    return U[:, kept] @ dense_ties(blocks, weights, density)


@pytest.mark.parametrize(
    ("operator", "options", "sentence"),
    [
        ("ties", {"density": 0.0}, "density=0.0: above 0, and at most 1"),
        ("ties", {"elect": "x"}, "elect='x': one of total, frequency"),
        ("dare", {"drop": 1.0}, "drop=1.0: a probability of at least 0 and below 1"),
        ("knots", {"within": "knots"}, "within='knots': one of sum, ties"),
    ],
)
def test_options_out_of_range(operator, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        OPERATORS[operator](THREE, (1.0, 1.0, 1.0), **options)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="sum has no option 'density'; it has none"):
        options_of("sum", {"density": 0.2})
    with pytest.raises(ValueError, match="knots has no option 'drop'; it has within, cut, density"):
        options_of("knots", {"drop": 0.2})
    with pytest.raises(ValueError, match="trim='all': one of whole, layer"):
        options_of("ties", {"trim": "all"})


def test_options_are_filled_up_with_their_defaults():
    assert options_of("magnitude_prune", {"density": 0.5}) == {"density": 0.5, "trim": "layer"}
    inner = {"within": "dare", "cut": 1e-9, "drop": 0.2, "seed": 0}
    assert options_of("knots", {"within": "dare", "drop": 0.2}) == inner
    assert options_of("knots", {})["trim"] == options_of("ties", {})["trim"] == "whole"


# ---- how adapters lie to each other


def similar(*changes, **arguments):
    found = Similarity([str(i) for i in range(len(changes))], **arguments)
    found.add("layer", changes, 2.0)
    return found.report()


def test_an_adapter_beside_itself_and_its_negative():
    a = product(3, 0)
    same, opposite = similar(a, a)["pairs"][0], similar(a, a.scaled(-1))["pairs"][0]
    for pair, cosine in ((same, 1), (opposite, -1)):
        assert math.isclose(pair["rms_cos"], 1, rel_tol=1e-12)
        assert math.isclose(pair["signed_mean"], cosine, rel_tol=1e-12)
        assert math.isclose(pair["global_cos"], cosine, rel_tol=1e-12)
        assert math.isclose(pair["left_overlap"], 1, rel_tol=1e-9)
        assert math.isclose(pair["norm_ratio"], 1, rel_tol=1e-12)
    layer = similar(a, a.scaled(-1))["layers"]["layer"]
    assert math.isclose(layer["interference"], 1, abs_tol=1e-12)
    assert math.isclose(layer["relative"][0], a.norm() / 2)


def test_random_changes_are_near_the_null_and_one_start_is_near_the_other():
    side, pairs = 128, 60
    free, tied = Similarity(["a", "b"]), Similarity(["a", "b"])
    for i in range(pairs):
        a, b = (product(4, 2 * i + j, (side, side)) for j in (0, 1))
        free.add(str(i), [a, b])
        tied.add(str(i), [a, Product(b.U, a.V)])
    free, tied = free.report()["pairs"][0], tied.report()["pairs"][0]
    assert math.isclose(free["null"], 1 / side)
    assert math.isclose(tied["null_one_start"], 1 / math.sqrt(4 * side))
    assert 0.7 < free["rms_cos"] / free["null"] < 1.3
    assert 0.7 < tied["rms_cos"] / tied["null_one_start"] < 1.4
    assert math.isclose(tied["right_overlap"], 1, rel_tol=1e-9)
    assert free["right_overlap"] < 0.1


def test_sign_conflicts():
    a = product(3, 0)
    assert sign_conflict(a, a) == 0
    assert sign_conflict(a, a.scaled(-1)) == 1
    assert similar(a, product(3, 1), signs=True)["pairs"][0]["sign_conflict"] == sign_conflict(
        a, product(3, 1)
    )


def test_layers_of_one_adapter_alone_and_changes_of_nothing():
    found = Similarity(["a", "b", "c"])
    found.add("one", [product(2, 0), None, None], 1.0)
    found.add("nothing", [product(2, 0), product(2, 0).scaled(0), None], 1.0)
    report = found.report()
    assert [pair["layers"] for pair in report["pairs"]] == [0, 0, 0]
    assert report["layers"]["one"]["norm"][1:] == [None, None]
    assert report["rms_cos"] is None
    assert len(list(pair_lines(report))) == 4
    json.dumps(report)


# ---- adapters on a base


class Base(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 12), nn.Linear(12, 12, bias=False)
        self.third = Conv1D(8, 12)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.to(dtype)

    def forward(self, x):
        return self.head(self.norm(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


LAYERS = ["first", "second", "third"]


def made(folder, method, seed, targets="first|second|third", head=False, dtype=torch.float64):
    """A trained adapter in a folder, and the changes of its layers."""
    model = Base(dtype)
    torch.manual_seed(seed)
    adapt(model, targets, method, train_modules=["head"] if head else [])
    perturb(model, 0.2, seed)
    save_adapter(model, folder)
    base = Base(dtype)
    weights = {path: layer.dense() for path, layer in wrapped_layers(model).items()}
    changes = {path: W - _matrix(base.get_submodule(path)) for path, W in weights.items()}
    return folder, changes


def _matrix(layer):
    return layer.weight.detach().T if isinstance(layer, Conv1D) else layer.weight.detach()


LORA2, LORA5 = partial(LoRA, rank=2, alpha=4.0), partial(LoRA, rank=5, alpha=64.0)


def result(model):
    base = Base(next(model.parameters()).dtype)
    return {
        path: wrapped_layers(model)[path].dense() - _matrix(base.get_submodule(path))
        for path in wrapped_layers(model)
    }


@pytest.mark.parametrize("weights", [None, (1.0, 1.0), (0.5, -2.0)])
@pytest.mark.parametrize(
    "second", [LORA5, partial(SVD, rank=3), partial(SBoRA, rank=4), partial(MELoRA, minis=4), PiCa]
)
def test_a_sum_of_products_is_one_lora_exactly(tmp_path, second, weights):
    a, one = made(tmp_path / "a", LORA2, 1)
    b, two = made(tmp_path / "b", second, 2, targets="first|second")
    model = Base()
    report = compose(model, [a, b], weights)
    v, w = weights or (1.0, 1.0)
    for path, have in result(model).items():
        torch.testing.assert_close(
            have, v * one[path] + (w * two[path] if path in two else 0), **EXACT
        )
    assert {type(layer) for layer in wrapped_layers(model).values()} == {LoRA}
    assert report["layers"]["third"]["rank"] == 2
    assert not any(p.requires_grad for p in model.parameters())
    save_adapter(model, tmp_path / "c")
    again = load_adapter(Base(), tmp_path / "c")
    x = torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(again(x), model(x))
    assert all(layer.scale == 1 for layer in wrapped_layers(again).values())


def test_the_order_of_adapters_changes_nothing_in_delta_space(tmp_path):
    a, _ = made(tmp_path / "a", HyperAdapt, 1)
    b, _ = made(tmp_path / "b", LORA5, 2)
    x = torch.randn(5, 16, dtype=torch.float64)
    outputs = []
    for folders in ([a, b], [b, a]):
        model = Base()
        compose(model, folders, merged=True)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, **EXACT)


@pytest.mark.parametrize("method", [HyperAdapt, DoRA, partial(Kronecker, rank=2)])
def test_other_parameterizations_add_up_in_delta_space(tmp_path, method):
    a, one = made(tmp_path / "a", method, 1)
    b, two = made(tmp_path / "b", LORA2, 2)
    model = Base()
    report = compose(model, [a, b], (1.0, 0.5), merged=True)
    for path in LAYERS:
        want = _matrix(Base().get_submodule(path)) + one[path] + 0.5 * two[path]
        torch.testing.assert_close(_matrix(model.get_submodule(path)), want, **EXACT)
    assert not wrapped_layers(model)
    assert all(facts["from_sum"] == 0 for facts in report["layers"].values())
    with pytest.raises(ValueError, match="no product of small factors; make it one with a rank"):
        compose(Base(), [a, b])


def test_a_matrix_becomes_a_lora_of_a_rank_with_its_error(tmp_path):
    a, one = made(tmp_path / "a", HyperAdapt, 1)
    b, two = made(tmp_path / "b", LORA2, 2)
    model = Base()
    report = compose(model, [a, b], compression=Compression(rank=3))
    for path, have in result(model).items():
        exact = one[path] + two[path]
        S = torch.linalg.svdvals(exact)
        error = float((have - exact).norm() / exact.norm())
        assert math.isclose(error, float(S[3:].norm() / S.norm()), rel_tol=1e-8)
        assert math.isclose(report["layers"][path]["error"], error, rel_tol=1e-8)


@pytest.mark.parametrize(
    "compression",
    [
        Compression(energy=0.9),
        Compression(error=0.4),
        Compression(parameters=150),
        Compression(rank=2),
    ],
)
@pytest.mark.parametrize("merged", [False, True])
def test_compressions(tmp_path, compression, merged):
    a, one = made(tmp_path / "a", LORA5, 1)
    b, two = made(tmp_path / "b", LORA2, 2)
    model = Base()
    report = compose(model, [a, b], compression=compression, merged=merged)
    if compression.error:
        assert all(facts["error"] <= 0.4 for facts in report["layers"].values())
    if compression.energy:
        assert all(facts["error"] ** 2 <= 0.1 + 1e-9 for facts in report["layers"].values())
    if compression.parameters and not merged:
        assert (
            sum(
                p.numel()
                for layer in wrapped_layers(model).values()
                for _, p in layer.own_parameters()
            )
            <= 150
        )
    for path in LAYERS:
        exact = one[path] + two[path]
        base = _matrix(Base().get_submodule(path))
        have = (
            _matrix(model.get_submodule(path)) if merged else wrapped_layers(model)[path].dense()
        ) - base
        assert math.isclose(
            float((have - exact).norm() / exact.norm()),
            report["layers"][path]["error"],
            rel_tol=1e-6,
            abs_tol=1e-9,
        )


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "sum"])
def test_every_operator_on_adapters(tmp_path, operator):
    a, one = made(tmp_path / "a", LORA5, 1)
    b, two = made(tmp_path / "b", LORA2, 2)
    model = Base()
    layerwise = {} if operator == "dare" else {"trim": "layer"}
    compression = Compression(error=1e-9)
    report = compose(model, [a, b], operator=operator, compression=compression, **layerwise)
    for path, have in result(model).items():
        changes = [Dense(one[path]), Dense(two[path])]
        want = OPERATORS[operator](changes, (1.0, 1.0), path).dense()
        torch.testing.assert_close(have, want, rtol=1e-7, atol=1e-7)
        off = float((want - one[path] - two[path]).norm() / (one[path] + two[path]).norm())
        assert math.isclose(report["layers"][path]["from_sum"], off, rel_tol=1e-6)


# ---- orders


def _hyper(folder):
    model = load_adapter(Base(), folder)
    return wrapped_layers(model)


def test_a_lora_in_a_hyperadapt_and_a_hyperadapt_in_a_lora(tmp_path):
    h, changed = made(tmp_path / "h", HyperAdapt, 1)
    d, delta = made(tmp_path / "d", LORA2, 2)
    outside, inside = Base(), Base()
    compose(outside, [h, d], mode="sequential", order=[1, 0])  # LoRA inside
    compose(inside, [h, d], mode="sequential", order=[0, 1])
    for path, layer in _hyper(h).items():
        W, D = _matrix(Base().get_submodule(path)), delta[path]
        H = lambda M, layer=layer, W=W: M * (layer.dense() / W)  # noqa: E731  diag(p) M diag(q), entry by entry
        first, second = result(outside)[path], result(inside)[path]
        torch.testing.assert_close(first, changed[path] + H(D), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            second, changed[path] + D, rtol=1e-9, atol=1e-9
        )  # the sum in delta space
        torch.testing.assert_close(first - second, H(D) - D, rtol=1e-8, atol=1e-9)


def test_two_hyperadapts_commute_and_are_not_their_sum(tmp_path):
    a, one = made(tmp_path / "a", HyperAdapt, 1)
    b, two = made(tmp_path / "b", HyperAdapt, 2)
    results = []
    for order in ([0, 1], [1, 0]):
        model = Base()
        compose(model, [a, b], mode="sequential", order=order)
        results.append(result(model))
    for path in LAYERS:
        torch.testing.assert_close(results[0][path], results[1][path], **EXACT)
        W = _matrix(Base().get_submodule(path))
        extra = one[path] * two[path] / W  # W M_1 M_2
        torch.testing.assert_close(
            results[0][path] - one[path] - two[path], extra, rtol=1e-8, atol=1e-9
        )


def test_an_order_is_asked_for_where_it_matters_and_the_result_is_a_file(tmp_path):
    h, _ = made(tmp_path / "h", HyperAdapt, 1)
    d, _ = made(tmp_path / "d", LORA2, 2)
    with pytest.raises(ValueError, match=r"HyperAdapt may read the weight .* order=\[0, 1\]"):
        compose(Base(), [h, d], mode="sequential")
    model = Base()
    compose(
        model, [d, made(tmp_path / "e", LORA5, 3)[0]], mode="sequential"
    )  # of two LoRAs it does not
    model = Base()
    report = compose(model, [h, d], mode="sequential", order=[0, 1])
    assert report["order"] == ["h", "d"]
    save_adapter(model, tmp_path / "c")
    x = torch.randn(4, 16, dtype=torch.float64)
    assert torch.equal(load_adapter(Base(), tmp_path / "c")(x), model(x))


# ---- what does not add up


def test_refusals_leave_the_model_as_it_was(tmp_path):
    a, _ = made(tmp_path / "a", LORA2, 1)
    b, _ = made(tmp_path / "b", LORA5, 2, head=True)
    n, _ = made_norm(tmp_path / "n")
    other = Base()
    with torch.no_grad():
        other.second.weight += 1
    adapt(other, "first", LORA2)
    save_adapter(other, tmp_path / "other")
    h, _ = made(tmp_path / "h", HyperAdapt, 5)
    cases = [
        (([a, tmp_path / "other"],), {}, "adapters add up on one base only"),
        (([b, b],), {}, "trained head.* whole, and there is no sum of such modules"),
        (([a, n],), {}, "LNTune at norm changes no single matrix"),
        (([],), {}, "There is no adapter to compose"),
        (([a, a], (1.0,)), {}, "1 weights for 2 adapters"),
        (([a, a], (1.0, math.nan)), {}, "finite numbers"),
        (([a, a], None, "tie"), {}, "operator='tie' is unknown. Did you mean 'ties'"),
        (([a, a], None, "sum"), {"density": 0.5}, "sum has no option 'density'"),
        (([a, a],), {"mode": "x"}, "mode='x' is unknown"),
        (([a, a],), {"others": "x"}, "others='x' is unknown"),
        (([a, a],), {"order": [0, 1]}, "order is for mode='sequential'"),
        (([a, a],), {"mode": "sequential", "order": [0, 0]}, "each of 0 to 1 once"),
        (([a, a], (1.0, 2.0)), {"mode": "sequential"}, "nests the adapters as they are"),
        (([a, h],), {}, "no product of small factors"),
        (
            ([a, h],),
            {"compression": Compression(parameters=3)},
            "one direction for each of 3 layers",
        ),
    ]
    for arguments, options, sentence in cases:
        model = Base()
        before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
        with pytest.raises(ValueError, match=sentence):
            compose(model, *arguments, **options)
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(ValueError, match="starts from the base alone"):
        compose(load_adapter(Base(), a), [a])
    for wrong, sentence in (
        ({"rank": 1, "energy": 0.5}, "rank and energy were given"),
        ({"rank": 0}, "rank=0"),
        ({"error": 2}, "error=2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Compression(**wrong)


def made_norm(folder):
    model = Base()
    adapt(model, "norm", LNTune)
    perturb(model)
    save_adapter(model, folder)
    return folder, None


@pytest.mark.parametrize("others", ["first", "average", "drop"])
def test_modules_trained_whole_follow_the_policy(tmp_path, others):
    a, _ = made(tmp_path / "a", LORA2, 1, head=True)
    b, _ = made(tmp_path / "b", LORA2, 2, head=True)
    heads = [load_adapter(Base(), folder).head.weight.detach() for folder in (a, b)]
    model = Base()
    compose(model, [a, b], (1.0, 3.0), others=others)
    want = {
        "first": heads[0],
        "average": (heads[0] + 3 * heads[1]) / 4,
        "drop": Base().head.weight,
    }[others]
    torch.testing.assert_close(model.head.weight, want, **EXACT)
    save_adapter(model, tmp_path / "c")
    assert torch.equal(load_adapter(Base(), tmp_path / "c").head.weight, model.head.weight)


def test_a_composed_adapter_merges_and_composes_again(tmp_path):
    a, one = made(tmp_path / "a", LORA2, 1)
    b, two = made(tmp_path / "b", LORA5, 2)
    model = Base()
    compose(model, [a, b])
    save_adapter(model, tmp_path / "ab")
    again = Base()
    compose(again, [tmp_path / "ab", b], (1.0, -1.0))
    for path, have in result(again).items():
        torch.testing.assert_close(have, one[path], **EXACT)
    merged = merge(model)
    for path in LAYERS:
        want = _matrix(Base().get_submodule(path)) + one[path] + two[path]
        torch.testing.assert_close(_matrix(merged.get_submodule(path)), want, **EXACT)


@pytest.mark.parametrize("merged", [False, True])
def test_parts_of_a_fused_layer(tmp_path, merged):
    from transformers import GPT2Config, GPT2LMHeadModel

    def base():
        torch.manual_seed(0)
        return (
            GPT2LMHeadModel(
                GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=8)
            )
            .double()
            .eval()
        )

    for seed, name in enumerate("ab"):
        model = adapt(base(), r".*c_attn\.[qv]", partial(LoRA, rank=2), split_fused=True)
        perturb(model, 0.3, seed)
        save_adapter(model, tmp_path / name)
    ids = torch.arange(6)[None]
    both = load_adapter(load_adapter(base(), tmp_path / "a", "a"), tmp_path / "b", "b")
    model = base()
    compose(model, [tmp_path / "a", tmp_path / "b"], merged=merged)
    torch.testing.assert_close(model(ids).logits, both(ids).logits, rtol=1e-9, atol=1e-9)
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D) == merged
    plain, keys = base(), set(base().state_dict())
    with pytest.raises(ValueError, match="one direction for each"):
        compose(
            plain,
            [tmp_path / "a", tmp_path / "b"],
            compression=Compression(parameters=2),
            merged=merged,
        )
    assert set(plain.state_dict()) == keys
    assert torch.equal(plain(ids).logits, base()(ids).logits)


def test_a_weak_change_merged_into_half_precision_is_reported(tmp_path, caplog):
    a, _ = made(tmp_path / "a", partial(LoRA, rank=2, alpha=1e-3), 1, dtype=torch.bfloat16)
    compose(Base(torch.bfloat16), [a, a], merged=True)
    assert "of the change to rounding" in caplog.text


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_factor_by_factor_is_no_sum(seed):
    """Why there is no operator on factors: adding A to A and B to B adds the cross terms."""
    a, b = product(2, seed), product(2, seed + 1)
    wrong = (a.U + b.U) @ (a.V + b.V)
    right = total([a, b], (1, 1)).dense()
    assert float((wrong - right).norm() / right.norm()) > 0.5
