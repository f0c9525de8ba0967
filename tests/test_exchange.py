"""Adapters in PEFT's format.

PEFT loads what we export, with equal logits. We read what PEFT wrote. Both ways are a round trip.
"""

import copy
import json
import math
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from adaptrank import adapt, load_adapter, rank_axes, save_adapter
from adaptrank._errors import UserError, UserTypeError
from adaptrank.axes import generator
from adaptrank.interop.peft import export_peft, import_peft
from adaptrank.parameterizations import (
    NOLA,
    SVD,
    DoRA,
    HyperAdapt,
    Kronecker,
    LNTune,
    LoKr,
    LoRA,
    MELoRA,
    PiCa,
    SBoRA,
    wrapped_layers,
)
from adaptrank.testing import perturb

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft", minversion="0.21")

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
ids = torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(0))


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).double().eval()


def gpt2():
    torch.manual_seed(0)
    return (
        GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16))
        .double()
        .eval()
    )


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    return BertForSequenceClassification(config).double().eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def in_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(base, folder).double().eval()


def varied(model):
    """Ranks as an allocator leaves them, different from layer to layer."""
    for i, (key, axis) in enumerate(rank_axes(model).items()):
        size = 1 + i % 4
        kept = min(size, len(axis))
        grow = size - kept if "grow" in axis.capabilities else 0
        axis.resize(range(kept), grow, generator(0, key, 1))
    return model


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "method",
    [
        partial(LoRA, rank=2, alpha=6),
        partial(LoRA, rank=2, alpha=6, rslora=True),
        partial(SVD, rank=2),
        partial(SBoRA, rank=2),
        partial(MELoRA, minis=2),
        partial(PiCa, rank=2, share=False),
        [partial(LoRA, rank=2), partial(SVD, rank=2)],
    ],
    ids=["LoRA", "rsLoRA", "SVD", "SBoRA", "MELoRA", "PiCa", "nest"],
)
def test_a_variable_rank_adapter_leaves_for_peft_with_equal_logits(tmp_path, make, method, uniform):
    model = adapt(make(), "all-linear", method)
    perturb(model, 0.2)
    varied(model)
    want = logits(model)
    assert not torch.allclose(want, logits(make()))
    report = export_peft(model, tmp_path, {"name": "tiny"}, uniform=uniform)
    torch.testing.assert_close(logits(in_peft(make(), tmp_path)), want, rtol=1e-6, atol=1e-6)
    assert all(facts["error"] == 0 for facts in report["layers"].values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {facts["rank"] for facts in report["layers"].values()}
    assert len(ranks) > 1
    if uniform:
        assert config["r"] == config["lora_alpha"] == max(ranks)
        assert "rank_pattern" not in config
        with peft_header(tmp_path) as header:
            assert set(json.loads(header["ranks"]).values()) == ranks
    again = import_peft(make(), tmp_path)
    torch.testing.assert_close(logits(again), want, rtol=1e-6, atol=1e-6)


def peft_header(folder):
    from contextlib import nullcontext

    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", framework="pt") as stored:
        return nullcontext(stored.metadata())


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (llama, partial(DoRA, rank=2)),
        (gpt2, partial(DoRA, rank=2)),
        (llama, partial(NOLA, rank=2)),
        (gpt2, partial(NOLA, rank=2)),
        (llama, partial(LoKr, rank=2)),  # PEFT's wraps no Conv1D
        (llama, partial(LoKr, rank=2, factor=11)),  # PEFT makes other pairs of a factor of 11
    ],
)
def test_methods_that_peft_has_as_well(tmp_path, make, method):
    model = adapt(make(), "all-linear", method)
    perturb(model, 0.2)
    if method.func is DoRA:
        varied(model)
    export_peft(model, tmp_path)
    torch.testing.assert_close(
        logits(in_peft(make(), tmp_path)), logits(model), rtol=1e-5, atol=1e-5
    )
    again = import_peft(make(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    if method.func is not NOLA:
        assert {type(layer) for layer in wrapped_layers(again).values()} == {method.func}


def test_parts_of_a_fused_layer_leave_as_one(tmp_path):
    model = adapt(gpt2(), r".*c_attn\.[qv]", partial(LoRA, rank=2), split_fused=True)
    perturb(model, 0.2)
    export_peft(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["c_attn"]
    assert config["r"] == 4
    assert config["fan_in_fan_out"]
    torch.testing.assert_close(
        logits(in_peft(gpt2(), tmp_path)), logits(model), rtol=1e-6, atol=1e-6
    )


def test_embeddings_and_a_head_trained_whole(tmp_path):
    model = adapt(
        bert(), ["word_embeddings", "query"], partial(LoRA, rank=2), train_modules=["classifier"]
    )
    perturb(model, 0.2)
    export_peft(
        model, tmp_path, {"name": "tiny", "auto_class": "AutoModelForSequenceClassification"}
    )
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(
        logits(in_peft(bert(), tmp_path)), logits(model), rtol=1e-6, atol=1e-6
    )
    again = import_peft(bert(), tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-6)
    assert again.classifier.weight.requires_grad


def test_convolutions(tmp_path):
    class Seeing(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.see = nn.Conv2d(3, 8, (3, 2), padding=1).double()

        def forward(self, x):
            return self.see(x)

    model = adapt(Seeing(), "see", partial(LoRA, rank=2))
    perturb(model, 0.2)
    export_peft(model, tmp_path)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(in_peft(Seeing(), tmp_path)(x), model(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(import_peft(Seeing(), tmp_path)(x), model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "method",
    [HyperAdapt, Kronecker, [HyperAdapt, partial(LoRA, rank=2)]],
    ids=["HyperAdapt", "Kronecker", "hybrid"],
)
def test_what_is_no_product_leaves_as_a_lora_of_a_stated_rank_or_error(tmp_path, method):
    model = adapt(llama(), "all-linear", method)
    perturb(model, 0.05)
    with pytest.raises(
        ValueError, match="a LoRA can only come near it: state the rank or the error"
    ):
        export_peft(model, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    report = export_peft(model, tmp_path / "near", error=0.3)
    assert all(0 < facts["error"] <= 0.3 for facts in report["layers"].values())
    report = export_peft(model, tmp_path / "four", rank=4)
    assert {facts["rank"] for facts in report["layers"].values()} == {4}
    report = export_peft(model, tmp_path / "whole", rank=48)
    torch.testing.assert_close(
        logits(in_peft(llama(), tmp_path / "whole")), logits(model), rtol=1e-5, atol=1e-5
    )


def test_what_has_no_place_in_peft(tmp_path):
    with pytest.raises(ValueError, match="no adapter to export"):
        export_peft(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"LNTune at .* changes no single matrix"):
        export_peft(adapt(llama(), ".*layernorm", LNTune), tmp_path)
    mixed = adapt(adapt(llama(), ".*q_proj", LoRA), ".*v_proj", DoRA)
    with pytest.raises(
        ValueError, match="One PEFT adapter is of one kind, and these layers are DoRA and LORA"
    ):
        export_peft(mixed, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- in


def theirs(config, make=llama):
    """A random adapter of PEFT's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(make(), config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "ranknum" not in name:
                parameter.normal_(std=0.2)
    return model


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=ALL),
        lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules=ALL, use_rslora=True),
        lambda: peft.LoraConfig(
            r=3,
            lora_alpha=7,
            target_modules=ALL,
            rank_pattern={"q_proj": 5, r".*\.1\.mlp\.up_proj": 1},
            alpha_pattern={"v_proj": 2},
        ),
        lambda: peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", use_dora=True),
        lambda: peft.AdaLoraConfig(
            init_r=3, target_r=2, lora_alpha=7, target_modules=ALL, total_step=10
        ),
        lambda: peft.LoKrConfig(r=2, alpha=7, target_modules=ALL, decompose_factor=4),
        # It divides no side, so that PEFT's pairs of sizes are others than those of our factor.
        lambda: peft.LoKrConfig(r=2, alpha=7, target_modules=ALL, decompose_factor=11),
    ],
    ids=["LoRA", "rsLoRA", "patterns", "DoRA", "AdaLoRA", "LoKr", "LoKr, other pairs"],
)
def test_what_peft_wrote_is_read_and_goes_back(tmp_path, config):
    model = theirs(config())
    model.save_pretrained(tmp_path / "theirs")
    ours = import_peft(llama(), tmp_path / "theirs")
    want = logits(model)
    torch.testing.assert_close(logits(ours), want, rtol=1e-5, atol=1e-5)
    export_peft(ours, tmp_path / "back")
    torch.testing.assert_close(
        logits(in_peft(llama(), tmp_path / "back")), want, rtol=1e-5, atol=1e-5
    )
    save_adapter(ours, tmp_path / "own")
    torch.testing.assert_close(
        logits(load_adapter(llama(), tmp_path / "own")), logits(ours), rtol=0, atol=0
    )


def test_a_pair_that_peft_cannot_make_is_refused(tmp_path):
    model = adapt(llama(), ".*q_proj", partial(LoKr, rank=2, factor=[2, 4]))
    with pytest.raises(ValueError, match="makes a 2 x 4 factor of a 32 x 32 layer; merge"):
        export_peft(model, tmp_path)


def test_refused_imports_leave_the_model_as_it_was(tmp_path):
    good = tmp_path / "good"
    theirs(peft.LoraConfig(r=3, target_modules=ALL)).save_pretrained(good)

    def changed(name, **more):
        folder = tmp_path / name
        folder.mkdir()
        config = json.loads((good / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **more}))
        (folder / "adapter_model.safetensors").write_bytes(
            (good / "adapter_model.safetensors").read_bytes()
        )
        return folder

    cases = [
        (tmp_path / "missing", "has no adapter_config.json"),
        (changed("kind", peft_type="IA3"), "of PEFT's kind IA3, which is not imported"),
        (changed("bias", bias="all"), "trained with bias='all'"),
        (changed("rank", r=4), "states a rank of 4 for model.layers.0"),
        (changed("dora", use_dora=True), "says use_dora, and has no lora_magnitude_vector"),
    ]
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_config.json").write_text("{}")
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"x")
    cases.append((tmp_path / "pickle", "adapter_model.bin is a pickle, which is never loaded"))
    torn = changed("torn")
    (torn / "adapter_model.safetensors").write_bytes(
        (good / "adapter_model.safetensors").read_bytes()[:-9]
    )
    cases.append((torn, "is damaged"))
    for folder, sentence in cases:
        model = llama()
        before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            import_peft(model, folder)
        assert [type(m) for m in model.modules()] == kinds
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="which is no layer of this model"):
        import_peft(gpt2(), good)


def test_scales_survive():
    assert math.isclose(
        LoRA(nn.Linear(4, 4), rank=4, alpha=3 * math.sqrt(4)).scale,
        LoRA(nn.Linear(4, 4), rank=4, alpha=3, rslora=True).scale,
    )


HOSTILE = [
    None,
    True,
    -1,
    0,
    10**12,
    -(10**30),
    1.5,
    float("nan"),
    "",
    "x" * 3000,
    "(",
    ".*",
    [],
    {},
    [None],
    {"(": 1},
    {".*": "x"},
    {".*": 10**9},
]


@pytest.mark.parametrize("kind", ["lora", "adalora", "lokr"])
@pytest.mark.parametrize("count", [40, pytest.param(400, marks=pytest.mark.tables)])
def test_strange_folders_of_each_kind_are_read_or_refused(tmp_path, kind, count):
    import random
    import shutil

    from safetensors.torch import load_file, save_file

    config = {
        "lora": peft.LoraConfig(r=3, target_modules=ALL, rank_pattern={"q_proj": 2}),
        "adalora": peft.AdaLoraConfig(init_r=3, target_r=2, target_modules=ALL, total_step=10),
        "lokr": peft.LoKrConfig(r=2, target_modules=ALL),
    }[kind]
    theirs(config).save_pretrained(tmp_path / "good")
    draw, refused = random.Random(kind), 0
    base = llama()
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", folder)
        file, said = folder / "adapter_model.safetensors", folder / "adapter_config.json"
        how = draw.randrange(4)
        if how == 0:
            data = bytearray(file.read_bytes())
            data[draw.randrange(min(len(data), 4000))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
        elif how == 1:
            tensors = load_file(file)
            key = draw.choice(sorted(tensors))
            value = tensors.pop(key)
            if draw.random() < 0.7:
                other = draw.choice([key, f"{key}x", "x", "base_model.model.lm_head.weight"])
                tensors[other] = draw.choice(
                    [
                        value.flatten(),
                        value[:0],
                        value.to(torch.int64),
                        torch.zeros(5, 3),
                        torch.zeros(()),
                    ]
                )
            save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        else:
            settings = json.loads(said.read_text())
            settings[draw.choice(sorted(settings))] = draw.choice(HOSTILE)
            said.write_text(json.dumps(settings))
        model = copy.deepcopy(base)
        before = base.state_dict()
        error = None
        try:
            import_peft(model, folder)
        except Exception as raised:
            error = raised
        assert error is None or type(error) in (UserError, UserTypeError, FileNotFoundError), (
            number,
            how,
            repr(error),
        )
        if error is not None:
            refused += 1
            assert "\n" not in str(error).strip(), (number, how, str(error))
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
            assert not wrapped_layers(model)
    assert refused > count / 5
