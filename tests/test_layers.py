"""How a frozen layer looks as a matrix, and a fused one as its parts."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptrank import layers
from adaptrank.parameterizations import LoRA


def conv1d(m, n):
    layer = Conv1D(m, n)
    nn.init.normal_(layer.bias)
    return layer.double()


LAYERS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: conv1d(4, 6),
    "embedding": lambda: nn.Embedding(6, 4),
    "padded embedding": lambda: nn.Embedding(6, 4, padding_idx=0),
    "conv2d": lambda: nn.Conv2d(2, 4, 3),
    "strided": lambda: nn.Conv2d(2, 4, 3, stride=2),
    "uneven": lambda: nn.Conv2d(2, 4, (1, 3), stride=(2, 1), padding=(0, 1)),
    "padded": lambda: nn.Conv2d(2, 4, 2, padding=1),
    "same": lambda: nn.Conv2d(2, 4, 3, padding="same"),
    "dilated": lambda: nn.Conv2d(2, 4, 3, dilation=2, padding=2, bias=False),
    "reflecting": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="circular", bias=False),
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return request.param().double()


def example(layer):
    if isinstance(layer, nn.Conv2d):
        return torch.randn(3, 2, 7, 8, dtype=torch.float64)
    return layers.example_input(layer, (2, 3), torch.Generator().manual_seed(0))


def columns(layer, x):
    """What W multiplies: (..., n), written down for each kind by itself."""
    if isinstance(layer, nn.Embedding):
        return F.one_hot(x, layer.num_embeddings).double()
    if isinstance(layer, nn.Conv2d):
        (kh, kw), d = layer.kernel_size, layer.dilation
        before = layer._reversed_padding_repeated_twice
        mode = {"zeros": "constant"}.get(layer.padding_mode, layer.padding_mode)
        x = F.pad(x, before, mode=mode)
        high, wide = (x.shape[-2] - d[0] * (kh - 1) - 1, x.shape[-1] - d[1] * (kw - 1) - 1)
        size = (high // layer.stride[0] + 1, wide // layer.stride[1] + 1)
        patches = F.unfold(
            x, layer.kernel_size, dilation=d, stride=layer.stride
        )  # (batch, n, places)
        return patches.unflatten(-1, size).movedim(1, -1)
    return x


def test_a_layer_is_its_matrix_times_the_columns_of_its_input(layer):
    m, n = layers.shape(layer)
    W = layers.dense(layer, torch.float64)
    assert W.shape == (m, n)
    x = example(layer)
    want = columns(layer, x) @ W.T
    if getattr(layer, "bias", None) is not None:
        want = want + layer.bias
    y = layer(x)
    assert layers.channels_last(layer, y).shape[-1] == m
    torch.testing.assert_close(layers.channels_last(layer, y), want, rtol=1e-10, atol=1e-10)
    assert torch.equal(layers.channels_first(layer, layers.channels_last(layer, y)), y)


def test_projecting_is_the_same_layer_with_another_matrix(layer):
    x = example(layer)
    A = torch.randn(
        layers.shape(layer)[1], 5, dtype=torch.float64
    ).T  # not contiguous, as a method may have it
    torch.testing.assert_close(
        layers.project(layer, x, A), columns(layer, x) @ A.T, rtol=1e-10, atol=1e-10
    )


def test_the_stored_layout_is_the_inverse_of_dense(layer):
    W = layers.dense(layer, torch.float64)
    for matrix in (W, W.T.contiguous().T):
        assert torch.equal(layers.stored(layer, matrix), layer.weight)
    assert layers.dense(layer.to(torch.bfloat16), torch.float32).dtype == torch.float32
    assert layers.dtype(layer) == torch.bfloat16
    assert layers.device(layer).type == "cpu"


def test_shapes_need_no_memory():
    with torch.device("meta"):
        assert layers.shape(nn.Linear(8, 4)) == (4, 8)
        assert layers.shape(nn.Embedding(100, 8)) == (8, 100)
        assert layers.shape(nn.Conv2d(3, 8, (2, 5))) == (8, 30)
    with pytest.raises(TypeError, match="LayerNorm is no matrix"):
        layers.shape(nn.LayerNorm(4))


def test_an_image_without_a_batch():
    layer = nn.Conv2d(2, 4, 3).double()
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    wrapped = LoRA(layer, rank=2)
    nn.init.normal_(wrapped.B)
    torch.testing.assert_close(wrapped(x), wrapped(x[None])[0], rtol=1e-12, atol=1e-12)


class Scaled(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        (
            nn.Conv2d(4, 4, 3, groups=2),
            "LoRA: a convolution in 2 groups is no single matrix; leave it out.",
        ),
        (
            Standardized(4, 4, 3),
            "LoRA: Standardized changes what a convolution computes; leave it out.",
        ),
        (
            nn.Embedding(6, 4, max_norm=1.0),
            "LoRA: an embedding with max_norm rewrites its weight in the forward pass",
        ),
        (Scaled(6, 4), "LoRA: Scaled changes what an embedding computes; leave it out."),
    ],
    ids=["groups", "other convolution", "max_norm", "scaled"],
)
def test_what_cannot_be_wrapped_is_refused_with_a_reason(layer, sentence):
    with pytest.raises(TypeError) as error:
        LoRA(layer)
    assert sentence in str(error.value)
    assert all(parameter.requires_grad for parameter in layer.parameters())


# ---- writing


def test_writing_returns_what_was_there_and_takes_it_back():
    layer = nn.Linear(3, 2, bias=False).to(torch.bfloat16)
    weight, object_ = layer.weight.detach().clone(), layer.weight
    before = layers.write(layer, {"weight": torch.ones(3, 2).T, "bias": torch.tensor([1.0, 2.0])})
    assert layer.weight is object_
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.weight.is_contiguous()
    assert not layer.bias.requires_grad
    assert layer(torch.ones(3, dtype=torch.bfloat16)).tolist() == [4.0, 5.0]
    assert torch.equal(before["weight"], weight)
    layers.write(layer, before)
    assert layer.bias is None
    assert torch.equal(layer.weight, weight)
    layer(torch.ones(3, dtype=torch.bfloat16))


def test_writing_into_what_a_module_holds():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    old = module[0].weight.detach().clone()
    before = layers.write(module, {"0.weight": torch.zeros(2, 2), "1.bias": torch.ones(2)})
    assert not module[0].weight.any()
    assert module[1].bias.tolist() == [1, 1]
    layers.write(module, before)
    assert torch.equal(module[0].weight, old)


# ---- parts

FUSED = {
    "linear": lambda: nn.Linear(6, 12),
    "linear without a bias": lambda: nn.Linear(6, 12, bias=False),
    "conv1d": lambda: conv1d(12, 6),
}


@pytest.mark.parametrize("make", FUSED.values(), ids=FUSED)
def test_parts_and_back_to_the_bit(make):
    layer = make().double().eval().requires_grad_(False)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    parts = layers.Parts(layer, ["q", "k", "v"])
    assert [type(part) for part in parts.plain] == [type(layer)] * 3
    assert [layers.shape(part) for part in parts.plain] == [(4, 6)] * 3
    assert torch.equal(parts.k(x), layer(x)[..., 4:8]) or torch.allclose(
        parts.k(x), layer(x)[..., 4:8], rtol=1e-14
    )
    torch.testing.assert_close(parts(x), layer(x), rtol=1e-14, atol=1e-14)
    assert not any(parameter.requires_grad for parameter in parts.parameters())
    assert not parts.q.training
    storage = layer.weight.untyped_storage().data_ptr()
    assert all(part.weight.untyped_storage().data_ptr() == storage for part in parts.plain), (
        "a copy"
    )
    joined = parts.join()
    assert type(joined) is type(layer)
    assert joined.state_dict().keys() == layer.state_dict().keys()
    assert all(
        torch.equal(value, layer.state_dict()[key]) for key, value in joined.state_dict().items()
    )
    assert torch.equal(joined(x), layer(x))
    assert layers.shape(joined) == (12, 6)


def test_parts_are_independent_once_they_are_written():
    layer = nn.Linear(6, 12, bias=False)
    before = layer.weight.detach().clone()
    parts = layers.Parts(layer, ["a", "b"])
    layers.write(parts.b, {"weight": torch.zeros(6, 6), "bias": torch.ones(6)})
    assert torch.equal(layer.weight, before)
    joined = parts.join()
    assert torch.equal(joined.weight[:6], before[:6])
    assert not joined.weight[6:].any()
    assert joined.bias.tolist() == [0.0] * 6 + [1.0] * 6


def test_parts_know_the_fused_tensors_under_their_wrappers():
    layer = conv1d(12, 6)
    parts = layers.Parts(layer, ["q", "k", "v"])
    parts.q = LoRA(parts.q)
    nn.init.normal_(parts.q.B)
    assert torch.equal(parts.fused("weight"), layer.weight)
    assert torch.equal(parts.fused("bias"), layer.bias)


# ---- a layer has names of its own


def test_tensors_of_a_wrapper_may_have_the_names_of_the_layers_attributes():
    """bitsandbytes' 8-bit layer has an `index`, for one."""

    class Named(nn.Linear):
        A, B, index = 1, 2, 3

    layer = LoRA(Named(6, 4), rank=2)
    layer.register_buffer("index", torch.arange(2))
    assert isinstance(layer.A, nn.Parameter)
    assert layer.index.tolist() == [0, 1]
    assert layer.innermost.A == 1
    assert set(layer.state_dict()) == {"base.weight", "base.bias", "A", "B", "index"}
    for name in ("scale", "base", "A"):
        with pytest.raises(KeyError, match="already exists"):
            layer.register_buffer(name, torch.zeros(1))
