"""Tests of ResidualOffset beside the common contract."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adaptrank.artifacts import load_adapter, merge, save_adapter, unmerge
from adaptrank.axes import cost_model
from adaptrank.injection import adapt
from adaptrank.parameterizations import HyperAdapt, LoRA, ResidualOffset
from adaptrank.testing import check_parameterization, perturb

IDS = torch.arange(12).reshape(2, 6)


def llama(**changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        **changes,
    )
    return LlamaForCausalLM(config).double().eval()


def test_the_contract_with_the_closed_count():
    check_parameterization(ResidualOffset, count=lambda m, n: m)


def test_printed_count():
    """Two offsets of 384 numbers in each of 12 blocks of a ViT-S/16."""
    block = lambda: nn.ModuleDict(  # noqa: E731
        {"proj": nn.Linear(384, 384, device="meta"), "fc2": nn.Linear(1536, 384, device="meta")}
    )
    model = adapt(nn.ModuleList(block() for _ in range(12)), ["proj", "fc2"], ResidualOffset)
    assert cost_model(model).total({}) == 9_216


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_merges_into_the_bias_and_makes_one_where_there_is_none(bias, dtype):
    model = nn.Sequential(nn.Linear(48, 24, bias=bias).to(dtype))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    plain, x = copy.deepcopy(model), torch.randn(3, 48, dtype=dtype)
    adapt(model, ["0"], ResidualOffset)
    perturb(model)
    adapted, d = model(x), model[0].d.clone()
    torch.testing.assert_close(adapted, plain(x) + d.to(dtype), rtol=1e-12, atol=1e-12)
    merge(model, keep_originals=True)
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(model(x), adapted, rtol=tolerance, atol=tolerance)
    assert torch.equal(model[0].weight, before["0.weight"])
    unmerge(model)
    assert torch.equal(model(x), adapted)
    assert (model[0].innermost.bias is None) is not bias
    if bias:
        assert torch.equal(model[0].innermost.bias, before["0.bias"])


def test_the_bias_says_what_is_added_and_what_is_outside_of_it_sees_it():
    layer = ResidualOffset(nn.Linear(48, 24, bias=False).double())
    assert torch.equal(layer.bias, torch.zeros(24).double())
    layer.enabled = False
    assert layer.bias is None
    layer = HyperAdapt(ResidualOffset(LoRA(nn.Linear(48, 24).double())))
    perturb(layer)
    x = torch.randn(3, 48, dtype=torch.float64)
    inner = layer.base
    want = inner.base.innermost.bias + inner.d
    assert torch.equal(layer.bias, want)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, want), rtol=1e-10, atol=1e-10
    )


def test_in_a_model_the_function_survives_saving_loading_and_merging(tmp_path):
    model = adapt(llama(), ["o_proj", "down_proj"], ResidualOffset)
    assert cost_model(model).total({}) == 2 * 32 * 2
    perturb(model)
    want = model(IDS).logits
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(llama(), tmp_path)(IDS).logits, want)
    torch.testing.assert_close(merge(model)(IDS).logits, want, rtol=1e-10, atol=1e-10)


def test_it_wraps_matrices_only():
    assert ResidualOffset.wraps(Conv1D(4, 4))
    with pytest.raises(TypeError, match="ResidualOffset wraps Linear or Conv1D, not LayerNorm"):
        ResidualOffset(nn.LayerNorm(4))


def test_all_means_what_the_method_wraps_also_where_a_function_builds_it():
    """As it does for a YAML file, whose parser hands over partial(call, build, cls, ...)."""

    def call(build, cls, base):
        return build(cls, base)

    def build(cls, base):
        return cls(base)

    with pytest.raises(ValueError, match="No layer matches targets='all'"):
        adapt(nn.Sequential(nn.LayerNorm(4)), "all", partial(call, build, ResidualOffset))
    model = adapt(
        nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), "all", partial(call, build, ResidualOffset)
    )
    assert isinstance(model[0], ResidualOffset)
    assert isinstance(model[1], nn.LayerNorm)
