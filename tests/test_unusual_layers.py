"""Layers that are no plain matrix in spite of their type are left out and listed, or refused."""

import copy
import logging
import warnings
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrizations, prune

from adaptrank import adapt, describe, merge
from adaptrank.layers.support import unsupported
from adaptrank.parameterizations import (
    PARAMETERIZATIONS,
    DoRA,
    HyperAdapt,
    LoRA,
    Prefix,
    wrapped_layers,
)
from adaptrank.testing import perturb

IDS = torch.arange(3, 20)[None]


def last_components(model):
    return {path.rpartition(".")[2] for path in wrapped_layers(model)}


# ---- linear layers with another forward pass


class Router(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        return y, y.argmax(-1)


class Bound(nn.Linear):
    """An instance whose forward pass was replaced."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.forward = lambda x: 2 * nn.functional.linear(x, self.weight, self.bias)


class Routed(nn.Module):
    def __init__(self, router=Router):
        super().__init__()
        self.up, self.router, self.down = nn.Linear(8, 8), router(8, 2), nn.Linear(8, 4)

    def forward(self, x):
        gate = self.router(x)
        return self.down(self.up(x)), gate


@pytest.mark.parametrize("router", [Router, Bound])
def test_a_linear_layer_that_computes_something_else_is_left_out_and_listed(router, caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    model = adapt(Routed(router), "all-linear", LoRA)
    assert list(wrapped_layers(model)) == ["up", "down"]
    line = f"left out: 1 x router, 14 % of the parameters: {router.__name__} changes what a linear"
    assert line in describe(model)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"L{line[1:]}")
    with pytest.raises(TypeError, match=rf"router: LoRA: {router.__name__} changes what a linear"):
        adapt(Routed(router), ["up", "router"], LoRA)


def test_a_hook_of_accelerate_is_no_other_forward_pass():
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    hooks.add_hook_to_module(model[0], hooks.ModelHook())
    assert len(wrapped_layers(adapt(model, "all-linear", LoRA))) == 2


SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "interleave_moe_layer_step": 1,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 24,
}

MIXTURES = ["Llama4Text", "Phimoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "GptOss", "Olmoe"]


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_starts_at_its_base_and_lists_its_experts(name):
    torch.manual_seed(0)
    model_name = f"{name.removesuffix('Text')}ForCausalLM"
    model = getattr(transformers, model_name)(getattr(transformers, f"{name}Config")(**SMALL))
    want = model(IDS).logits
    adapt(model, "all-linear", partial(LoRA, rank=2))
    torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-5)
    assert {"q_proj", "o_proj"} <= last_components(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    if name == "Phimoe":
        assert "PhimoeTopKRouter changes what a linear layer computes" in describe(model)
    experts = [line for line in describe(model).splitlines() if "Experts" in line]
    assert len(experts) >= 2, describe(model)
    share = sum(float(line.split(" % of")[0].rpartition(" ")[2]) for line in experts)
    numbers = sum(
        p.numel() for n, p in model.named_parameters() if ".experts." in n and p.dim() > 2
    )
    assert share == pytest.approx(
        100 * numbers / sum(p.numel() for p in model.parameters()), rel=0.1
    )


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))
        self.scale = nn.Parameter(torch.ones(8))


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.shared = Experts(), nn.ModuleDict({"down_proj": nn.Linear(8, 8)})
        self.up = nn.Linear(8, 8)


def test_a_name_that_means_layers_and_a_parameter_elsewhere(caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    model = adapt(Mixture(), ["down_proj"], LoRA)
    assert list(wrapped_layers(model)) == ["shared.down_proj"]
    (record,) = caplog.records
    assert "Left out: 1 x down_proj" in record.getMessage()
    assert "a parameter of Experts" in record.getMessage()
    caplog.clear()
    adapt(Mixture(), ["up"], LoRA)
    adapt(Mixture(), r"shared\..*", LoRA)
    assert not caplog.records


def test_a_parameter_that_is_named_alone_is_refused_by_name():
    del (model := Mixture()).shared
    with pytest.raises(
        ValueError, match=r"'down_proj' names experts\.down_proj, a parameter of Exp"
    ):
        adapt(model, ["down_proj"], LoRA)


@pytest.mark.parametrize(
    ("module", "weight"),
    [
        (nn.MultiheadAttention(8, 2), "in_proj_weight"),
        (nn.Bilinear(8, 8, 4), "weight"),
        (nn.GRU(8, 8), "weight_hh_l0"),
    ],
    ids=["attention", "bilinear", "recurrent"],
)
def test_modules_of_torch_with_weights_of_their_own(module, weight):
    model = adapt(nn.Sequential(nn.Linear(8, 8), module), "all-linear", LoRA)
    assert f"x {weight}" in describe(model)
    assert "left out" not in describe(
        adapt(nn.Sequential(nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.LayerNorm(8)), ["0"], LoRA)
    )


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


def test_all_lists_embeddings_and_convolutions_as_well(caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    modules = [nn.Linear(4, 4), Scaled(9, 4), nn.Conv2d(4, 4, 1, groups=2)]
    model = adapt(nn.Sequential(*modules), "all", LoRA)
    assert list(wrapped_layers(model)) == ["0"]
    text = " ".join(record.getMessage() for record in caplog.records)
    assert "Scaled changes what an embedding computes" in text
    assert "a convolution in 2 groups" in text
    caplog.clear()
    adapt(nn.Sequential(*modules), "all-linear", LoRA)
    assert not caplog.records


# ---- weights that are computed


def computed(kind):
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    if kind == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    elif kind == "pruned bias":
        prune.random_unstructured(layer, "bias", 0.5)
    elif kind == "old weight_norm":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(layer)
    elif kind == "old spectral_norm":
        torch.nn.utils.spectral_norm(layer)
    else:
        getattr(parametrizations, kind)(layer)
    return nn.Sequential(layer, nn.ReLU(), nn.Linear(16, 8))


COMPUTED = [
    "weight_norm",
    "spectral_norm",
    "orthogonal",
    "old weight_norm",
    "old spectral_norm",
    "pruned",
    "pruned bias",
]


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_from_others(kind):
    model = computed(kind).eval()
    x = torch.randn(3, 16)
    with torch.no_grad():
        want = model(x)
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(TypeError, match=r"0: LoRA: .*Linear computes its \w+ from other tensors"):
        adapt(model, ["0", "2"], LoRA)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for method in (partial(LoRA, rank=2), partial(DoRA, rank=2), HyperAdapt):
        adapted = adapt(computed(kind).eval(), "all-linear", method)
        assert list(wrapped_layers(adapted)) == ["2"]
        torch.testing.assert_close(adapted(x), want, rtol=1e-6, atol=1e-6)
        perturb(adapted, 0.2)
        changed = adapted(x)
        assert not torch.allclose(changed, want)
        torch.testing.assert_close(merge(adapted)(x), changed, rtol=1e-5, atol=1e-5)
    assert "left out: 1 x 0" in describe(adapt(model, "all-linear", LoRA))


def test_a_layer_without_a_size():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"0\.weight has no size yet; pass one batch through"):
        adapt(model, ["1"], LoRA)
    with pytest.raises(TypeError, match="LazyLinear has no size yet; pass one batch through"):
        LoRA(model[0])
    model(torch.randn(2, 5))
    assert len(wrapped_layers(adapt(model, "all-linear", LoRA))) == 2


# ---- weights that the model writes


def rwkv(every):
    torch.manual_seed(0)
    config = transformers.RwkvConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=4,
        attention_hidden_size=32,
        intermediate_size=48,
        context_length=32,
        rescale_every=every,
    )
    return transformers.RwkvForCausalLM(config)


def test_weights_that_a_model_rescales_in_place():
    model = adapt(rwkv(2), "all-linear", partial(LoRA, rank=2))
    assert "rwkv.blocks.1.attention.output" in wrapped_layers(model)
    assert "rwkv.blocks.2.attention.output" not in wrapped_layers(model)
    assert "set model.config.rescale_every = 0" in describe(model)
    perturb(model, 0.1)
    torch.testing.assert_close(
        model.train()(IDS).logits, model.eval()(IDS).logits, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(ValueError, match=r"blocks.2.attention.output: RwkvModel rescales this wei"):
        adapt(rwkv(2), ["output"], LoRA)
    assert len(wrapped_layers(adapt(rwkv(0), ["output"], LoRA))) == 4


@pytest.mark.parametrize("write", ["in place", "replaced", "loaded"])
def test_norms_of_a_weight_that_was_rescaled_after_adapting(write):
    layer = DoRA(nn.Linear(16, 8), rank=2)
    perturb(layer, 0.3)
    x = torch.randn(5, 16)
    layer(x)
    with torch.no_grad():
        if write == "in place":
            layer.base.weight.mul_(3)
        elif write == "replaced":
            layer.base.weight.data = 3 * layer.base.weight.data
        else:
            layer.base.load_state_dict({"weight": 3 * layer.base.weight, "bias": layer.base.bias})
    torch.testing.assert_close(layer(x), layer.definition(x), rtol=1e-5, atol=1e-5)


def test_a_method_without_linear_layers_lists_nothing(caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL))
    adapt(model, "all", Prefix)
    assert not caplog.records


def test_a_layer_that_inherits_the_forward_of_bitsandbytes_is_wrapped(monkeypatch):
    """Lightning derives its layers from those of bitsandbytes, in a module of its own."""

    class Inherits(nn.Linear):
        def forward(self, x):
            return super().forward(x)

    layer = Inherits(4, 4)
    assert unsupported(layer) is not None
    monkeypatch.setattr(Inherits.forward, "__module__", "bitsandbytes.nn.modules")
    assert unsupported(layer) is None


# ---- inputs of a wrong shape


@pytest.mark.parametrize("name", sorted(PARAMETERIZATIONS))
def test_an_input_of_another_width_is_refused_as_the_plain_layer_refuses_it(name):
    """A scale would broadcast an input of one number, and the layer would take it."""
    cls = PARAMETERIZATIONS[name]
    if not cls.wraps(nn.Linear(48, 24)):
        return
    layer = cls(nn.Linear(48, 24))
    perturb(layer)
    for width in (1, 47, 96):
        for grad in (False, True):
            with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError)):
                layer(torch.ones(3, width))


@pytest.mark.parametrize("name", sorted(PARAMETERIZATIONS))
def test_an_image_with_another_number_of_channels_is_refused(name):
    cls, base = PARAMETERIZATIONS[name], nn.Conv2d(8, 8, 3)
    if not cls.wraps(base):
        return
    layer = cls(base)
    perturb(layer)
    for channels in (1, 7):
        with pytest.raises((RuntimeError, ValueError)):
            layer(torch.ones(2, channels, 5, 5))
