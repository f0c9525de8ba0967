"""Every method is one graph for torch.compile, forward and backward, and so is a nest.

The backend "aot_eager" traces both passes and runs them with the kernels of eager mode.
"""

import pytest
import torch
from torch import _dynamo as dynamo
from torch import nn
from training_cases import default_cases, ids, method_cases, nest_cases
from transformers import LlamaConfig, LlamaModel

from adaptrank import adapt, testing
from adaptrank.parameterizations import SVD, AttentionScale, HyperAdapt, LoRA, Prefix

METHOD_CASES = default_cases()
SIX_NESTS = nest_cases()[:6]
VARIANTS = [case for case in method_cases() if case.name not in {c.name for c in METHOD_CASES}]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    dynamo.reset()
    yield
    dynamo.reset()


def loss_of(module, x):
    return testing.output(module, x).square().sum()


def check_one_graph(module, x, backend):
    """Check that a compiled step is one graph, and has the loss and the gradients of an eager one.

    Numbers may differ as sums of another order do, by 1e-6 of the largest number of a tensor.
    """
    compiled = torch.compile(loss_of, backend=backend, fullgraph=True)
    results = []
    for run in (loss_of, compiled):
        module.zero_grad()
        leaf = x.detach().clone().requires_grad_(x.requires_grad)
        loss = run(module, leaf)
        loss.backward()
        grads = {name: p.grad for name, p in testing.trainable(module).items()}
        results.append({"loss": loss.detach(), "x": leaf.grad, **grads})
    eager, traced = results
    assert any(value is not None for name, value in eager.items() if name not in ("loss", "x"))
    for name, value in eager.items():
        if value is None:
            assert traced[name] is None, name
            continue
        largest = float(value.abs().max())
        torch.testing.assert_close(traced[name], value, rtol=1e-6, atol=1e-6 * largest)


# A prefix is compiled below, within a Llama.
@pytest.mark.parametrize(
    "case", [case for case in METHOD_CASES if case.methods != (Prefix,)] + SIX_NESTS[:1], ids=ids
)
def test_a_step_is_one_graph(case):
    layer = case.build()
    check_one_graph(layer, case.sample(layer), "aot_eager")


@pytest.mark.tables
@pytest.mark.parametrize("case", [*VARIANTS, *nest_cases()[1:]], ids=ids)
def test_a_step_of_a_variant_is_one_graph(case):
    layer = case.build()
    check_one_graph(layer, case.sample(layer), "aot_eager")


def test_inductor_computes_what_eager_mode_does():
    model = nn.Sequential(
        LoRA(nn.Linear(8, 6)), HyperAdapt(nn.Linear(6, 6)), SVD(nn.Linear(6, 4), rank=2)
    )
    testing.perturb(model)
    check_one_graph(model, torch.randn(3, 8, requires_grad=True), "inductor")


@pytest.mark.tables
@pytest.mark.parametrize("case", [*METHOD_CASES, *SIX_NESTS], ids=ids)
def test_inductor_computes_what_eager_mode_does_for_all(case):
    layer = case.build()
    check_one_graph(layer, case.sample(layer), "inductor")


def test_a_llama_with_a_prefix_and_scaled_attention_is_one_graph():
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    body = adapt(LlamaModel(config), targets="all", parameterization=AttentionScale)
    body = Prefix(body)
    testing.perturb(body)
    check_one_graph(body, torch.arange(6).view(2, 3), "aot_eager")
