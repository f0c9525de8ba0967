"""HF PEFT's tensors in our methods: the same outputs, gradients and merged weights, in float64.

What differs by design is named where it is: everything else agrees to the last digits. Of LoRA's
and DoRA's layers the kinds that both libraries wrap are here; AdaLoRA, LoKr, MiSS, PEANuT and LN
tuning are compared on the layers both have.
"""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from adaptrank import adapt, merge
from adaptrank.parameterizations import (
    NEAT,
    SVD,
    DoRA,
    Kronecker,
    LNTune,
    LoKr,
    LoRA,
    MiSS,
    Prefix,
    wrappers,
)
from adaptrank.parameterizations.kronecker import divisor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", minversion="0.21")

M, N, R = 24, 36, 4
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def linear():
    return nn.Linear(N, M), torch.randn(2, 3, N, dtype=torch.float64)


def bare():
    return nn.Linear(N, M, bias=False), torch.randn(5, N, dtype=torch.float64)


def conv1d():
    layer = Conv1D(M, N)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(2, 3, N, dtype=torch.float64)


def embedding():
    return nn.Embedding(N, M), torch.randint(N, (3, 5))


def conv2d():
    return nn.Conv2d(6, M, (3, 2), stride=2, padding=1), torch.randn(
        2, 6, 7, 8, dtype=torch.float64
    )


def random(module: nn.Module) -> None:
    """Away from the start of either library."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


def pair(base, config, method):
    """The same layer in the hands of both libraries, in float64: PEFT's model, its wrapper, our
    model, our wrapper."""
    net = Net(copy.deepcopy(base)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(net), config).double()
    random(theirs)
    ours = adapt(net, ["layer"], method)
    return theirs, theirs.base_model.model.layer, ours, ours.layer


def compare(
    theirs, ours, x, tensors: list[tuple[nn.Parameter, nn.Parameter, Callable]], penalty=None
):
    """Give our tensors PEFT's values, laid out by the third of each triple; then outputs, gradients
    and merged weights agree."""
    trained = {id(p) for p in ours.parameters() if p.requires_grad}
    assert {id(own) for _, own, _ in tensors} == trained
    assert {id(p) for p, _, _ in tensors} == {id(p) for p in theirs.parameters() if p.requires_grad}
    with torch.no_grad():
        for their, own, layout in tensors:
            own.copy_(layout(their))
    inputs = [x.clone().requires_grad_() if x.is_floating_point() else x for _ in range(2)]
    have, want = ours(inputs[1]), theirs(inputs[0])
    torch.testing.assert_close(have, want, **CLOSE)
    weights = torch.randn_like(want)
    for y in (have, want):
        ((y * weights).sum() + y.square().mean()).backward()
    for their, own, layout in tensors:
        torch.testing.assert_close(own.grad, layout(their.grad), **CLOSE)
    if x.is_floating_point():
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = theirs.merge_and_unload()
    for key, value in merge(ours).state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[key], **CLOSE)


def same(tensor):
    return tensor


def flat(tensor):
    return tensor.flatten(1)


def lora_tensors(theirs, ours):
    if theirs.lora_embedding_A:
        return [
            (theirs.lora_embedding_A["default"], ours.A, same),
            (theirs.lora_embedding_B["default"], ours.B, same),
        ]
    return [
        (theirs.lora_A["default"].weight, ours.A, flat),
        (theirs.lora_B["default"].weight, ours.B, flat),
    ]


LAYERS = pytest.mark.parametrize(
    "make", [linear, bare, conv1d, embedding, conv2d], ids=lambda make: make.__name__
)


@LAYERS
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_lora(make, rslora):
    base, x = make()
    config = peft.LoraConfig(
        r=R,
        lora_alpha=6,
        target_modules=["layer"],
        use_rslora=rslora,
        fan_in_fan_out=make is conv1d,
    )
    theirs, their, ours, own = pair(
        base, config, lambda layer: LoRA(layer, rank=R, alpha=6, rslora=rslora)
    )
    assert own.scale == their.scaling["default"] == 6 / (math.sqrt(R) if rslora else R)
    compare(theirs, ours, x, lora_tensors(their, own))


@LAYERS
def test_dora(make):
    """Norms are taken per output in both, and are constants of the backward pass; those of a
    convolution over all its taps."""
    base, x = make()
    config = peft.LoraConfig(
        r=R, lora_alpha=6, target_modules=["layer"], use_dora=True, fan_in_fan_out=make is conv1d
    )
    theirs, their, ours, own = pair(base, config, lambda layer: DoRA(layer, rank=R, alpha=6))
    magnitude = their.lora_magnitude_vector["default"].weight
    compare(theirs, ours, x, [*lora_tensors(their, own), (magnitude, own.m, torch.flatten)])


@pytest.mark.parametrize("make", [linear, bare, conv1d], ids=lambda make: make.__name__)
def test_adalora_and_our_svd(make):
    """PEFT divides by the rank plus 1e-5, to be safe from a rank of 0; we divide by the rank."""
    base, x = make()
    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=2,
        lora_alpha=6,
        target_modules=["layer"],
        total_step=10,
        fan_in_fan_out=make is conv1d,
    )
    theirs, their, ours, own = pair(base, config, lambda layer: SVD(layer, rank=R, alpha=6))
    assert own.scale == 6 / R
    their.ranknum["default"].requires_grad_(False).fill_(
        R
    )  # float64 and `random` took it for a parameter; it is a count
    own.scale = 6 / (R + 1e-5)
    tensors = [
        (their.lora_A["default"], own.Q, same),
        (their.lora_E["default"], own.l, torch.flatten),
        (their.lora_B["default"], own.P, same),
    ]
    compare(theirs, ours, x, tensors)


def test_adaloras_orthogonality_penalty():
    """Both add orth times the mean over P and Q of ||P^T P - I||_F: PEFT to the loss, we to the
    gradient."""

    class WithLoss(Net):
        def forward(self, x):
            y = super().forward(x)
            return SimpleNamespace(loss=0 * y.sum())

    base, x = linear()
    config = peft.AdaLoraConfig(
        init_r=R, target_r=2, target_modules=["layer"], total_step=10, orth_reg_weight=0.3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(WithLoss(copy.deepcopy(base)).double(), config).double()
    random(theirs)
    their, own = theirs.base_model.model.layer, SVD(base.double(), rank=R, orth=0.3)
    pairs = [(their.lora_A["default"], own.Q), (their.lora_B["default"], own.P)]
    with torch.no_grad():
        for parameter, ours in pairs:
            ours.copy_(parameter)
    want, have = (
        theirs.base_model(x).loss,
        own.penalty(),
    )  # PeftModel without a task type passes by the penalty
    torch.testing.assert_close(have, want, **CLOSE)
    want.backward()
    have.backward()
    for parameter, ours in pairs:
        torch.testing.assert_close(ours.grad, parameter.grad, **CLOSE)


@pytest.mark.parametrize("decompose_both", [False, True])
@pytest.mark.parametrize("factor", [-1, 2, 6])
def test_lokr(factor, decompose_both):
    """PEFT leaves the large factor whole from a rank of half its longer side on; there we have a
    Kronecker."""
    base, x = linear()
    rank = 1 if decompose_both else 2
    config = peft.LoKrConfig(
        r=rank,
        alpha=6,
        target_modules=["layer"],
        decompose_factor=factor,
        decompose_both=decompose_both,
    )

    def method(layer):
        return LoKr(layer, rank=rank, alpha=6, factor=factor, decompose_both=decompose_both)

    theirs, their, ours, own = pair(base, config, method)
    if own.decomposed:
        coarse = [
            (their.lokr_w1_a["default"], own.A1, same),
            (their.lokr_w1_b["default"], own.A2, same),
        ]
    else:
        coarse = [(their.lokr_w1["default"], own.A, same)]
    fine = [(their.lokr_w2_a["default"], own.B1, same), (their.lokr_w2_b["default"], own.B2, same)]
    compare(theirs, ours, x, [*coarse, *fine])


@pytest.mark.parametrize("factor", [-1, 3])
@pytest.mark.parametrize("make", [linear, conv2d], ids=lambda make: make.__name__)
def test_lokr_with_whole_factors_is_one_kronecker_product(make, factor):
    base, x = make()
    config = peft.LoKrConfig(r=16, alpha=6, target_modules=["layer"], decompose_factor=factor)
    theirs, their, ours, own = pair(
        base, config, lambda layer: Kronecker(layer, rank=1, factor=factor, scale=6 / 16)
    )
    coarse, fine = their.lokr_w1["default"], their.lokr_w2["default"]
    compare(
        theirs,
        ours,
        x,
        [(coarse, own.A, lambda t: t[None]), (fine, own.B, lambda t: flat(t)[None])],
    )


def test_factors_are_those_of_lokr():
    """But for a factor that does not divide and lies above the root of the size: there PEFT stays
    below the root, and we do not."""
    factorization = peft.tuners.lokr.layer.factorization
    for size in range(1, 200):
        for factor in (-1, 1, 2, 3, 4, 8, 16):
            if factor == -1 or size % factor == 0 or factor**2 <= size:
                assert divisor(size, factor) == factorization(size, factor)[0], (size, factor)
    assert (divisor(12, 5), factorization(12, 5)[0]) == (4, 3)


@pytest.mark.parametrize("make", [linear, bare], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("rank", "init", "variant", "mini"),
    [(4, True, "linear", 1), (7, True, "linear", 1), (4, "mini", "mini", 6), (4, "bat", "bat", 1)],
    ids=["linear", "ragged", "mini", "bat"],
)
def test_miss(make, rank, init, variant, mini):
    base, x = make()
    config = peft.MissConfig(r=rank, mini_r=mini, init_weights=init, target_modules=["layer"])
    theirs, their, ours, own = pair(
        base, config, lambda layer: MiSS(layer, rank=rank, variant=variant, mini_rank=mini)
    )
    compare(theirs, ours, x, [(their.miss_block["default"], own.D, same)])


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_peanut_is_our_neat(depth, activation):
    base, x = linear()
    config = peft.PeanutConfig(
        r=R, depth=depth, act_fn=activation, scaling=0.7, target_modules=["layer"]
    )
    theirs, their, ours, own = pair(
        base,
        config,
        lambda layer: NEAT(layer, rank=R, depth=depth, activation=activation, scale=0.7),
    )
    tensors = [
        (their.peanut_A["default"].weight, own.A, same),
        (their.peanut_B["default"].weight, own.B, same),
    ]
    for kind, modules in (("E", their.peanut_encoders), ("D", their.peanut_decoders)):
        tensors += [
            (m.weight, getattr(own, f"{kind}_{i}"), same) for i, m in enumerate(modules["default"])
        ]
    compare(theirs, ours, x, tensors)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, lambda n: nn.LayerNorm(n, bias=False)])
def test_ln_tuning(norm):
    """PEFT trains a copy of the norm, we the deviations from it; the gradients are the same."""
    base = norm(N)
    nn.init.normal_(base.weight)
    config = peft.LNTuningConfig(target_modules=["layer"])
    theirs, their, ours, own = pair(base, config, LNTune)
    frozen, trained = own.base, their.ln_tuning_layers["default"]
    with torch.no_grad():
        for name, deviation in (("weight", own.dg), ("bias", own.db)):
            if deviation is not None:
                deviation.copy_(getattr(trained, name) - getattr(frozen, name))
    x = torch.randn(2, 3, N, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    have, want = ours(inputs[1]), theirs(inputs[0])
    torch.testing.assert_close(have, want, **CLOSE)
    for y in (have, want):
        y.square().mean().backward()
    torch.testing.assert_close(own.dg.grad, trained.weight.grad, **CLOSE)
    if own.db is not None:
        torch.testing.assert_close(own.db.grad, trained.bias.grad, **CLOSE)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, **CLOSE)
    merged, plain = merge(ours).state_dict(), theirs.merge_and_unload().state_dict()
    for key, value in merged.items():
        torch.testing.assert_close(value, plain[key], **CLOSE)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(("make", "encoder"), [(llama, False), (gpt2, False), (gpt2, True)])
def test_prefix_tuning(make, encoder):
    """The same cache to begin with, positions after it included; PEFT's encoder is ours where it is
    as wide as the model.

    Of a batch that is padded on the left PEFT counts the padding as positions; we do not, so a row
    is what it is alone.
    """
    model, tokens = make().double().eval(), 3
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens,
        prefix_projection=encoder,
        encoder_hidden_size=32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
    random(theirs)
    ours = adapt(model, "all", partial(Prefix, tokens=tokens, encoder=32 if encoder else 0))
    (own,), their = wrappers(ours), theirs.prompt_encoder["default"]

    def layout(table):
        return table.view(tokens, *own.sizes).movedim(0, -2)

    pairs = (
        [(their.embedding.weight, own.E, same)]
        if encoder
        else [(their.embedding.weight, own.P, layout)]
    )
    if encoder:
        pairs += [
            (p, q, same)
            for p, q in zip(their.transform.parameters(), own.encoder.parameters(), strict=True)
        ]
    with torch.no_grad():
        for parameter, mine, by in pairs:
            mine.copy_(by(parameter))
    ids = torch.randint(1, 64, (2, 6))
    for mask in (None, torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])):
        have, want = (one(input_ids=ids, attention_mask=mask).logits for one in (ours, theirs))
        seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        torch.testing.assert_close(have[seen], want[seen], **CLOSE)
        for y in (have, want):
            y[seen].square().mean().backward()
        for parameter, mine, by in pairs:
            torch.testing.assert_close(mine.grad, by(parameter.grad), **CLOSE)
            mine.grad = parameter.grad = None
    with torch.no_grad():
        padded = ours(
            input_ids=ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
        ).logits
        torch.testing.assert_close(padded[0, 2:], ours(input_ids=ids[:1, 2:]).logits[0], **CLOSE)


@pytest.mark.parametrize(("method", "use_dora"), [(LoRA, False), (DoRA, True)])
def test_an_embedding_starts_as_that_of_peft(method, use_dora):
    """A is zero and B is normal, so that the first step of Adam moves it as far."""
    torch.manual_seed(0)
    tokens = torch.arange(0, 4000, 40)
    target = torch.randn(100, 32)
    base = nn.Embedding(4000, 32)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["0"], use_dora=use_dora)
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config)
    ours = method(base, rank=8, alpha=16)
    stored = {name.split(".")[-2]: p for name, p in theirs.named_parameters() if "lora_emb" in name}
    factors = [stored["lora_embedding_A"], ours.A], [stored["lora_embedding_B"], ours.B]
    assert not any(A.any() for A in factors[0])
    for B in factors[1]:
        assert abs(float(B.detach().std()) - 1) < 0.2
    distances = []
    for model in (theirs, ours):
        start = model(tokens).detach()
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        (model(tokens) - target).square().mean().backward()
        optimizer.step()
        distances.append(float((model(tokens).detach() - start).norm()))
    assert distances[1] == pytest.approx(distances[0], rel=0.2)
