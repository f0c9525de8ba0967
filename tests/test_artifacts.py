import json
import logging
import math
from functools import partial

import pytest
import torch
from conftest import LINEAR_METHODS
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from adaptrank.artifacts import load_adapter, merge, read_adapter, save_adapter, unmerge
from adaptrank.artifacts.contents import spell_nest
from adaptrank.artifacts.header import digest_of
from adaptrank.artifacts.merging import rounding_error
from adaptrank.axes import generator, rank_axes
from adaptrank.injection import adapt, set_enabled
from adaptrank.parameterizations import (
    HyperAdapt,
    LoRA,
    Parameterization,
    formula,
    wrapped_layers,
)

NESTS = [[cls] for cls in LINEAR_METHODS] + [
    [HyperAdapt, partial(LoRA, rank=2)],
    [partial(LoRA, rank=2), HyperAdapt],
]


def nest_name(nest):
    return "-".join(getattr(maker, "func", maker).__name__ for maker in nest)


def llama(seed=0, dtype=torch.float64, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return (
        GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16))
        .to(dtype)
        .eval()
    )


def logits(model):
    return model(torch.arange(12).reshape(2, 6)).logits


def train_a_little(model, seed=3):
    """Move every adapter tensor off its start, and give layers uneven ranks."""
    for number, (key, axis) in enumerate(rank_axes(model).items()):
        keep, largest = 1 + number % len(axis), axis.limits()[1]
        grow = number % 2 if largest is None or keep < largest else 0
        axis.resize(range(keep), grow, generator(seed, key, 1))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("nest", NESTS, ids=nest_name)
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_save_and_load_is_the_identity_under_another_seed(make, nest, tmp_path):
    model = train_a_little(adapt(make(), "all-linear", nest))
    save_adapter(model, tmp_path)
    torch.manual_seed(99)
    loaded = load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert {k: len(a) for k, a in rank_axes(loaded).items()} == {
        k: len(a) for k, a in rank_axes(model).items()
    }
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("nest", NESTS, ids=nest_name)
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_merging_keeps_the_function_and_unmerging_restores_every_bit(make, nest):
    model = train_a_little(adapt(make(), "all-linear", nest))
    before = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if not all(method.mergeable for method in nest if isinstance(method, type)):
        with pytest.raises(ValueError, match="has no dense form and cannot be merged"):
            merge(model)
        assert torch.equal(logits(model), before)
        return
    merge(model, keep_originals=True)
    assert not wrapped_layers(model)
    assert any(isinstance(m, nn.Linear | Conv1D) for m in model.modules())
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)
    unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ten_cycles_of_merging_do_not_drift(dtype):
    model = train_a_little(adapt(llama(dtype=dtype), "all-linear", [LoRA]))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    merged = None
    for _ in range(10):
        merge(model, keep_originals=True)
        weight = model.model.layers[0].self_attn.q_proj.weight.clone()
        assert merged is None or torch.equal(weight, merged)
        assert weight.dtype == dtype
        merged = weight
        unmerge(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_merging_sums_in_float32_and_casts_once():
    model = train_a_little(adapt(llama(dtype=torch.bfloat16), "all-linear", [HyperAdapt, LoRA]))
    layer = model.model.layers[0].mlp.up_proj
    exact = layer.dense()
    assert exact.dtype == torch.float32
    merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, exact.to(torch.bfloat16))


def test_a_weak_adapter_lost_in_rounding_is_said(caplog):
    model = adapt(llama(dtype=torch.bfloat16), "all-linear", [LoRA])
    for layer in wrapped_layers(model).values():
        layer.B.data.normal_(std=1e-6)
    with caplog.at_level(logging.WARNING, "adaptrank"):
        merge(model)
    assert "Merging lost" in caplog.text
    assert "float32" in caplog.text


@pytest.mark.parametrize(
    ("size", "dtype", "loss"),
    [
        (2e-2, torch.bfloat16, 0.083),
        (2e-2, torch.float16, 0.010),
        (2e-4, torch.bfloat16, 0.96),
        (2e-4, torch.float16, 0.67),
        (2e-5, torch.bfloat16, 0.996),
    ],
)
def test_what_rounding_takes_of_a_change(size, dtype, loss):
    """The figures of a 768 x 768 weight of std 0.02, whose change has `size` of its norm."""
    holder = nn.Sequential(nn.Linear(768, 768, bias=False))
    nn.init.normal_(holder[0].weight, std=0.02)
    holder.to(dtype).float()  # what is stored in that dtype
    adapt(holder, "0", partial(LoRA, rank=8))
    layer = holder[0]
    nn.init.normal_(layer.A), nn.init.normal_(layer.B)
    layer.B.data *= size * layer.base_weight.norm() / (layer.scale * layer.B @ layer.A).norm()
    assert math.isclose(rounding_error(holder, dtype), loss, rel_tol=0.06)


def test_what_rounding_takes_of_one_number_by_hand():
    holder = nn.Sequential(nn.Linear(1, 1, bias=False))
    holder[0].weight.data.fill_(1.0)
    adapt(holder, "0", partial(LoRA, rank=1, alpha=1.0))
    holder[0].A.data.fill_(1.0)
    holder[0].B.data.fill_(2.0**-9)  # half of an ulp of bf16 above 1: it rounds back to 1
    assert rounding_error(holder, torch.bfloat16) == 1
    holder[0].B.data.fill_(3 * 2.0**-9)  # rounds to 2^-7, the even one: a third of it is added
    assert math.isclose(rounding_error(holder, torch.bfloat16), 1 / 3, rel_tol=1e-6)


def test_a_merge_that_fails_leaves_the_model_as_it_was():
    model = train_a_little(adapt(llama(), "all-linear", [LoRA]))
    last = model.model.layers[1].mlp.down_proj
    last.B.data.fill_(float("inf"))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.down_proj: the merged weight is not finite"
    ):
        merge(model)
    assert len(wrapped_layers(model)) == 14
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_tied_weight_is_not_merged_into():
    model = llama(tie_word_embeddings=True)
    adapt(model, "lm_head", [LoRA])
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
        merge(model)


class Twice(nn.Module):
    """One block under two parents, and one layer used twice in a sequence."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        layer = nn.Linear(6, 6)
        self.left, self.right = nn.Sequential(block), nn.Sequential(block)
        self.tail = nn.Sequential(layer, nn.Tanh(), layer)

    def forward(self, x):
        return self.tail(self.right(self.left(x)))


def test_a_layer_used_at_several_places_is_one_layer(tmp_path):
    x = torch.randn(3, 6)
    model = adapt(Twice(), "all-linear", [LoRA])
    assert list(wrapped_layers(model)) == ["left.0.0", "tail.0"]
    assert model.tail[0] is model.tail[2]
    for layer in wrapped_layers(model).values():
        layer.B.data.normal_()
    before = model(x)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(Twice(), tmp_path)(x), before)
    merge(model, keep_originals=True)
    assert isinstance(model.tail[2], nn.Linear)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(unmerge(model)(x), before)


def test_a_merged_model_is_not_adapted_or_merged_again():
    model = merge(adapt(llama(), "all-linear", [LoRA]), keep_originals=True)
    with pytest.raises(ValueError, match=r"is merged.*unmerge\(\) it"):
        adapt(model, "all-linear", [LoRA])
    with pytest.raises(ValueError, match=r"is merged already.*unmerge\(\) it"):
        merge(model)


def test_nothing_to_merge_or_unmerge_or_save(tmp_path):
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge(llama())
    with pytest.raises(ValueError, match="keep_originals=True"):
        unmerge(llama())
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_file_says_all_and_holds_no_frozen_weight(tmp_path):
    model = train_a_little(adapt(llama(), ["q_proj"], [HyperAdapt, partial(LoRA, rank=2)]))
    save_adapter(model, tmp_path, {"name": "tiny"})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = "model.layers.0.self_attn.q_proj"
    assert {k for k in tensors if k.startswith(path)} == {
        f"{path}.0.da",
        f"{path}.0.dc",
        f"{path}.1.A",
        f"{path}.1.B",
    }
    description = read_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == description
    assert description["base"]["name"] == "tiny"
    (entry,) = description["adapters"]
    assert [w["class"] for w in entry["nest"]] == ["HyperAdapt", "LoRA"]
    assert entry["nest"][1]["init_args"]["rank"] == 2
    assert entry["layers"][path] == [32, 32]
    assert description["ranks"] == {key: len(axis) for key, axis in rank_axes(model).items()}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert len({p.stat().st_mode for p in tmp_path.iterdir()}) == 1, (
        "whoever can read one can read both"
    )


def test_extra_trained_modules_travel_with_the_adapter(tmp_path):
    model = adapt(llama(), ["q_proj"], [LoRA], train_modules=["norm"])
    train_a_little(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert loaded.model.norm.weight.requires_grad
    assert torch.equal(logits(loaded), logits(model))


def test_two_named_adapters_in_one_file(tmp_path):
    model = adapt(llama(), ["q_proj"], [LoRA], name="first")
    adapt(model, ["q_proj", "v_proj"], [HyperAdapt], name="second")
    train_a_little(model)
    save_adapter(model, tmp_path)
    loaded = load_adapter(llama(), tmp_path)
    for on in (True, ["first"], ["second"], False):
        set_enabled(model, on)
        set_enabled(loaded, on)
        assert torch.equal(logits(loaded), logits(model))


def test_loading_into_the_same_wrappers_and_not_into_others(tmp_path):
    model = train_a_little(adapt(llama(), "all-linear", [partial(LoRA, rank=4)]))
    save_adapter(model, tmp_path)
    same = load_adapter(adapt(llama(), "all-linear", [partial(LoRA, rank=4)]), tmp_path)
    assert torch.equal(logits(same), logits(model))
    other = adapt(llama(), "all-linear", [HyperAdapt])
    with pytest.raises(ValueError, match=r"already carries HyperAdapt.*holds LoRA\(rank=4"):
        load_adapter(other, tmp_path)


def test_another_base_is_said_in_one_line(tmp_path, caplog):
    save_adapter(adapt(llama(), "all-linear", [LoRA]), tmp_path, {"name": "tiny"})
    with caplog.at_level(logging.WARNING, "adaptrank"):
        load_adapter(llama(), tmp_path)
        load_adapter(llama(dtype=torch.bfloat16), tmp_path)
    assert not caplog.records, "the same weights in another dtype are the same base"
    with caplog.at_level(logging.WARNING, "adaptrank"):
        load_adapter(llama(seed=1), tmp_path)
    assert [
        r.getMessage().startswith(
            "The base differs from the one this adapter was trained on (tiny;"
        )
        for r in caplog.records
    ] == [True]


def test_a_base_of_another_shape_is_refused_before_anything_is_wrapped(tmp_path):
    save_adapter(adapt(llama(), "all-linear", [LoRA]), tmp_path)
    torch.manual_seed(0)
    small = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=50,
        )
    )
    with pytest.raises(
        ValueError, match=r"q_proj of shape \(32, 32\), and this model's is \(16, 16\)"
    ):
        load_adapter(small, tmp_path)
    other_names = gpt2()
    with pytest.raises(ValueError, match="which this model does not have"):
        load_adapter(other_names, tmp_path)
    assert not wrapped_layers(small)
    assert not wrapped_layers(other_names)


def test_files_that_are_no_adapter(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No adapter at .*adapter_model.safetensors"):
        load_adapter(llama(), tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        FileNotFoundError, match=r"adapter_model.bin is a pickle, which is never loaded"
    ):
        load_adapter(llama(), tmp_path)
    save_file({"x": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="is no adaptrank adapter"):
        load_adapter(llama(), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(llama(), tmp_path)
    run = tmp_path / "run"
    save_adapter(adapt(llama(), "all-linear", [LoRA]), run / "adapter")
    with pytest.raises(FileNotFoundError, match=r"Did you mean .*run/adapter"):
        load_adapter(llama(), run)


def edit(folder, change, rewrite_digest=True):
    """Rewrite an adapter's tensors or description, as someone would who knows the format."""
    file = folder / "adapter_model.safetensors"
    tensors, description = load_file(file), read_adapter(folder)
    change(tensors, description)
    if rewrite_digest and "digest" in description:
        description["digest"] = digest_of(description, tensors)
    save_file(tensors, file, metadata={"adaptrank": json.dumps(description)})


def test_missing_unexpected_and_uneven_tensors_are_named(tmp_path):
    key = "model.layers.0.self_attn.q_proj.0.A"
    made = adapt(llama(), "all-linear", [LoRA])
    for folder, change, words in (
        ("missing", lambda t, d: t.pop(key), rf"it has no tensor {key}"),
        (
            "extra",
            lambda t, d: t.update({"strange": torch.zeros(1)}),
            r"it has an unexpected tensor strange",
        ),
        (
            "uneven",
            lambda t, d: t.update({key: torch.zeros(3, 32)}),
            r"stored with different ranks",
        ),
        (
            "class",
            lambda t, d: d["adapters"][0]["nest"][0].update({"class": "LoRX"}),
            r"'LoRX', which is not defined",
        ),
        (
            "future",
            lambda t, d: d.update({"format_version": 99}),
            r"has format 99; .* reads up to 2",
        ),
    ):
        save_adapter(made, tmp_path / folder)
        edit(tmp_path / folder, change)
        fresh = llama()
        with pytest.raises(ValueError, match=words):
            load_adapter(fresh, tmp_path / folder)
        assert not wrapped_layers(fresh), "a file that does not fit leaves the model as it was"
        assert all(parameter.requires_grad for parameter in fresh.parameters())


class SharedScale(Parameterization):
    """W' = W + M a^T with M tied across layers: a toy for what `shared` means on disk."""

    source = "none"
    axes = {"rank": {"a": 0, "M": 1}}
    shared = ("M",)

    def __init__(self, base: nn.Module, *, rank: int = 3) -> None:
        super().__init__(base)
        m, n = self.shape
        self.a = self.zeros(rank, n)
        nn.init.normal_(self.a)
        self.M = self.zeros(m, rank)

    @formula
    def weight(self):
        return self.base_weight + self.gated("M") @ self.a

    def delta(self, x, y):
        return x @ self.a.T @ self.gated("M").T


def test_a_tied_tensor_is_written_once_and_tied_again(tmp_path):
    model = adapt(llama(), ["q_proj"], [SharedScale])
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(key.endswith(".M") for key in tensors) == 1
    loaded = load_adapter(llama(), tmp_path)
    first, second = (layer.self_attn.q_proj for layer in loaded.model.layers)
    assert first.M is second.M
    assert torch.equal(logits(loaded), logits(model))


def test_a_merged_model_is_a_plain_transformers_model(tmp_path):
    model = train_a_little(
        adapt(llama(dtype=torch.float32), "all-linear", [HyperAdapt, partial(LoRA, rank=2)])
    )
    before = logits(model)
    merge(model).save_pretrained(tmp_path)
    plain = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-4)


def test_a_tied_head_that_is_trained_whole_is_written_once(tmp_path):
    model = adapt(gpt2(), ["c_fc"], LoRA, train_modules=["lm_head"])
    assert model.lm_head.weight is model.transformer.wte.weight
    model.lm_head.weight.data += 1
    save_adapter(model, tmp_path)
    loaded = load_adapter(gpt2(), tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.lm_head.weight.requires_grad


def test_a_sentence_shows_a_few_wrappers_of_a_deep_nest():
    nest = [{"class": "LoRA", "init_args": {"rank": i}, "name": "default"} for i in range(16)]
    assert spell_nest(nest) == "LoRA(rank=15) on LoRA(rank=14) on LoRA(rank=13) on 13 more"
    assert spell_nest(nest[:2]) == "LoRA(rank=1) on LoRA(rank=0)"
