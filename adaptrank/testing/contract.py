"""The contract of a parameterization, from all of its clauses.

Each clause is a function of a builder. It raises AssertionError with a sentence, and can be called
by itself. All run in float64 on `cls.example()` unless they say otherwise.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptrank.parameterizations import Parameterization
from adaptrank.testing.assertions import assert_close
from adaptrank.testing.bases import (
    Build,
    Sample,
    builder,
    conv1d,
    example_bases,
    normal_input,
    output,
    perturb,
)
from adaptrank.testing.costs import check_cost
from adaptrank.testing.emptying import check_emptying
from adaptrank.testing.forward import (
    check_definition,
    check_exact_gradients,
    check_gradients,
    check_identity,
    check_low_precision,
    check_penalty,
    check_switch,
    check_training,
)
from adaptrank.testing.storage import (
    check_arguments,
    check_copies,
    check_factors,
    check_indices,
    check_merged,
    check_state_dict,
)
from adaptrank.testing.units import (
    check_gate_gradient,
    check_gates,
    check_growth,
    check_limits,
    check_parameter_count,
    check_pruning,
)


def check_parameterization(
    cls: type[Parameterization],
    *,
    sample: Sample | None = None,
    count: Callable[..., int] | None = None,
) -> None:
    """Run the whole contract on `cls.example()` and on a layer of every other kind it accepts.

    A linear layer is taken with its bias and without.

    Args:
        cls: the method, with default arguments.
        sample: draws inputs. The default is the method's `example_input`.
        count: (m, n) -> number of trainable parameters with default arguments, the paper's closed
            formula. It has no arguments if the layer is no matrix.

    Raises:
        AssertionError: says which clause does not hold.
    """
    sample = sample or normal_input
    bases = example_bases(cls)
    for base in bases:
        build = builder(cls, base)
        check_contract(build, sample, count)
        check_emptying(build, sample)
        if base is bases[0]:
            check_gradients(builder(cls, base, **cls.exact_gradient), sample)
            check_cost(builder(cls, copy.deepcopy(base).float()), sample)
        check_low_precision(builder(cls, copy.deepcopy(base).to(torch.bfloat16)), sample)
    check_conv1d_twin(cls, sample)
    check_refusal(cls)


def check_contract(
    build: Build, sample: Sample = normal_input, count: Callable[..., int] | None = None
) -> None:
    """Check every clause about one wrapper in float64.

    The wrapper may have any arguments and wrap anything.
    """
    check_identity(build, sample)
    check_definition(build, sample)
    check_exact_gradients(build, sample)
    check_training(build, sample)
    check_parameter_count(build, count)
    check_pruning(build, sample)
    check_growth(build, sample)
    check_limits(build)
    check_gate_gradient(build, sample)
    check_gates(build, sample)
    check_merged(build, sample)
    check_factors(build)
    check_state_dict(build, sample)
    check_indices(build)
    check_copies(build, sample)
    check_switch(build, sample)
    check_arguments(build)
    check_penalty(build)


def check_conv1d_twin(
    cls: type[Parameterization],
    sample: Sample = normal_input,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Check that a method is the same over Conv1D, whose weight is stored transposed."""
    base = example_bases(cls)[0]
    if not isinstance(base, nn.Linear) or Conv1D not in cls.accepts:
        return
    linear = builder(cls, base, **(arguments or {}))()
    twin = builder(cls, conv1d(base), **(arguments or {}))()
    assert twin.shape == linear.shape, (
        f"{cls.__name__} over Conv1D says {twin.shape}, over Linear {linear.shape}."
    )
    for layer in (linear, twin):
        perturb(layer)
    x = sample(linear, (2, 3))
    assert_close(
        output(twin, x),
        output(linear, x),
        f"{cls.__name__} over Conv1D computes something else than over Linear.",
    )
    if cls.mergeable:
        assert_close(
            twin.weight,
            linear.weight,
            f"{cls.__name__}.weight over Conv1D is not that over Linear.",
        )


def check_refusal(cls: type[Parameterization]) -> None:
    """Check that a layer of another kind is refused by name."""
    sentence = ""
    try:
        cls(nn.Flatten())
    except TypeError as error:
        sentence = str(error)
    assert sentence, f"{cls.__name__} wraps an nn.Flatten."
    assert "Flatten" in sentence, (
        f"{cls.__name__} refuses a layer without saying which kind it is: {sentence}"
    )
