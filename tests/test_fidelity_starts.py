"""The start of each parameterization, against that of the authors' released code.

Tensors are compared by value, by bounds or by deviation. docs/fidelity.md names the sources.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn

from adaptrank.parameterizations import (
    NEAT,
    NOLA,
    SVD,
    AttentionScale,
    DoRA,
    HyperAdapt,
    Kronecker,
    LNTune,
    LoKr,
    LoRA,
    MELoRA,
    MiSS,
    MultiScale,
    PiCa,
    Prefix,
    ResidualOffset,
    SBoRA,
    TensorTrain,
    TensorTrainAdapter,
)


def uniform(bound):
    return ("uniform", bound)


def normal(std):
    return ("normal", std)


ZERO = normal(0.0)
N, M, WIDE = 384, 256, 384
TRAIN = {"in_modes": [16, 24], "out_modes": [16, 16], "init": "released"}
# Deviations of the entries of a train's matrix: one over the root of its rows plus columns.
SIGMA_A, SIGMA_B, SIGMA_D = (N + 8) ** -0.5, (8 + M) ** -0.5, (M + WIDE) ** -0.5

STARTS = {
    "LoRA": (LoRA, {"rank": 16}, {"A": uniform(384**-0.5), "B": ZERO}),
    "DoRA": (DoRA, {"rank": 16}, {"A": uniform(384**-0.5), "B": ZERO}),
    "SVD": (SVD, {"rank": 16}, {"P": normal(0.02), "Q": normal(0.02), "l": ZERO}),
    "PiCa": (PiCa, {}, {"M": ZERO}),
    "SBoRA": (SBoRA, {}, {"B": ZERO}),
    "SBoRA fb": (SBoRA, {"variant": "fb"}, {"A": ZERO}),
    "MiSS": (MiSS, {}, {"D": ZERO}),
    "MELoRA": (MELoRA, {"rank": 8, "minis": 4}, {"A": uniform(96**-0.5), "B": ZERO}),
    "NEAT": (
        NEAT,
        {"rank": 48, "depth": 1},
        {"A": uniform(256**-0.5), "B": ZERO, "E_0": uniform(48**-0.5), "D_0": uniform(48**-0.5)},
    ),
    "MultiScale": (
        MultiScale,
        {"init": "released", "rank": 48, "width": 48},
        {**dict.fromkeys(("A", "B1", "B2a", "B2b"), normal(0.02)), "e": ZERO},
    ),
    "Kronecker": (Kronecker, {"rank": 8}, {"A": uniform(16**-0.5), "B": ZERO}),
    "LoKr of HF PEFT": (
        LoKr,
        {"rank": 8},
        {"A": ZERO, "B1": uniform(8**-0.5), "B2": uniform(24**-0.5)},
    ),
    "LoKr zero B": (
        LoKr,
        {"rank": 8, "zero": "B"},
        {"A": uniform(16**-0.5), "B1": ZERO, "B2": uniform(24**-0.5)},
    ),
    "TensorTrain": (
        TensorTrain,
        {"tt_rank": 8, **TRAIN},
        {
            "A_1": normal(8**-0.5 * SIGMA_A ** (1 / 3)),
            "A_2": normal(8**-0.5 * SIGMA_A ** (1 / 3)),
            "A_3": normal(SIGMA_A ** (1 / 3)),
            "B_1": normal(8**-0.5 * SIGMA_B ** (1 / 3)),
            "B_2": normal(8**-0.5 * SIGMA_B ** (1 / 3)),
            "B_3": normal(SIGMA_B ** (1 / 3)),
        },
    ),
    "TensorTrainAdapter": (
        TensorTrainAdapter,
        {"bottleneck": WIDE, "tt_rank": 8, "modes": [16, 16], "init": "released"},
        {
            "D_1": normal(8**-0.5 * SIGMA_D ** (1 / 5)),
            "down": uniform(WIDE**-0.5),
            "up": uniform(M**-0.5),
        },
    ),
    "HyperAdapt": (HyperAdapt, {}, {"da": ZERO, "dc": ZERO}),
    "ResidualOffset": (ResidualOffset, {}, {"d": ZERO}),
}


@pytest.mark.parametrize("name", STARTS)
def test_start(name):
    """Tensors that the release draws have its distribution. Those that it sets to zero are zero."""
    method, arguments, tensors = STARTS[name]
    layer = method(nn.Linear(N, M), **arguments)
    parameters = dict(layer.own_parameters())
    for tensor, (kind, size) in tensors.items():
        values = parameters[tensor].detach()
        if kind == "uniform":
            assert values.abs().max() <= size
            assert values.abs().max() > 0.9 * size
        std = size / math.sqrt(3) if kind == "uniform" else size
        # Five deviations of the estimate of a standard deviation.
        assert abs(values.square().mean().sqrt().item() - std) <= 5 * std / math.sqrt(
            2 * values.numel()
        )


def test_deviations_start_at_zero():
    for method in (AttentionScale, LNTune):
        layer = method(method.example())
        assert not any(parameter.any() for _, parameter in layer.own_parameters())


def test_start_of_doras_magnitude():
    layer = DoRA(nn.Linear(24, 18).double())
    torch.testing.assert_close(layer.m, layer.base.weight.norm(dim=1), rtol=1e-13, atol=0)


def test_start_of_nola():
    """Coefficients of 0 for language models, of 1 / k for ViT. The draws are uniform in (-1, 1)."""
    base = nn.Linear(N, M)
    anchored, released = (NOLA(base, init=init) for init in ("anchored", "released"))
    assert not anchored.alpha.any()
    assert not anchored.beta.any()
    assert anchored.A0.abs().max() <= N**-0.5
    assert anchored.A0.abs().max() > 0.99 * N**-0.5
    assert set(released.alpha.tolist()) == {1 / len(released.alpha)}
    assert set(released.beta.tolist()) == {1 / len(released.beta)}
    drawn = next(anchored.matrices("a"))
    assert 0.99 < drawn.abs().max() <= 1
    assert abs(drawn.square().mean() - 1 / 3) < 0.02


def test_start_of_the_prefix():
    """The release draws its table with a deviation of 1. Ours has 0.02 unless `std` says so."""
    make = partial(Prefix, Prefix.example(), tokens=64)
    assert abs(make().P.std() / 0.02 - 1) < 0.05
    assert abs(make(encoder=64, std=1.0).E.std() - 1) < 0.05
