"""Parameterizations against references written from the authors' released code or formula.

A reference computes the layer's output from its trained tensors in the layout of the release: row
vectors, loops over blocks, whole matrices. Outputs and all gradients agree in float64.
docs/fidelity.md names the sources. tests/test_fidelity_starts.py compares the starts, and
tests/test_peft_parity.py more kinds of layers with HF PEFT.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_pica import blocks
from torch import nn

from adaptrank.parameterizations import (
    NEAT,
    NOLA,
    SVD,
    ALoRE,
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
    Prefix,
    ResidualOffset,
    SBoRA,
    TensorTrain,
    TensorTrainAdapter,
)
from adaptrank.testing import perturb

N, M = 24, 18
CLOSE = 1e-13
"""Largest relative error of an output or a gradient in float64."""


def trained(method, **arguments):
    """A layer of 24 inputs and 18 outputs in float64, away from its start."""
    layer = method(nn.Linear(N, M).double(), **arguments)
    perturb(layer, 0.3)
    return layer


def error(have, want):
    """Relative error in the Frobenius norm."""
    return ((have - want).norm() / want.norm()).item()


def errors(layer, reference, x=None):
    """Relative errors of the output and of the gradients of x and of every trained tensor.

    The reference gets the input, then the trained tensors by name.
    """
    x = torch.randn(2, 5, N, dtype=torch.float64) if x is None else x
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for name, parameter in layer.own_parameters()
    }
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    have, want = layer(inputs[0]), reference(inputs[1], **leaves)
    weights = torch.randn_like(want)
    for y in (have, want):
        ((y * weights).sum() + y.square().sum()).backward()
    found = {"output": error(have, want), "input": error(inputs[0].grad, inputs[1].grad)}
    for name, parameter in layer.own_parameters():
        found[name] = error(parameter.grad, leaves[name].grad)
    return found


def assert_same(layer, reference, x=None):
    found = errors(layer, reference, x)
    assert max(found.values()) < CLOSE, found


@pytest.mark.parametrize("rslora", [False, True])
def test_lora(rslora):
    layer = trained(LoRA, rank=3, alpha=6, rslora=rslora)
    scale = 6 / math.sqrt(3) if rslora else 6 / 3
    assert_same(layer, lambda x, A, B: layer.base(x) + (x @ A.T) @ B.T * scale)


@pytest.mark.parametrize("detach", [True, False])
def test_dora(detach):
    """The norm is a constant of the backward pass by default, as `dora_simple` of the release."""
    layer = trained(DoRA, rank=3, alpha=6, detach_norm=detach)
    W, bias = layer.base.weight, layer.base.bias

    def reference(x, A, B, m):
        directions = W + 2 * B @ A
        norms = directions.norm(dim=1, keepdim=True)
        return F.linear(x, m[:, None] * directions / (norms.detach() if detach else norms), bias)

    assert_same(layer, reference)


def test_svd():
    """The release divides alpha by the rank plus 1e-5, which changes the scale by 2.5e-6 here."""
    layer = trained(SVD, rank=4, alpha=6)
    want = 6 / (4 + 1e-5)
    assert abs(layer.scale / want - 1) < 3e-6
    layer.scale = want
    assert_same(layer, lambda x, P, l, Q: layer.base(x) + x @ (Q * l[:, None]).T @ P.T * want)


def test_pica():
    """Three layers of one kind: each has the singular vectors of its own weight, M is shared.

    The sign of a singular vector is free, so the reference takes those of the layer.
    """
    model = blocks(rank=4)
    x = torch.randn(5, 48, dtype=torch.float64)
    have = model(x)
    have.square().sum().backward()
    shared = {
        name: getattr(model[0], name).M.detach().clone().requires_grad_()
        for name in ("q_proj", "up_proj")
    }
    plain = copy.deepcopy(model)
    for block in plain:
        for name, M_shared in shared.items():
            layer = getattr(block, name)
            Vh = torch.linalg.svd(layer.base.weight.detach(), full_matrices=False).Vh[:4]
            signs = (Vh * layer.P).sum(1).sign()
            setattr(block, name, _Projected(layer.base, Vh, signs, M_shared))
    want = plain(x)
    want.square().sum().backward()
    assert error(have, want) < CLOSE
    for name, M_shared in shared.items():
        assert error(getattr(model[0], name).M.grad, M_shared.grad) < CLOSE


class _Projected(nn.Module):
    """x W^T + (x Vh^T) (M diag(signs))^T, from a decomposition of W."""

    def __init__(self, base, Vh, signs, M_shared):
        super().__init__()
        self.base, self.Vh, self.signs, self.M_shared = base, Vh, signs, (M_shared,)

    def forward(self, x):
        return self.base(x) + (x @ self.Vh.T) @ (self.M_shared[0] * self.signs).T


@pytest.mark.parametrize("variant", ["fa", "fb"])
def test_sbora(variant):
    """FA reads r inputs of a row, FB adds to r outputs of it, one position at a time."""
    layer = trained(SBoRA, rank=5, alpha=10, variant=variant)

    def columns(x, B):
        picked = torch.stack([x[..., j] for j in layer.index.tolist()], -1)
        return layer.base(x) + 2 * picked @ B.T

    def rows(x, A):
        y = list(layer.base(x).unbind(-1))
        for k, i in enumerate(layer.index.tolist()):
            y[i] = y[i] + 2 * (x @ A[k])
        return torch.stack(y, -1)

    assert_same(layer, columns if variant == "fa" else rows)


@pytest.mark.parametrize("init", ["anchored", "released"])
def test_nola(init):
    """ "anchored" is the code for language models, "released" that for ViT.

    The matrices are this library's own draws. Their bounds are those of the release: 1 over the
    root of k, or what torch gives for its three-dimensional tensors.
    """
    layer = trained(NOLA, rank=3, alpha=6, k_a=7, k_b=5, init=init, chunk=4)
    draws_a = torch.stack([*layer.matrices("a")]).double()
    draws_b = torch.stack([*layer.matrices("b")]).double()
    if init == "released":
        bounds = [_kaiming_bound(7, N, 3), _kaiming_bound(5, 3, M)]
        start = torch.zeros(3, N, dtype=torch.float64)
    else:
        bounds = [7**-0.5, 5**-0.5]
        start = layer.A0

    def reference(x, alpha, beta):
        A = start + bounds[0] * sum(a * D for a, D in zip(alpha, draws_a, strict=True))
        B = bounds[1] * sum(b * D for b, D in zip(beta, draws_b, strict=True))
        return layer.base(x) + (x @ A.T) @ B.T * 2

    assert_same(layer, reference)


def _kaiming_bound(*shape):
    """Bound of torch's kaiming_uniform_ with a = sqrt(5) on a tensor of this shape."""
    fan_in, _ = nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))
    return fan_in**-0.5


def whole(cores, rows):
    """The matrix of a tensor train, entry by entry: a product of small matrices for each index."""
    entries = [torch.ones(1, 1, dtype=torch.float64)]
    for core in cores:
        entries = [row @ core[:, j] for row in entries for j in range(core.shape[1])]
    return torch.stack(entries).reshape(rows, -1)


def train(tensors, letter):
    return [core for name, core in tensors.items() if name.startswith(f"{letter}_")]


def test_tensor_train():
    layer = trained(TensorTrain, rank=4, alpha=8, tt_rank=3, in_modes=[4, 6], out_modes=[3, 6])

    def reference(x, **cores):
        return layer.base(x) + 2 * (x @ whole(train(cores, "A"), N)) @ whole(train(cores, "B"), 4)

    assert_same(layer, reference)


@pytest.mark.parametrize("position", ["output", "input"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_tensor_train_adapter(position, activation):
    arguments = {"position": position, "activation": activation, "scale": 0.5}
    layer = trained(TensorTrainAdapter, bottleneck=6, tt_rank=3, **arguments)
    f = getattr(torch, activation)

    def adapter(h, down, up, cores):
        D, U = whole(train(cores, "D"), h.shape[-1]), whole(train(cores, "U"), 6)
        return h + 0.5 * (f(h @ D + down) @ U + up)

    def reference(x, down, up, **cores):
        if position == "input":
            return layer.base(adapter(x, down, up, cores))
        return adapter(layer.base(x), down, up, cores)

    assert_same(layer, reference)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("side", ["output", "input"])
def test_neat(side, depth):
    """The release multiplies from the right. Its code for language models reads the other side."""
    layer = trained(NEAT, rank=4, side=side, depth=depth, scale=0.3)
    frozen = layer.base.weight if side == "input" else layer.base.weight.T

    def reference(x, A, B, **squares):
        hidden, levels = torch.relu(frozen @ A.T), []
        for level in range(depth):
            levels.append(hidden)
            hidden = torch.relu(hidden @ squares[f"E_{level}"].T)
        for level in range(depth):
            hidden = torch.relu(hidden @ squares[f"D_{level}"].T) + levels[depth - 1 - level]
        change = hidden @ B.T
        return layer.base(x) + 0.3 * x @ (change.T if side == "input" else change)

    assert_same(layer, reference)


@pytest.mark.parametrize(("rank", "n"), [(6, N), (5, N)], ids=["whole", "ragged"])
def test_miss(rank, n):
    """Blocks of inputs are summed, the last one filled up with zeros, and multiplied by D."""
    layer = trained(MiSS, rank=rank)

    def reference(x, D):
        padded = F.pad(x, (0, -n % rank))
        return layer.base(x) + sum(padded.split(rank, -1)) @ D

    assert_same(layer, reference)


def test_melora():
    """Linear layers side by side, each with a rank and a scale of its own."""
    ranks = [1, 3, 2]
    layer = trained(MELoRA, rank=ranks, minis=3, alpha=6)

    def reference(x, A, B):
        parts = []
        for j, (rank, part) in enumerate(zip(ranks, x.split(N // 3, -1), strict=True)):
            own = layer.block == j
            parts.append((part @ A[own].T) @ B[:, own].T * (6 / rank))
        return layer.base(x) + torch.cat(parts, -1)

    assert_same(layer, reference)


def kron(A, B):
    """Blocks a_ij B, written one beside the other."""
    return torch.cat([torch.cat([a * B for a in row], 1) for row in A], 0)


@pytest.mark.parametrize("tokens", [2, 40])
def test_kronecker(tokens):
    """Of one product it is LoKr of LyCORIS with whole factors, whose scale is 1."""
    layer = trained(Kronecker, rank=3)
    x = torch.randn(tokens, N, dtype=torch.float64)

    def reference(x, A, B):
        return layer.base(x) + x @ sum(kron(a, b) for a, b in zip(A, B, strict=True)).T

    assert_same(layer, reference, x)


@pytest.mark.parametrize("both", [False, True])
def test_lokr(both):
    layer = trained(LoKr, rank=1, alpha=3, decompose_both=both)

    def reference(x, B1, B2, **coarse):
        A = coarse["A1"] @ coarse["A2"] if both else coarse["A"]
        return layer.base(x) + 3 * x @ kron(A, B1 @ B2).T

    assert_same(layer, reference)


@pytest.mark.parametrize("placement", ["parallel", "pre"])
def test_alore(placement):
    arguments = {"experts": 4, "blocks": 3, "rank": 2, "scale": 0.5}
    layer = trained(ALoRE, placement=placement, **arguments)

    def reference(x, S, V, U):
        change = 0.5 * sum(kron(s, u @ v) for s, u, v in zip(S, U, V, strict=True))
        if placement == "pre":
            return layer.base(x + x @ change.T)
        return layer.base(x) + x @ change.T

    assert_same(layer, reference)


def test_hyperadapt():
    layer = trained(HyperAdapt)

    def reference(x, da, dc):
        rows, columns = torch.diag(1 + da), torch.diag(1 + dc)
        return F.linear(x, rows @ layer.base.weight @ columns, layer.base.bias)

    assert_same(layer, reference)


def test_multi_scale():
    """In the release alpha is divided by q plus 1e-5, as in AdaLoRA's."""
    layer = trained(MultiScale, rank=4, width=3, alpha=6)
    want = 6 / (4 + 1e-5)
    assert abs(layer.scale / want - 1) < 3e-6
    layer.scale = want

    def reference(x, A, B1, e, B2a, B2b):
        change = A.T @ B1.T @ torch.diag(e) @ B2a.T @ B2b.T
        return layer.base(x) + x @ change * want

    assert_same(layer, reference)


@pytest.mark.parametrize("width", [3, 5])
def test_the_penalty_of_multi_scale_is_the_squared_one(width):
    """The release adds the norms of four k x k Gram matrices, the mean of which is weighed.

    For q >= k they are those of the smaller side. Here their squares are added.
    """
    layer = trained(MultiScale, rank=5, width=width, orth=0.3)
    eye = torch.eye(width, dtype=torch.float64)
    grams = [layer.A @ layer.A.T, layer.B1.T @ layer.B1]
    grams += [layer.B2a @ layer.B2a.T, layer.B2b.T @ layer.B2b]
    released = [(gram - eye).norm() for gram in grams]
    assert error(layer.penalty(), 0.3 / 4 * sum(norm**2 for norm in released)) < CLOSE


FORMS = [{}, {"form": "lite", "tokens": 4}, {"form": "full", "tokens": 4}]


@pytest.mark.parametrize("arguments", FORMS, ids=["scalar", "lite", "full"])
def test_attention_scale(arguments):
    layer = AttentionScale(AttentionScale.example().double(), **arguments)
    perturb(layer, 0.5)
    plain = layer.innermost

    def heads(projection, x):
        return projection(x).view(*x.shape[:-1], 3, 8).transpose(1, 2)

    def reference(x, da):
        q, k, v = (heads(p, x) for p in (plain.query, plain.key, plain.value))
        shares = ((1 + da) * (q @ k.mT / math.sqrt(8))).softmax(-1)
        return (shares @ v).transpose(1, 2).flatten(2)

    found = errors(_First(layer), reference, torch.randn(2, 4, 24, dtype=torch.float64))
    assert max(found.values()) < CLOSE, found


class _First(nn.Module):
    """The first of the outputs of an attention."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.own_parameters = layer, layer.own_parameters

    def forward(self, x):
        return self.layer(x)[0]


def test_residual_offset():
    """The domain residual adapter of eTT: d1 and d2 join what a block adds to its stream."""
    mix, squash = nn.Linear(N, N).double(), nn.Linear(N, N).double()
    attention, mlp = ResidualOffset(mix), ResidualOffset(squash)
    for layer in (attention, mlp):
        perturb(layer)
    x = torch.randn(3, N, dtype=torch.float64)

    def reference(x, d):
        x = x + (mix(x) + attention.d)
        return x + (squash(torch.tanh(x)) + d)

    assert_same(_Block(attention, mlp), reference, x)


class _Block(nn.Module):
    def __init__(self, attention, mlp):
        super().__init__()
        self.attention, self.mlp, self.own_parameters = attention, mlp, mlp.own_parameters

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(torch.tanh(x))


def test_ln_tune():
    layer = LNTune(nn.LayerNorm(N).double())
    perturb(layer, 0.3)
    perturb(layer.base, 0.3)

    def reference(x, dg, db):
        centred = x - x.mean(-1, keepdim=True)
        z = centred / (centred.square().mean(-1, keepdim=True) + layer.base.eps).sqrt()
        return (layer.base.weight + dg) * z + (layer.base.bias + db)

    assert_same(layer, reference)


@pytest.mark.parametrize("encoder", [0, 6])
def test_the_prefix_of_the_release(encoder):
    """A row of the table is the prefix of one token: keys of a layer, its values, the next layer.

    The release gives its first table and its hidden layer widths of their own. Here they are one.
    """
    layer = Prefix(Prefix.example().double(), tokens=3, encoder=encoder)
    perturb(layer, 0.3)
    layers, _, heads, width = layer.sizes
    if encoder:
        first, _, last = layer.encoder
        table = F.linear(torch.tanh(F.linear(layer.E, first.weight, first.bias)), last.weight)
        table = table + last.bias
    else:
        table = layer.P.movedim(-2, 0).flatten(1)
    rows = table.view(3, 2 * layers, heads, width)
    for index, (keys, values) in enumerate(layer.prefix()):
        for token in range(3):
            assert error(keys[:, token], rows[token, 2 * index]) < CLOSE
            assert error(values[:, token], rows[token, 2 * index + 1]) < CLOSE
