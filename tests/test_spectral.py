"""Spectral diagnostics against oracles of known spectrum."""

import json
import math

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_allocators import Toy, fit
from torch import nn

from adaptrank.composition.changes import Dense, Product
from adaptrank.composition.monitor import SpectralMonitor, change_of, kind_of, spectra
from adaptrank.composition.spectral import (
    amplification,
    captured_energy,
    diagnose,
    effective_rank,
    energy_rank,
    intruders,
    mean_by_kind,
    numerical_rank,
    participation_ratio,
    stable_rank,
)
from adaptrank.injection import adapt
from adaptrank.parameterizations import DoRA, HyperAdapt, LoRA, PiCa
from adaptrank.testing import perturb


def haar(n, k, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=random, dtype=torch.float64)).Q


def planted(S, m=24, n=40, seed=0):
    """A matrix with these singular values."""
    S = torch.tensor(S, dtype=torch.float64)
    return haar(m, len(S), seed) * S @ haar(n, len(S), seed + 1).T


def test_the_identity_has_eight_of_everything():
    S = torch.ones(8)
    for value in (
        effective_rank(S),
        stable_rank(S),
        participation_ratio(S),
        numerical_rank(S, 1e-3),
    ):
        assert math.isclose(value, 8, rel_tol=1e-6)
    assert energy_rank(S, 0.9) == 8
    assert energy_rank(S, 0.5) == 4


def test_rank_one_and_zero():
    for measure in (effective_rank, stable_rank, participation_ratio):
        assert math.isclose(measure(torch.tensor([3.0, 0.0])), 1, rel_tol=1e-6)
        assert measure(torch.zeros(3)) == 0
        assert measure(torch.zeros(0)) == 0
    assert numerical_rank(torch.zeros(3), 0.1) == energy_rank(torch.zeros(3), 0.9) == 0


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_stable_at_most_participation_at_most_rank(values):
    S = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    assert 1 - 1e-9 <= stable_rank(S) <= participation_ratio(S) + 1e-9 <= len(S) + 2e-9
    assert effective_rank(S) <= len(S) + 1e-9


def test_a_known_spectrum():
    values = [4.0, 2.0, 1.0]
    W = planted([9.0] * 24, seed=5)
    found = diagnose(Dense(planted(values)), W)
    p = torch.tensor(values) / 7
    assert found["rank"] == 3
    assert math.isclose(
        found["effective_rank"], math.exp(-float((p * p.log()).sum())), rel_tol=1e-6
    )
    assert math.isclose(found["stable_rank"], 21 / 16)
    assert math.isclose(found["participation"], 21**2 / (256 + 16 + 1))
    assert found["energy_rank"] == {"0.9": 2, "0.99": 3}
    assert math.isclose(found["relative"], math.sqrt(21 / (81 * 24)))
    assert math.isclose(found["relative_spectral"], 4 / 9)
    assert found["rank_share"]["0.01"] == 3 / 24


def test_a_product_and_its_matrix_and_another_gauge_say_the_same():
    random = torch.Generator().manual_seed(0)
    U, V = (
        torch.randn(24, 4, generator=random).double(),
        torch.randn(4, 40, generator=random).double(),
    )
    T = torch.randn(4, 4, generator=random).double()
    W = planted([3.0 - 0.1 * i for i in range(24)], seed=7)
    changes = [Product(U, V), Dense(U @ V), Product(U @ T, torch.linalg.solve(T, V))]
    one, *others = (diagnose(change, W) for change in changes)
    for other in others:
        for name in (
            "norm",
            "rank",
            "effective_rank",
            "stable_rank",
            "participation",
            "intruders",
            "amplification",
        ):
            assert math.isclose(one[name], other[name], rel_tol=1e-8), name


def test_the_amplification_factor():
    W = planted([9.0] * 24, seed=5)
    D = Dense(0.5 * W)
    assert math.isclose(amplification(D, W), 0.5, rel_tol=1e-9)


@pytest.mark.parametrize("flip", [1, -1])
def test_a_planted_intruder_is_found_as_exactly_one(flip):
    m = 256
    W = torch.randn(m, m, generator=torch.Generator().manual_seed(0)).double()
    assert int((intruders(W, W) < 0.5).sum()) == 0
    spike = flip * 1.5 * float(torch.linalg.matrix_norm(W, 2)) * haar(m, 1, 2) @ haar(m, 1, 3).T
    cosines = intruders(W, W + spike)
    assert cosines.shape == (10,)
    assert int((cosines < 0.5).sum()) == 1
    assert int(cosines.argmin()) == 0, "it leads"
    assert torch.allclose(intruders(W, -(W + spike)), cosines), (
        "signs of singular vectors mean nothing"
    )
    rounded = W.to(torch.bfloat16).double()
    assert int((intruders(W, rounded, None) < 0.5).sum()) == 0, "rounding makes none"


def test_what_lies_outside_of_the_span_of_a_tall_weight_is_an_intruder():
    W = planted([2.0, 1.9, 1.8], m=24, n=3)
    outside = torch.linalg.svd(W).U[:, 5:6] @ torch.ones(1, 3).double() * 9
    assert float(intruders(W, W + outside, 1)[0]) < 0.3


def test_picas_energy_is_one_in_its_space_and_its_share_of_a_random_one():
    W = planted([9 - 0.2 * i for i in range(24)])
    layer = PiCa(nn.Linear(40, 24, bias=False).double(), rank=4)
    with torch.no_grad():
        layer.innermost.weight.copy_(W)
        layer = PiCa(layer.innermost, rank=4)
    perturb(layer)
    leading = torch.linalg.svd(W, full_matrices=False).Vh[:4].T
    assert math.isclose(captured_energy(change_of(layer), leading), 1, rel_tol=1e-9)
    random = [
        captured_energy(Dense(planted([1.0] * 24, seed=s)), haar(40, 4, s + 50)) for s in range(40)
    ]
    assert abs(sum(random) / 40 - 4 / 40) < 0.02


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
def test_hyperadapt_never_exceeds_its_bound_and_has_full_rank_however_small_it_is(size):
    """The high rank of such a change is a property of its form, not of its size.

    At 1 part in 10,000 it is the same, and only |D| / |W| tells the size.
    """
    torch.manual_seed(0)
    layer = HyperAdapt(nn.Linear(64, 64, bias=False).double())
    perturb(layer, size)
    found = diagnose(change_of(layer), layer.base_weight.detach())
    assert found["rank_share"]["0.001"] == 1
    assert found["effective_rank"] > 40
    assert found["relative"] < 2 * size
    low = HyperAdapt(nn.Linear(64, 64, bias=False).double())
    with torch.no_grad():
        low.innermost.weight.copy_(planted([3.0, 2.0, 1.0], 64, 64))
    perturb(low, size)
    assert diagnose(change_of(low), low.base_weight.detach())["rank"] <= 2 * 3


def test_a_change_of_nothing():
    found = diagnose(Dense(torch.zeros(8, 6)), torch.ones(8, 6))
    assert found["rank"] == found["effective_rank"] == found["relative"] == 0
    json.dumps(found)


def test_the_layers_of_a_model_and_their_kinds():
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList(
                nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2)
            )
        }
    )
    adapt(model, ".*up", LoRA)
    adapt(model, ".*down", DoRA)
    perturb(model)
    found = spectra(model)
    assert list(found) == ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert list(spectra(model, r".*\.0\..*", intruders=False)) == ["blocks.0.up", "blocks.0.down"]
    summary = mean_by_kind(found, {path: kind_of(path) for path in found})
    assert {kind: means["layers"] for kind, means in summary.items()} == {
        "up": 2,
        "down": 2,
        "all": 4,
    }
    want = sum(found[f"blocks.{i}.up"]["effective_rank"] for i in (0, 1)) / 2
    assert math.isclose(summary["up"]["effective_rank"], want)


class Validated(Toy):
    def val_dataloader(self):
        return self.train_dataloader()

    def validation_step(self, batch, batch_idx):
        pass


def test_the_callback_logs_at_every_validation(tmp_path):
    class Logger(lightning.pytorch.loggers.logger.DummyLogger):
        seen: list = []

        def log_metrics(self, metrics, step=None):
            self.seen.append((step, metrics))

    monitor, logger = SpectralMonitor(), Logger()
    fit(
        Validated(LoRA),
        monitor,
        steps=8,
        val_check_interval=4,
        limit_val_batches=1,
        default_root_dir=tmp_path,
        logger=logger,
    )
    assert [record["step"] for record in monitor.history] == [4, 8]
    ours = [
        (step, metrics) for step, metrics in logger.seen if "spectral/all/stable_rank" in metrics
    ]
    assert [step for step, _ in ours] == [4, 8]
    assert ours[0][1]["spectral/all/relative"] < ours[1][1]["spectral/all/relative"]
    assert "spectral/all/intruders" not in ours[0][1]
    lines = [json.loads(line) for line in (tmp_path / "spectra.jsonl").read_text().splitlines()]
    assert lines == json.loads(json.dumps(monitor.history))
