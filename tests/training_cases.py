"""Layers of every method, of its variants, and of nests, for tests that run over all of them.

Kinds of layers, words of an argument and switches are found in the method itself. So a new method,
or a new variant, has its cases without a new line. What only a number decides stands in `NUMBERS`.
"""

import copy
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import METHODS
from torch import Tensor, nn

from adaptrank import testing
from adaptrank.parameterizations import PARAMETERIZATIONS, Parameterization

NUMBERS: dict[str, list[dict[str, Any]]] = {
    "AttentionScale": [{"form": "lite", "tokens": 4}, {"form": "full", "tokens": 4}],
    "Kronecker": [{"rank": 1}],
    "LoKr": [{"rank": 1, "factor": [8, 8], "decompose_both": True}],
    "MELoRA": [{"rank": 9}, {"rank": [1, 2, 3, 1, 1, 1, 1, 1]}],
    "MiSS": [{"rank": 5, "period": 7}],
    "MultiScale": [{"orth": 0.0}],
    "NEAT": [{"depth": 2}],
    "Prefix": [{"encoder": 8}],
    "SVD": [{"orth": 0.0}],
    "TensorTrain": [{"in_modes": [48], "out_modes": [24]}],
}
"""Method -> arguments with which it takes another path, where no word and no switch says so."""

NESTS = [
    ("HyperAdapt", "LoRA"),
    ("HyperAdapt", "SVD"),
    ("LoRA", "DoRA"),
    ("LoRA", "HyperAdapt"),
    ("HyperAdapt", "NOLA"),
    ("SVD", "LoRA"),
    ("LoRA", "NEAT"),
    ("HyperAdapt", "DoRA", "TensorTrainAdapter"),
    ("ResidualOffset", "HyperAdapt"),
    ("LoRA", "LoKr", "LoRA"),
]
"""Nests, the innermost method first."""

FEW_TOKENS, MANY_TOKENS = (2, 3), (4, 16)
"""Leading dimensions of an input. From as many tokens as the second has, some methods build a
matrix of the size of the layer."""


@dataclass(frozen=True)
class Case:
    """A layer that trains, and the shape of its input."""

    name: str
    methods: tuple[type[Parameterization], ...]
    base: nn.Module
    arguments: dict[str, Any] = field(default_factory=dict)
    leading: tuple[int, ...] = FEW_TOKENS

    def build(self, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Parameterization:
        """Build the layer on the CPU, in training mode, with tensors that are not at their start.

        Args:
            dtype: dtype of the frozen layer.
            dropout: probability of every method that drops elements.
        """
        layer = copy.deepcopy(self.base).to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            for method in self.methods:
                drops = "dropout" in _arguments_of(method)
                more = {"dropout": dropout} if drops and dropout else {}
                layer = method(
                    layer, **(self.arguments if method is self.methods[0] else {}), **more
                )
        testing.perturb(layer)
        return layer.train()

    def sample(self, layer: Parameterization) -> Tensor:
        """Return an input on the CPU, which takes a gradient if it can."""
        x = testing.normal_input(layer, self.leading)
        return x.requires_grad_() if x.is_floating_point() else x


def method_cases() -> list[Case]:
    """Return every method over every kind of layer, with many tokens, and in its variants."""
    return [case for method in METHODS for case in _cases_of(method)]


def default_cases() -> list[Case]:
    """Return every method with its default arguments over its example."""
    return [next(_cases_of(method)) for method in METHODS]


def nest_cases() -> list[Case]:
    """Return the nests of `NESTS` over a linear layer."""
    cases = []
    for names in NESTS:
        methods = tuple(PARAMETERIZATIONS[name] for name in names)
        cases.append(Case("+".join(names), methods, nn.Linear(48, 24)))
    return cases


def _cases_of(method: type[Parameterization]) -> Iterator[Case]:
    name, bases = method.__name__, testing.example_bases(method)
    for base in bases:
        bare = "" if getattr(base, "bias", None) is not None else ", no bias"
        yield Case(f"{name} over {type(base).__name__}{bare}", (method,), base)
    yield Case(f"{name}, many tokens", (method,), bases[0], leading=MANY_TOKENS)
    for arguments in [*_words_and_switches(method), *NUMBERS.get(name, [])]:
        words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        yield Case(f"{name}({words})", (method,), bases[0], arguments)
    if method.wraps(norm := nn.RMSNorm(48)):
        yield Case(f"{name} over RMSNorm", (method,), norm)


def _words_and_switches(method: type[Parameterization]) -> Iterator[dict[str, Any]]:
    """Yield each word and each switch of a method that is not its default and can stand alone."""
    for argument, parameter in _arguments_of(method).items():
        annotation = parameter.annotation
        if annotation is bool:
            choices: tuple[Any, ...] = (not parameter.default,)
        elif typing.get_origin(annotation) is typing.Literal:
            choices = tuple(w for w in typing.get_args(annotation) if w != parameter.default)
        else:
            continue
        # A form of AttentionScale needs a number of tokens, which `NUMBERS` gives.
        given = NUMBERS.get(method.__name__, [])
        for choice in choices:
            if not any(arguments.get(argument) == choice for arguments in given):
                yield {argument: choice}


def _arguments_of(method: type[Parameterization]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(method.__init__, eval_str=True)
    return {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


def loss_of(layer: Parameterization, x: Tensor) -> Tensor:
    """Return a loss of every output, with the penalties of all methods."""
    loss = testing.output(layer, x).float().square().sum()
    for wrapper in layer.nest:
        penalty = wrapper.penalty()
        if penalty is not None:
            loss = loss + penalty
    return loss


def ids(case: Case) -> str:
    """Return the name of a case for a test id."""
    return case.name.replace(" ", "-")
