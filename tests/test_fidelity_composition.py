"""Composition against what its papers' releases compute, over several layers of unequal scale.

The references here work on whole task vectors: plain lists of all entries of all layers.
"""

import math
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from adaptrank import adapt, compose, save_adapter
from adaptrank.axes import rank_axes
from adaptrank.composition.changes import Dense, Product
from adaptrank.composition.operators import OPERATORS, options_of
from adaptrank.composition.trimming import kept_in_layers, kept_of, largest
from adaptrank.composition.whole_trims import whole_trims
from adaptrank.parameterizations import LoRA, wrapped_layers
from adaptrank.testing import perturb

EXACT = {"rtol": 1e-9, "atol": 1e-12}
SCALES = {"first": 1.0, "second": 0.1, "third": 0.003}
SHAPES = {"first": (12, 16), "second": (12, 12), "third": (8, 12)}


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name, (m, n) in SHAPES.items():
            setattr(self, name, nn.Linear(n, m, dtype=torch.float64))


def adapter(folder, seed, targets="first|second|third", rank=3):
    """An adapter whose layers differ in scale, in a folder, and its change of each layer."""
    model = Base()
    adapt(model, targets, partial(LoRA, rank=rank))
    perturb(model, 0.3, seed)
    for path, layer in wrapped_layers(model).items():
        layer.B.data *= SCALES[path]
    save_adapter(model, folder)
    layers = wrapped_layers(model).items()
    return folder, {path: (layer.dense() - layer.base_weight).detach() for path, layer in layers}


def composed(folders, weights=None, operator="ties", **options):
    """The report, and the composed change of each layer."""
    model, base = Base(), Base()
    report = compose(model, folders, weights, operator, merged=True, **options)
    return report, {p: getattr(model, p).weight - getattr(base, p).weight for p in SHAPES}


# ---- references


def flat(task):
    """The whole task vector: all entries of all layers, layer after layer."""
    return [value for D in task.values() for value in D.flatten().tolist()]


def trimmed_vector(vector, density):
    """Keep the largest entries by magnitude. Of equal ones the first stay."""
    order = sorted(range(len(vector)), key=lambda i: (-abs(vector[i]), i))
    kept = set(order[: math.ceil(density * len(vector))])
    return [value if i in kept else 0.0 for i, value in enumerate(vector)]


def ties_vector(vectors, scale=1.0):
    """TIES without the trim: a sign for each entry, zero sums by the majority, disjoint mean."""
    totals = [math.fsum(entries) for entries in zip(*vectors, strict=True)]
    majority = sum((total > 0) - (total < 0) for total in totals)
    result = []
    for total, entries in zip(totals, zip(*vectors, strict=True), strict=True):
        positive = (total or majority) > 0
        agreeing = [v for v in entries if v and (v > 0) == positive]
        result.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return result


def unflat(vector, shapes):
    parts = torch.tensor(vector, dtype=torch.float64).split([m * n for m, n in shapes.values()])
    return {path: p.view(shape) for p, (path, shape) in zip(parts, shapes.items(), strict=True)}


def ties_reference(tasks, density, scale=1.0):
    vectors = [trimmed_vector(flat(task), density) for task in tasks]
    return unflat(ties_vector(vectors, scale), SHAPES)


def bases_and_blocks(tasks):
    """KnOTS: the changes of a layer side by side along their inputs, one basis for each layer."""
    bases, blocks = {}, [{} for _ in tasks]
    for path in tasks[0]:
        U, S, Vh = torch.linalg.svd(torch.cat([t[path] for t in tasks], 1), full_matrices=False)
        U, S, Vh = U[:, S > 1e-8], S[S > 1e-8], Vh[S > 1e-8]
        bases[path] = U
        for part, task in zip(Vh.chunk(len(tasks), 1), blocks, strict=True):
            task[path] = torch.diag(S) @ part
    return bases, blocks


def knots_reference(tasks, density, scale=1.0):
    bases, blocks = bases_and_blocks(tasks)
    shapes = {path: block.shape for path, block in blocks[0].items()}
    merged = ties_vector([trimmed_vector(flat(task), density) for task in blocks], scale)
    return {path: bases[path] @ X for path, X in unflat(merged, shapes).items()}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    return [adapter(folder / str(seed), seed) for seed in (1, 2, 3)]


# ---- TIES and KnOTS-TIES


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize(
    ("operator", "reference"), [("ties", ties_reference), ("knots", knots_reference)]
)
def test_ties_trims_the_whole_task_vector(tasks, operator, reference, density):
    folders, changes = zip(*tasks, strict=True)
    report, have = composed(folders, operator=operator, density=density, scale=0.4)
    want = reference(changes, density, 0.4)
    for path in SHAPES:
        torch.testing.assert_close(have[path], want[path], **EXACT)
    assert report["options"]["trim"] == "whole"
    layerwise, by_layer = composed(
        folders, operator=operator, density=density, scale=0.4, trim="layer"
    )
    assert layerwise["options"]["trim"] == "layer"
    if density < 1:
        largest_layer = "first"
        apart = by_layer[largest_layer] - want[largest_layer]
        assert apart.norm() > 0.05 * want[largest_layer].norm()
    else:
        torch.testing.assert_close(by_layer, have)


def test_small_layers_lose_their_entries_only_where_all_layers_are_trimmed(tasks):
    folders = [folder for folder, _ in tasks]
    report, have = composed(folders, density=0.2)
    assert not have["third"].any()
    kept = [report["layers"][path]["kept"] for path in SHAPES]
    size = sum(m * n for m, n in SHAPES.values())
    assert [sum(counts) for counts in zip(*kept, strict=True)] == [math.ceil(0.2 * size)] * 3
    _, by_layer = composed(folders, density=0.2, trim="layer")
    assert by_layer["third"].any()


def test_layer_by_layer_is_the_reference_of_each_layer_alone(tasks):
    folders, changes = zip(*tasks, strict=True)
    _, have = composed(folders, density=0.3, trim="layer")
    for path, shape in SHAPES.items():
        alone = [trimmed_vector(flat({path: task[path]}), 0.3) for task in changes]
        want = unflat(ties_vector(alone), {path: shape})[path]
        torch.testing.assert_close(have[path], want, **EXACT)


def test_an_adapter_without_a_layer_is_trimmed_over_its_own(tasks, tmp_path):
    small, change = adapter(tmp_path / "small", 7, targets="second|third")
    _, have = composed([tasks[0][0], small], density=0.25)
    whole = trimmed_vector(flat(tasks[0][1]), 0.25)
    absent = torch.zeros(SHAPES["first"]).flatten().tolist()
    own = absent + trimmed_vector(flat(change), 0.25)
    want = unflat(ties_vector([whole, own]), SHAPES)
    for path in SHAPES:
        torch.testing.assert_close(have[path], want[path], **EXACT)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_zero_sum_takes_the_majority_of_the_whole_vector(sign):
    """Votes cancel in the first layer, and most entries of the second one have one sign."""
    one = {"a": torch.tensor([[1.0, 2.0]]), "b": sign * torch.tensor([[1.0, 2.0, 3.0]])}
    two = {"a": torch.tensor([[-1.0, 2.0]]), "b": sign * torch.tensor([[1.0, 2.0, -1.0]])}
    options = options_of("ties", {"density": 1.0})
    layers = [(path, [Dense(one[path]), Dense(two[path])]) for path in one]
    plans = whole_trims("ties", options, [1.0, 1.0], lambda: layers)
    have = {
        path: OPERATORS["ties"](changes, [1.0, 1.0], path, whole=plans[path], **options).dense()
        for path, changes in layers
    }
    assert have["a"].tolist() == [[sign, 2.0]]
    assert [v for D in have.values() for v in D.flatten().tolist()] == ties_vector(
        [flat(one), flat(two)]
    )
    alone = OPERATORS["ties"](layers[0][1], [1.0, 1.0], "a", **options).dense()
    assert alone.tolist() == [[1.0, 2.0]]


def test_dare_ties_trims_what_dare_left(tasks):
    """As DARE's release does with TIES: dropped entries count as zeros of the task vector."""
    folders, changes = zip(*tasks, strict=True)
    options = {"drop": 0.4, "seed": 3}
    _, have = composed(folders, operator="dare_ties", density=0.15, **options)
    dropped = [{} for _ in changes]
    for path in SHAPES:
        for i, task in enumerate(dropped):
            # The mask of each task, from DARE on this task alone.
            present = [Dense(change[path]) for change in changes]
            alone = [float(j == i) for j in range(len(changes))]
            task[path] = OPERATORS["dare"](present, alone, path, **options).dense()
    want = ties_reference(dropped, 0.15)
    for path in SHAPES:
        torch.testing.assert_close(have[path], want[path], **EXACT)
    _, untrimmed = composed(folders, operator="dare_ties", **options)
    want = unflat(ties_vector([flat(task) for task in dropped]), SHAPES)
    for path in SHAPES:
        torch.testing.assert_close(untrimmed[path], want[path], **EXACT)


def test_pruning_by_magnitude_can_trim_over_all_layers(tasks):
    folders, changes = zip(*tasks, strict=True)
    weights = (1.0, -0.5, 2.0)
    report, _ = composed(folders, weights, "magnitude_prune")
    assert report["options"] == {"density": 0.2, "trim": "layer"}
    _, have = composed(folders, weights, "magnitude_prune", density=0.2, trim="whole")
    vectors = [trimmed_vector(flat(task), 0.2) for task in changes]
    summed = [
        sum(w * v for w, v in zip(weights, entries, strict=True))
        for entries in zip(*vectors, strict=True)
    ]
    for path, want in unflat(summed, SHAPES).items():
        torch.testing.assert_close(have[path], want, **EXACT)


# ---- DARE, task arithmetic, SVD


@pytest.mark.parametrize("operator", ["dare", "knots"])
def test_dare_keeps_or_drops_each_entry_and_rescales(operator):
    torch.manual_seed(0)
    D = torch.randn(200, 300, dtype=torch.float64)
    if operator == "dare":
        entries = OPERATORS["dare"]([Dense(D)], [1.0], "k", drop=0.7).dense() / D
    else:
        # In KnOTS' basis, where one task has the blocks U^T D.
        U = torch.linalg.svd(D, full_matrices=False).U
        merged = OPERATORS["knots"]([Dense(D)], [1.0], "k", within="dare", drop=0.7).dense()
        entries = (U.T @ merged) / (U.T @ D)
    kept = (entries - 1 / 0.3).abs() < 1e-6
    assert torch.all(kept | (entries.abs() < 1e-6))
    assert abs(float(kept.double().mean()) - 0.3) < 5 * math.sqrt(0.21 / D.numel())


def test_task_arithmetic_is_the_scaled_sum(tasks):
    folders, changes = zip(*tasks, strict=True)
    _, have = composed(folders, [0.4] * 3, "sum")
    for path in SHAPES:
        want = 0.4 * sum(task[path] for task in changes)
        torch.testing.assert_close(have[path], want, **EXACT)


# ---- the selection


def magnitudes(draw, dtype):
    """Many equal magnitudes, of several sizes, and some that only float64 tells apart."""
    near = [1 + 2.0**-i for i in (30, 40, 52)]
    known = [0.0, 1.0, -1.0, 1.5, -3e-7, 2e5, *near]
    values = draw(st.lists(st.sampled_from(known), max_size=30))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    more = torch.randn(draw(st.integers(0, 30)), generator=random, dtype=torch.float64)
    return torch.cat([torch.tensor(values, dtype=torch.float64), more]).to(dtype)


@settings(max_examples=25, deadline=None)
@given(st.data(), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_the_selection_over_layers_is_that_of_a_sort(data, dtype):
    layers = [magnitudes(data.draw, dtype) for _ in range(data.draw(st.integers(1, 4)))]
    density = data.draw(st.sampled_from([1e-3, 0.1, 0.5, 0.97, 1.0]))
    kept = kept_in_layers(lambda: [(str(i), [D]) for i, D in enumerate(layers)], 1, density)
    have = [largest(D, kept[str(i)][0]).tolist() for i, D in enumerate(layers)]
    vector = [value for D in layers for value in D.tolist()]
    assert [value for D in have for value in D] == trimmed_vector(vector, density)


def test_magnitudes_that_only_float64_tells_apart():
    one, two = torch.tensor([[1, 1 + 2**-40], [-1 - 2**-52, 1 + 2**-30]], dtype=torch.float64)
    kept = kept_in_layers(lambda: [("a", [one]), ("b", [two])], 1, 0.5)
    assert kept == {"a": [1], "b": [1]}
    assert kept_in_layers(lambda: [("a", [one]), ("b", [two])], 1, 0.25) == {"a": [0], "b": [1]}


def test_the_passes_hold_no_more_than_two_layers():
    references, most = [], 0

    def layers():
        nonlocal most
        for i in range(6):
            D = torch.full((8, 8), float(i))
            references.append(weakref.ref(D))
            most = max(most, sum(reference() is not None for reference in references))
            yield str(i), [D]

    kept = kept_in_layers(layers, 1, 0.3)
    assert sum(counts[0] for counts in kept.values()) == math.ceil(0.3 * 6 * 64)
    assert most == 2


def test_products_of_factors_and_matrices_are_trimmed_alike():
    torch.manual_seed(0)
    parts = [(torch.randn(9, 2).double(), torch.randn(2, 7).double()) for _ in range(4)]
    products = [("a", [Product(*parts[0]), None]), ("b", [Product(*parts[1]), Product(*parts[2])])]
    dense = [(path, [c and Dense(c.dense()) for c in changes]) for path, changes in products]
    for operator in ("ties", "knots"):
        options = options_of(operator, {"density": 0.3})
        plans = [
            whole_trims(operator, options, [1.0, 1.0], lambda layers=layers: layers)
            for layers in (products, dense)
        ]
        assert plans[0] == plans[1]
        assert [len(plan.kept) for plan in plans[0].values()] == [1, 2]


@pytest.mark.parametrize("operator", ["ties", "dare_ties", "knots", "magnitude_prune"])
def test_layers_without_units_have_no_entries_in_the_task_vector(tmp_path, operator):
    """An adapter with an empty layer composes as the same adapter that never had the layer."""
    other, _ = adapter(tmp_path / "other", 2)
    emptied, smaller = Base(), Base()
    adapt(emptied, "first|second|third", partial(LoRA, rank=3))
    adapt(smaller, "second|third", partial(LoRA, rank=3))
    perturb(emptied, 0.3, 1)
    for name in ("second", "third"):
        getattr(smaller, name).load_state_dict(getattr(emptied, name).state_dict())
    rank_axes(emptied)["first:rank"].resize([])
    options = {"density": 0.4, "trim": "whole"} if operator != "knots" else {"density": 0.4}
    results = []
    for name, model in (("emptied", emptied), ("smaller", smaller)):
        save_adapter(model, tmp_path / name)
        report, changes = composed([tmp_path / name, other], operator=operator, **options)
        results.append((changes, report["layers"]["first"]["kept"]))
    (with_empty, kept), (without, kept_without) = results
    assert kept == kept_without
    assert all(torch.equal(with_empty[path], without[path]) for path in SHAPES)


@pytest.mark.parametrize(
    ("size", "density", "kept"),
    [(100, 0.07, 7), (100, 0.28, 28), (10000, 0.56, 5600), (10, 0.25, 3)],
)
def test_the_number_of_kept_entries_is_rounded_up_from_the_decimal_number(size, density, kept):
    assert kept_of(size, density) == kept


def test_changes_that_differ_from_pass_to_pass_are_refused():
    sizes = iter([8.0, 8.5, 1.0, 1.0, 1.0])

    def layers():
        yield "a", [torch.full((5, 5), next(sizes))]

    with pytest.raises(RuntimeError, match="differ from one pass"):
        kept_in_layers(layers, 1, 0.5)
