"""The contract, for every class in the registry and every nest of two."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from conftest import LINEAR_METHODS, METHODS
from torch import nn

import adaptrank
from adaptrank import testing
from adaptrank.axes import cost_model, generator, rank_axes
from adaptrank.parameterizations import PARAMETERIZATIONS, Parameterization, formula


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)
def test_contract(method):
    testing.check_parameterization(method)


def test_every_method_of_the_folder_says_what_it_costs(method):
    layer = method(method.example())
    stack = any(isinstance(module, nn.ModuleList) for module in layer.innermost.children())
    assert stack or layer.cost() is not None  # of a whole stack of layers it is no number a token


PAIRS = [(inner, outer) for inner in METHODS for outer in METHODS]


def bases(inner, outer):
    """What both can wrap; a nest of a norm and a matrix has none."""
    return [base for base in testing.example_bases(outer) if inner.wraps(base)]


def nest(inner, outer, base):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return outer(inner(copy.deepcopy(base)))

    return build


def whole_or_part(inner, outer):
    """Yield whether to test the whole contract of a nest.

    `make test` does so for nests with LoRA, nests around HyperAdapt, and a method in itself.
    """
    names = (inner.__name__, outer.__name__)
    is_common = inner is outer or "LoRA" in names or inner.__name__ == "HyperAdapt"
    name = "-".join(names)
    yield pytest.param(inner, outer, is_common, id=name)
    if not is_common:
        yield pytest.param(inner, outer, True, id=f"{name}-whole", marks=pytest.mark.tables)


NESTS = [case for pair in PAIRS for case in whole_or_part(*pair)]


@pytest.mark.parametrize(("inner", "outer", "whole"), NESTS)
def test_nests_of_two(inner, outer, whole):
    """The contract of a nest over the first base that both can wrap, and over all bases what it
    computes. What has no meaning is refused. `make tables` tests rare nests in full."""
    if not bases(inner, outer):
        with pytest.raises(TypeError, match=f"{outer.__name__} wraps"):
            outer(inner(inner.example()))
        return
    if outer.reads_weight and not inner.mergeable:
        with pytest.raises(ValueError, match=f"put {inner.__name__} outermost"):
            outer(inner(outer.example()))
        return
    for number, base in enumerate(bases(inner, outer)):
        if number and not whole:
            break
        build = nest(inner, outer, base)
        if number == 0 and whole:
            testing.check_contract(build)
        for check in (
            testing.check_identity,
            testing.check_definition,
            testing.check_exact_gradients,
        ):
            check(build)
        testing.check_low_precision(nest(inner, outer, copy.deepcopy(base).to(torch.bfloat16)))


LINEAR_PAIRS = [
    (i, o) for i in LINEAR_METHODS for o in LINEAR_METHODS if i.mergeable or not o.reads_weight
]


@pytest.mark.parametrize(("inner", "outer"), LINEAR_PAIRS, ids=lambda cls: cls.__name__)
def test_nests_over_conv1d(inner, outer):
    linear = testing.example_bases(outer)[0]
    one, two = nest(inner, outer, linear)(), nest(inner, outer, testing.conv1d(linear))()
    testing.perturb(one), testing.perturb(two)
    x = testing.normal_input(one, (2, 3))
    torch.testing.assert_close(two(x), one(x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(two.weight, one.weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growing_does_not_change_one_bit(method, dtype):
    """In whole numbers: how many columns a product has decides in which order a processor sums, and
    rounds, the others."""
    layer = method(method.example().to(dtype))
    testing.whole_numbers(layer)
    layer.load_state_dict(layer.state_dict())  # refreshes what derives from them
    x = testing.normal_input(layer, (7,))
    x = (4 * x).round() if x.is_floating_point() else x
    before = testing.output(layer, x)
    for key, axis in rank_axes(layer).items():
        room = axis.limits()[1]
        if "grow" in axis.capabilities and (room is None or room > len(axis)):
            axis.resize(grow=1, generator=generator(0, key, 1))
            assert torch.equal(testing.output(layer, x), before)


def test_leaving_a_wrapper_off_inside_a_nest_leaves_the_other(linear_method):
    method, base = linear_method, linear_method.example().double()
    inner = PARAMETERIZATIONS["LoRA"](copy.deepcopy(base))
    outer = method(inner)
    testing.perturb(outer)
    x = testing.normal_input(outer, (4,))
    inner.enabled = False
    torch.testing.assert_close(outer(x), outer.definition(x), rtol=1e-10, atol=1e-10)
    outer.enabled = False
    assert torch.equal(outer(x), base(x))


def test_the_weight_of_a_wrapper_looks_like_its_layers(linear_method):
    layer = linear_method(linear_method.example().to(torch.bfloat16))
    assert layer.weight.dtype == torch.bfloat16
    assert layer.dense().dtype == layer.base_weight.dtype == torch.float32


def test_gradient_checkpointing_gives_the_same_gradients(layer):
    testing.perturb(layer)
    x = testing.normal_input(layer, (4,))
    grads = []
    for checkpointed in (False, True):
        layer.zero_grad()
        y = (
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            if checkpointed
            else layer(x)
        )
        testing.first_tensor(y).square().sum().backward()
        grads.append([p.grad.clone() for p in testing.trainable(layer).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_row_of_zeros_stays_finite_and_equal_to_its_definition(linear_method):
    method, base = linear_method, linear_method.example().double()
    with torch.no_grad():
        base.weight[3] = 0
    layer = method(base)
    x = testing.normal_input(layer, (4,))
    assert layer.weight.isfinite().all()
    assert torch.equal(layer(x), base(x))
    torch.testing.assert_close(layer.weight, base.weight, rtol=1e-12, atol=1e-12)


def test_a_load_refreshes_what_derives_from_the_weight(linear_method):
    one, two = (linear_method(nn.Linear(48, 24).double()) for _ in range(2))
    testing.perturb(one)
    x = testing.normal_input(one, (4,))
    two(x)
    two.load_state_dict(one.state_dict())
    assert torch.equal(two(x), one(x))


# ---- the checks themselves see what is wrong


class Toy(Parameterization):
    """Abstract, for it has no formula: not in the registry."""


def broken(**overrides):
    """A LoRA with something wrong in it; every call makes a class of another name."""
    lora = PARAMETERIZATIONS["LoRA"]
    name = f"Broken{len(PARAMETERIZATIONS)}"
    globals()[name] = type(
        name, (lora,), {"__module__": __name__, **overrides}
    )  # where pickle looks for it
    return globals()[name]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"delta": lambda self, x, y: y * 1e-9 + 0 * (x @ self.A.T) @ self.B.T},
            "does not start at",
        ),
        ({"delta": lambda self, x, y: (x @ self.A.T) @ self.B.T}, "differs from `weight`"),
        (
            {"delta": lambda self, x, y: self.scale * (x @ self.A.T.detach()) @ self.B.T},
            "not that of the definition",
        ),
        ({"axes": {"rank": {"B": 1, "A": 0}}}, "zero"),
        ({"axes": {"rank": {"B": 1}}}, "cannot be multiplied"),
        ({"fresh": lambda self, axis, n, g: {"A": torch.zeros(n, 48)}}, "dead"),
        ({"fresh": lambda self, axis, n, g: {"A": torch.ones(48, n)}}, "fresh"),
        (
            {
                "zeros": lambda self, *s: nn.Parameter(
                    torch.zeros(*s, dtype=self.innermost.weight.dtype)
                )
            },
            r"A is torch\.bfloat16",
        ),
        ({"penalty": lambda self: self.A.sum(1)}, "must be one number"),
        ({"factors": lambda self: (self.scale * self.B, self.A)}, r"read .* self\.gated\('B'\)"),
        (
            {"weight": formula(lambda self: self.base_weight + self.scale * self.B @ self.A)},
            r"read .* self\.gated\('B'\)",
        ),
    ],
)
def test_a_broken_method_fails_with_a_sentence(overrides, sentence):
    with pytest.raises((AssertionError, ValueError, RuntimeError), match=sentence):
        testing.check_parameterization(broken(**overrides))


def test_arguments_that_are_no_plain_data_are_refused():
    def build():
        layer = PARAMETERIZATIONS["LoRA"](nn.Linear(48, 24))
        layer.init_args = {"rank": torch.float32}
        return layer

    with pytest.raises(AssertionError, match="init_args"):
        testing.check_arguments(build)


def test_two_classes_of_one_name_are_an_error():
    with pytest.raises(TypeError, match="Two parameterizations are called 'LoRA'"):
        type("LoRA", (Parameterization,), {"__module__": "elsewhere"})


def test_an_abstract_class_is_not_in_the_registry():
    assert "Toy" not in PARAMETERIZATIONS
    with pytest.raises(KeyError):
        PARAMETERIZATIONS["Toy"]


def test_an_attribute_error_in_a_formula_is_not_reported_as_a_missing_weight():
    cls = type(
        "Misspelt",
        (PARAMETERIZATIONS["LoRA"],),
        {"weight": formula(lambda self: self.base_weigth)},
    )
    with pytest.raises(RuntimeError, match=r"Misspelt\.weight failed: .*base_weigth"):
        _ = cls(nn.Linear(48, 24)).weight


def test_the_cost_of_a_method_without_an_axis_is_fixed(layer):
    on_axes = {
        id(slot.tensor) for axis in rank_axes(layer).values() for slot in axis.slots()
    }  # two may share a tensor
    tensors = testing.trainable(layer).values()
    assert cost_model(layer).fixed == sum(p.numel() for p in tensors if id(p) not in on_axes)


def test_imports_point_one_way():
    """parameterizations know nobody; axes and adapt know them; allocators know axes; nothing points
    back."""
    root = Path(adaptrank.__file__).parent
    may = {
        "registry": {"_errors"},
        "layers": {"_errors", "layers"},
        "ops": {"layers", "ops"},
        "parameterizations": {
            "_errors",
            "_files",
            "_options",
            "registry",
            "layers",
            "ops",
            "parameterizations",
        },
        "axes": {"_errors", "parameterizations", "axes"},
        "injection": {"_errors", "layers", "parameterizations", "axes", "injection"},
        "training": {"_collectives", "_errors", "parameterizations", "axes", "training"},
        "allocation": {
            "_collectives",
            "_errors",
            "_files",
            "_options",
            "registry",
            "parameterizations",
            "axes",
            "training",
            "checkpoints",
            "allocation",
        },
        "testing": {"layers", "parameterizations", "axes", "testing"},
    }
    for part, allowed in may.items():
        files = (
            [root / f"{part}.py"]
            if (root / f"{part}.py").exists()
            else sorted((root / part).rglob("*.py"))
        )
        assert files
        for file in files:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "adaptrank."
                ):
                    assert node.module.split(".")[1] in allowed, (
                        f"{file.name} imports {node.module}"
                    )


def test_a_model_cast_after_it_was_adapted_still_runs(method):
    """`precision="bf16-true"` casts adapters too: a poor idea, of which the module warns, but no
    crash."""
    layer = method(method.example()).to(torch.bfloat16)
    testing.output(layer, testing.normal_input(layer, (2,))).float().sum().backward()
