"""Query, key and value in one layer: its parts as layers of their own, and one layer again."""

import copy
import json
import logging
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from adaptrank import (
    adapt,
    delete_adapter,
    load_adapter,
    merge,
    rank_axes,
    save_adapter,
    select_rows,
    unmerge,
)
from adaptrank.artifacts import describe_adapter, read_adapter
from adaptrank.artifacts.header import digest_of
from adaptrank.axes import generator
from adaptrank.data import ArithmeticProblems
from adaptrank.layers import Parts
from adaptrank.modules import Adapter, CausalLM
from adaptrank.parameterizations import (
    SVD,
    DoRA,
    HyperAdapt,
    LoRA,
    Parameterization,
    wrapped_layers,
)
from adaptrank.testing import perturb

C_ATTN = [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
QKV = [f"{path}.{part}" for path in C_ATTN for part in "qkv"]


def gpt2(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=50,
        n_positions=16,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
        **changes,
    )
    model = GPT2LMHeadModel(config).to(dtype).eval()
    for block in model.transformer.h:
        nn.init.normal_(block.attn.c_attn.bias)
    return model


IDS = torch.arange(1, 13).reshape(2, 6)


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def close(have, want):
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def split(model):
    return [path for path, module in model.named_modules() if isinstance(module, Parts)]


def unsplit(model, plain):
    """Everything is what it was: the same modules, tensors and flags."""
    assert not split(model)
    assert list(model.modules()) == plain["modules"]
    assert {n: id(p) for n, p in model.named_parameters()} == plain["parameters"]
    assert all(p.requires_grad for p in model.parameters())


def state(model):
    return {
        "modules": list(model.modules()),
        "parameters": {n: id(p) for n, p in model.named_parameters()},
    }


class Spectral(Parameterization):
    """W' = W + U diag(d) V^T over the largest singular directions of W: a toy that reads the blocks
    of a weight."""

    source = "none"
    reads_blocks = True

    def __init__(self, base: nn.Module, *, rank: int = 3) -> None:
        super().__init__(base)
        U, _, V = torch.linalg.svd(self.base_weight)
        self.register_buffer("U", U[:, :rank].contiguous())
        self.register_buffer("V", V[:rank].contiguous())
        self.d = self.zeros(rank)

    @property
    def weight(self):
        return self.base_weight + self.U @ torch.diag(self.d) @ self.V

    def delta(self, x, y):
        return x @ self.V.T * self.d @ self.U.T


# ---- what becomes a layer


@pytest.mark.parametrize(
    ("targets", "exclude", "found"),
    [
        (["c_attn"], (), QKV),
        (["c_attn.q"], (), QKV[::3]),
        (["q", "v"], (), [p for p in QKV if not p.endswith("k")]),
        (r".*\.c_attn", (), QKV),
        (r".*h\.0\.attn\.c_attn\.[qk]", (), QKV[:2]),
        (["c_attn"], ["k"], [p for p in QKV if not p.endswith("k")]),
        (["c_attn"], [C_ATTN[0]], QKV[3:]),
        ("all-linear", r".*mlp.*|.*attn\.c_proj", QKV),
    ],
)
def test_targets_name_parts_and_what_is_split(targets, exclude, found):
    model = gpt2()
    want = logits(model)
    adapt(model, targets, LoRA, exclude=exclude, split_fused=True)
    assert list(wrapped_layers(model)) == found
    assert split(model) == [path for path in C_ATTN if any(p.startswith(path) for p in found)]
    assert all(layer.shape == (32, 32) for layer in wrapped_layers(model).values())
    close(logits(model), want)


def test_layers_whose_parts_nothing_names_stay_the_layers_they_are():
    model, plain = gpt2(), gpt2()
    attn = [block.attn.c_attn for block in model.transformer.h]
    adapt(model, ["h.0.attn.c_attn.q"], LoRA, split_fused=True)
    assert split(model) == C_ATTN[:1]
    assert model.transformer.h[1].attn.c_attn is attn[1]
    assert not any(p.requires_grad for p in attn[1].parameters())
    close(logits(model), logits(plain))


@pytest.mark.parametrize(
    ("method", "given", "parts"),
    [
        (LoRA, None, False),
        (Spectral, None, True),
        ([HyperAdapt, Spectral], None, True),
        (partial(Spectral, rank=2), None, True),
        (Spectral, False, False),
        (LoRA, {"c_attn": ["query", "key", "value"]}, True),
    ],
)
def test_by_default_only_what_reads_blocks_splits(method, given, parts):
    model = adapt(gpt2(), ["c_attn"], method, split_fused=given)
    assert bool(split(model)) is parts
    if given:
        assert list(wrapped_layers(model))[:3] == [
            f"{C_ATTN[0]}.{name}" for name in given["c_attn"]
        ]


def test_every_method_of_the_registry_says_what_it_reads(method):
    if not (method.wraps(nn.Linear(8, 8)) and method.wraps(Conv1D(8, 8))):
        return
    model = gpt2(torch.float32)
    want = logits(model)
    adapt(model, ["c_attn"], method)
    assert bool(split(model)) is method.reads_blocks
    if method.starts_at_base:
        torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_what_reads_blocks_sees_the_block_of_one_part():
    model = gpt2()
    fused = model.transformer.h[0].attn.c_attn.weight.detach().clone()
    adapt(model, ["c_attn"], Spectral)
    for number, part in enumerate("qkv"):
        block = fused[:, 32 * number : 32 * (number + 1)].T
        layer = getattr(model.transformer.h[0].attn.c_attn, part)
        assert torch.equal(layer.base_weight, block)
        U, S, V = torch.linalg.svd(block)
        close(layer.U @ torch.diag(S[:3]) @ layer.V, U[:, :3] @ torch.diag(S[:3]) @ V[:3])


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_that_is_fused(bias):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.gate_up_proj = nn.Linear(8, 24, bias=bias), nn.Linear(8, 40, bias=bias)

        def forward(self, x):
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            return self.qkv(x).sum(-1) + (gate.sigmoid() * up).sum(-1)

    model, x = Block().double(), torch.randn(3, 8, dtype=torch.float64)
    want = model(x)
    adapt(model, "all-linear", LoRA, split_fused=True)
    assert list(wrapped_layers(model)) == [
        "qkv.q",
        "qkv.k",
        "qkv.v",
        "gate_up_proj.gate",
        "gate_up_proj.up",
    ]
    close(model(x), want)
    perturb(model)
    want = model(x)
    assert not torch.allclose(merge(model)(x), Block().double()(x))
    close(model(x), want)
    assert isinstance(model.qkv, nn.Linear)
    assert (model.qkv.bias is not None) is bias


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"split_fused": {"c_attn": ["a", "b", "c", "d", "e"]}},
            "c_attn has 96 outputs, which are not 5 equal parts",
        ),
        (
            {"split_fused": {"c_atn": ["q", "k"]}},
            r"names 'c_atn', which is no layer here. Did you mean 'c_attn'\?",
        ),
        (
            {"split_fused": True, "parameterization": partial(SVD, rank=40)},
            r"c_attn\.q: rank=40 does not fit a 32x32 layer",
        ),
        ({"split_fused": True, "rank_pattern": {"o": 3}}, "rank_pattern names 'o'"),
        ({"split_fused": True, "targets": ["query"]}, "No layer matches targets='query'"),
        ({"split_fused": True, "exclude": ["w"]}, "exclude='w' names nothing"),
    ],
)
def test_a_failing_adapt_leaves_the_model_unsplit(arguments, sentence):
    model = gpt2()
    plain, want = state(model), logits(model)
    with pytest.raises(ValueError, match=sentence):
        adapt(model, **{"targets": ["c_attn"], "parameterization": LoRA, **arguments})
    unsplit(model, plain)
    assert torch.equal(logits(model), want)


def test_sizes_that_are_no_equal_parts_are_not_guessed():
    """Query and key of another width, as in multi-query attention: nothing says where to cut."""
    model = nn.ModuleDict({"c_attn": nn.Linear(32, 48), "o": nn.Linear(32, 32)})
    adapt(model, "all-linear", LoRA, split_fused=True)
    assert list(wrapped_layers(model)) == ["c_attn", "o"]


def test_a_layer_that_carries_an_adapter_as_a_whole_is_not_split():
    model = adapt(gpt2(), ["c_attn"], LoRA, name="a")
    modules = list(model.modules())
    for method, given in ((LoRA, True), (Spectral, None)):
        with pytest.raises(
            ValueError, match=r"c_attn carries an adapter as a whole, .*; say split_fused=False"
        ):
            adapt(model, ["c_attn"], method, name="b", split_fused=given)
        assert list(model.modules()) == modules
    adapt(model, ["c_attn"], LoRA, name="b", split_fused=False)


# ---- again, side by side, away again


def test_a_second_call_changes_nothing_and_a_second_adapter_takes_the_parts():
    call = partial(adapt, targets=["c_attn"], parameterization=LoRA, split_fused=True)
    model = call(gpt2())
    modules = list(model.modules())
    call(model)
    assert list(model.modules()) == modules
    adapt(
        model, ["c_attn"], HyperAdapt, name="b"
    )  # whether it asks for parts or not: there is no fused layer now
    assert [[type(w).__name__ for w in layer.nest] for layer in wrapped_layers(model).values()] == [
        ["LoRA", "HyperAdapt"]
    ] * 6


def test_deleting_joins_where_nothing_is_left():
    model = gpt2()
    want, keys = logits(model), list(model.state_dict())
    adapt(model, ["c_attn"], LoRA, name="a", split_fused=True)
    adapt(model, ["h.0.attn.c_attn.q"], HyperAdapt, name="b")
    perturb(model)
    delete_adapter(model, "a")
    assert split(model) == C_ATTN[:1]
    delete_adapter(model, "b")
    assert not split(model)
    assert list(model.state_dict()) == keys
    assert isinstance(model.transformer.h[0].attn.c_attn, Conv1D)
    assert torch.equal(logits(model), want)


def test_rows_of_a_batch():
    model = adapt(gpt2(), ["c_attn"], LoRA, name="a", split_fused=True)
    adapt(model, ["q", "c_fc"], HyperAdapt, name="b")
    perturb(model, 0.3)
    with select_rows(model, ["b", None]):
        have = logits(model)
    delete_adapter(model, "a")
    close(have[0], logits(model)[0])
    close(have[1], logits(gpt2())[1])


# ---- merging


@pytest.mark.parametrize("nest", [[LoRA], [Spectral], [HyperAdapt, LoRA], [DoRA]], ids=str)
@pytest.mark.parametrize("targets", [["c_attn"], ["q"], "all-linear"], ids=str)
def test_merging_gives_one_layer_and_unmerging_the_parts(nest, targets):
    model = adapt(gpt2(), targets, nest, split_fused=True)
    perturb(model, 0.2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want, modules = logits(model), list(model.modules())
    merge(model, keep_originals=True)
    assert not split(model)
    assert list(model.state_dict()) == list(gpt2().state_dict())
    assert all(type(block.attn.c_attn) is Conv1D for block in model.transformer.h)
    close(logits(model), want)
    unmerge(model)
    assert list(model.modules()) == modules
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(logits(model), want)


def test_a_merged_model_is_a_plain_transformers_model(tmp_path):
    model = adapt(gpt2(torch.float32), ["c_attn"], LoRA, split_fused=True)
    perturb(model)
    want = logits(model)
    merge(model).save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-4)


def test_a_merge_that_fails_leaves_the_parts():
    model = adapt(gpt2(), ["c_attn"], LoRA, split_fused=True)
    model.transformer.h[1].attn.c_attn.k.B.data.fill_(float("inf"))
    modules, before = list(model.modules()), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"c_attn\.k: the merged weight is not finite"):
        merge(model)
    assert list(model.modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- files


def trained(model):
    for number, (key, axis) in enumerate(rank_axes(model).items()):
        axis.resize(range(1 + number % 3), number % 2, generator(0, key, 1))
    perturb(model, 0.2)
    return model


def test_a_file_splits_a_fresh_model_again(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    model = trained(adapt(gpt2(), ["c_attn", "c_fc"], LoRA, split_fused=True))
    save_adapter(model, tmp_path)
    assert read_adapter(tmp_path)["split"] == {path: ["q", "k", "v"] for path in C_ATTN}
    again = load_adapter(gpt2(), tmp_path)
    assert list(wrapped_layers(again)) == list(wrapped_layers(model))
    assert torch.equal(logits(again), logits(model))
    assert {k: len(a) for k, a in rank_axes(again).items()} == {
        k: len(a) for k, a in rank_axes(model).items()
    }
    assert torch.equal(logits(load_adapter(again, tmp_path)), logits(model)), (
        "into what is split and wrapped already"
    )
    assert not caplog.records, "the same base, split or not"


def test_the_fingerprint_does_not_know_of_parts(tmp_path):
    def fingerprint(model):
        return describe_adapter(model)["base"]["fingerprint"]

    whole = fingerprint(adapt(gpt2(), ["c_attn"], LoRA))
    assert fingerprint(adapt(gpt2(), ["c_attn"], LoRA, split_fused=True)) == whole
    assert (
        fingerprint(trained(adapt(gpt2(), ["h.0.attn.c_attn.v"], DoRA, split_fused=True))) == whole
    )
    other = gpt2()
    other.transformer.h[0].attn.c_attn.weight.data[:, 32:64] += 1
    assert fingerprint(adapt(other, ["c_attn"], LoRA, split_fused=True)) != whole


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda d: d["adapters"][0]["layers"].update({QKV[0]: [32, 16]}), "of shape"),
        (lambda d: d["adapters"][0]["nest"][0]["init_args"].update({"rank": 0}), "rank=0"),
        (
            lambda d: d["split"].update({C_ATTN[1]: ["a", "b", "c", "d", "e"]}),
            "parts a, b, c, d, e of a linear layer",
        ),
        (
            lambda d: d["split"].update({"transformer.h": ["q"]}),
            r"transformer\.h, which is none here",
        ),
    ],
)
def test_a_failing_load_leaves_the_model_unsplit(damage, sentence, tmp_path):
    from safetensors.torch import load_file, save_file

    save_adapter(trained(adapt(gpt2(), ["c_attn"], LoRA, split_fused=True)), tmp_path)
    file, description = tmp_path / "adapter_model.safetensors", read_adapter(tmp_path)
    damage(description)
    description["digest"] = digest_of(description, load_file(file))
    save_file(load_file(file), file, metadata={"adaptrank": json.dumps(description)})
    model = gpt2()
    plain = state(model)
    with pytest.raises(ValueError, match=sentence):
        load_adapter(model, tmp_path)
    unsplit(model, plain)


def test_files_of_wholes_and_of_parts_do_not_mix(tmp_path):
    whole, parts = (
        adapt(gpt2(), ["c_attn"], LoRA),
        adapt(gpt2(), ["c_attn"], LoRA, split_fused=True),
    )
    save_adapter(whole, tmp_path / "whole")
    save_adapter(parts, tmp_path / "parts")
    with pytest.raises(ValueError, match=r"c_attn as a whole, and here it is split into q, k, v"):
        load_adapter(copy.deepcopy(parts), tmp_path / "whole")
    with pytest.raises(
        ValueError,
        match=r"parts q, k, v of a linear layer .*, which carries an adapter as a whole here",
    ):
        load_adapter(copy.deepcopy(whole), tmp_path / "parts")


# ---- checkpoints


def test_a_run_with_parts_resumes_bit_by_bit(tiny_gpt2, tmp_path):
    def run(folder, steps, ckpt_path=None):
        torch.manual_seed(1 if ckpt_path is None else 2)
        entry = Adapter(
            [partial(LoRA, rank=2, dropout=0.1)], targets=["c_attn", "c_fc"], split_fused=True
        )
        module = CausalLM(
            tiny_gpt2, [entry], dtype="fp32", generate=False, warmup=0, schedule="constant"
        )
        trainer = Trainer(
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            num_sanity_val_steps=0,
            max_steps=steps,
            limit_val_batches=0,
            callbacks=[
                ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1, filename="{step}")
            ],
        )
        data = ArithmeticProblems(batch_size=2, train_size=16, val_size=2)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        return module

    whole = run(tmp_path / "whole", 4)
    assert split(whole.model) == C_ATTN
    run(tmp_path / "part", 2)
    file = tmp_path / "part" / "step=2.ckpt"
    keys = torch.load(file, weights_only=True)["state_dict"].keys()
    assert {key for key in keys if "c_attn" in key} == {
        f"backbone.{path}.{name}" for path in QKV for name in "AB"
    }
    rest = run(tmp_path / "rest", 4, str(file))
    state, other = whole.trained_state(), rest.trained_state()
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[key]) for key, value in state.items())
    save_adapter(whole.model, tmp_path / "adapter")
    warm = CausalLM(tiny_gpt2, adapter=str(tmp_path / "adapter"), dtype="fp32")
    warm.configure_model()
    assert split(warm.model) == C_ATTN
    ids = torch.arange(3, 9)[None]
    whole.eval(), warm.eval()
    assert torch.equal(warm.model(ids).logits, whole.model(ids).logits)


def test_a_file_splits_nothing_that_only_another_adapter_has_split(tmp_path):
    model = adapt(gpt2(), ["attn.c_attn"], SVD, name="other", split_fused=True)
    adapt(model, ["mlp.c_fc"], LoRA, name="own")
    save_adapter(model, tmp_path, names=["own"])
    assert read_adapter(tmp_path)["split"] == {}
    host = adapt(gpt2(), ["attn.c_attn"], LoRA, name="whole", split_fused=False)
    load_adapter(host, tmp_path)
    assert {w.name for layer in wrapped_layers(host).values() for w in layer.nest} == {
        "whole",
        "own",
    }
