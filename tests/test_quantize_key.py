"""The key `quantize`: a plain backbone is loaded in 4 or 8 bits, trains, is saved and goes on."""

import importlib.util
import logging
import re
from functools import partial

import pytest
import torch
import yaml
from conftest import perturb
from lightning.pytorch.callbacks import ModelCheckpoint
from loading_runs import Losses, causal, command, fit, trained
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig, RobertaModel

from adaptrank import layers, load_adapter, save_adapter
from adaptrank.artifacts import read_adapter
from adaptrank.modules import Adapter, SequenceClassification
from adaptrank.parameterizations import LoRA, wrapped_layers

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

KINDS = ["nf4", "fp4", "int8", "llm-int8"]
IDS = torch.arange(3, 19).reshape(2, 8)


def built(folder, **arguments):
    module = causal(folder, **arguments)
    module.configure_model()
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_linear_layers_are_quantized_and_nothing_else(kind, tiny_llama):
    module = built(tiny_llama, quantize=kind)
    assert module.frozen_form == kind
    model = module.model
    for path, module in model.named_modules():
        inside = getattr(module, "innermost", module)
        if isinstance(inside, nn.Linear) and path != "lm_head" and not path.endswith(".base"):
            assert layers.quantization(inside)["type"] == kind, path
    assert not layers.quantized(model.lm_head)
    assert not layers.quantized(model.get_input_embeddings())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_over_the_dequantized_weights(kind, tiny_llama):
    module = built(tiny_llama, quantize=kind)
    plain = built(tiny_llama)
    perturb(module.model)
    for path, layer in wrapped_layers(module.model).items():
        other = wrapped_layers(plain.model)[path]
        other.load_state_dict(
            {n: p for n, p in layer.state_dict().items() if not n.startswith("base.")}, strict=False
        )
    with torch.no_grad():
        for path, layer in plain.model.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.copy_(layers.dequantize(module.model.get_submodule(path)))
    gradients = []
    for each in (module, plain):
        each.train()
        each.model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in each.parameters() if p.requires_grad])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
        assert want.any()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_it_trains_and_resumes_to_the_bit(kind, tiny_llama, tmp_path):
    losses = Losses()
    whole = causal(tiny_llama, quantize=kind)
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(whole, callbacks=[losses, every], max_steps=9, enable_checkpointing=True)
    assert sum(losses.seen[-3:]) < sum(losses.seen[:3])
    rest = causal(tiny_llama, quantize=kind)
    fit(rest, ckpt_path=tmp_path / "step=4.ckpt", max_steps=9)
    want, got = trained(whole), trained(rest)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    with pytest.raises(ValueError, match=r"quantize is not set here and \{'type': '"):
        fit(causal(tiny_llama), ckpt_path=tmp_path / "step=4.ckpt", max_steps=9)


def test_evaluation_changes_no_weight_of_training(tiny_llama, monkeypatch):
    # As on a CPU with these instructions, for which bitsandbytes packs weights anew.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    module = built(tiny_llama, quantize="nf4")
    model = module.model
    before = layers.dequantize(model.model.layers[0].mlp.up_proj).clone()
    with torch.no_grad():
        evaluated = model.eval()(IDS).logits
        trained_mode = model.train()(IDS).logits
    assert torch.equal(layers.dequantize(model.model.layers[0].mlp.up_proj), before)
    assert torch.equal(evaluated, trained_mode)
    is_packing = [
        m.support_avx512bf16_for_cpu for m in model.modules() if hasattr(m, "quant_state")
    ]
    assert is_packing
    assert not any(is_packing)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_file_says_how_and_other_forms_of_the_base_are_told(kind, tiny_llama, tmp_path, caplog):
    module = built(tiny_llama, quantize=kind)
    perturb(module.model)
    save_adapter(module.model, tmp_path / "a", module.describe_base())
    assert read_adapter(tmp_path / "a")["base"]["quantization"]["type"] == kind
    caplog.set_level(logging.WARNING, "adaptrank")
    again = built(tiny_llama, quantize=kind, adapters=None, adapter=str(tmp_path / "a"))
    assert not caplog.records
    with torch.no_grad():
        assert torch.equal(again.model(IDS).logits, module.model(IDS).logits)
    plain = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "a")
    (record,) = caplog.records
    sentence = record.getMessage()
    assert f"quantized to {kind}): here it is not quantized. Results will differ by" in sentence
    save_adapter(plain, tmp_path / "b")
    caplog.clear()
    built(tiny_llama, quantize=kind, adapters=None, adapter=str(tmp_path / "b"))
    assert f"not quantized): here it is quantized to {kind}" in caplog.text
    # Another model is another base, however it is quantized.
    caplog.clear()
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        other.model.norm.weight.add_(1)
    load_adapter(other, tmp_path / "a")
    assert "fingerprint" in caplog.text


def test_options_of_four_bits(tiny_llama):
    model = built(tiny_llama, quantize={"type": "nf4", "double_quant": False}).model
    layer = model.model.layers[0].mlp.up_proj
    assert layers.quantization(layer) == {"type": "nf4", "double_quant": False}
    assert layer.compute_dtype == torch.float32
    given = {"type": "fp4", "compute_dtype": "bf16"}
    module = built(tiny_llama, quantize=given)
    assert module.model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert module.describe_training()["quantize"] == given


def test_the_dtype_is_that_of_the_rest(tiny_llama):
    model = built(tiny_llama, quantize="nf4", dtype="bf16").model
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"quantize": "nf5"}, r"quantize='nf5' is unknown\. Did you mean 'nf4'\?"),
        ({"quantize": {"double_quant": True}}, r"makes no sense\. Give one of nf4, fp4, int8"),
        ({"quantize": {"type": "nf4", "doublequant": True}}, "Did you mean 'double_quant'"),
        ({"quantize": {"type": "nf4", "double_quant": "yes"}}, "Give true or false"),
        ({"quantize": {"type": "int8", "double_quant": True}}, "is an option of nf4 and fp4"),
        ({"quantize": {"type": "nf4", "compute_dtype": "fp64"}}, "does not go with"),
        ({"quantize": "int8", "dtype": "fp64"}, "does not go with dtype=float64"),
        ({"quantize": "nf4", "compile": True}, "nf4 does not go with compile"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_wrong_value_is_one_sentence_before_anything_is_loaded(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        causal("no/such-model", **arguments)


def test_a_missing_package_is_named_before_anything_is_loaded(monkeypatch):
    find = importlib.util.find_spec
    missing = {"bitsandbytes", "torchao"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find(name)
    )
    for kind, package in (("nf4", "bitsandbytes"), ("int8", "torchao")):
        with pytest.raises(ValueError, match=f"{kind} needs {package}.*pip install {package}"):
            causal("no/such-model", quantize=kind)


def test_what_cannot_be_quantized_or_trained_is_refused(tiny_llama, tiny_gpt2, tmp_path):
    with pytest.raises(ValueError, match=r"train_modules names model.layers.0.mlp.*is quantized"):
        built(tiny_llama, quantize="nf4", train_modules=["model.layers.0.mlp"])
    model = built(tiny_llama, quantize="nf4", train_modules=["norm", "lm_head"]).model
    assert model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match=r"int8 finds no layer to quantize in GPT2LMHead.*Use nf4"):
        built(tiny_gpt2, quantize="int8")
    stored = built(tiny_llama, quantize="nf4").model
    for wrapper in wrapped_layers(stored).values():
        wrapper.enabled = False
    config = AutoModelForCausalLM.from_pretrained(tiny_llama).config
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is quantized already by bitsandbytes: leave"):
        built(str(tmp_path), quantize="nf4")


def test_a_conv1d_of_gpt2_becomes_a_linear_layer_in_4_bits(tiny_gpt2):
    adapters = [Adapter([partial(LoRA, rank=2)], targets=["c_proj"])]
    module = built(tiny_gpt2, quantize="nf4", adapters=adapters)
    plain = built(tiny_gpt2, adapters=adapters)
    with torch.no_grad():
        difference = module.model(IDS).logits - plain.model(IDS).logits
    assert 0 < difference.abs().max() < 0.5


def test_the_new_head_of_a_classifier_is_not_quantized(tiny_bert, tmp_path):
    # Its head has two layers, of which transformers would quantize the first.
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=66, pad_token_id=2,
    )  # fmt: skip
    RobertaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = SequenceClassification(
        str(tmp_path),
        [Adapter([LoRA], targets=["query"])],
        dtype="bf16",
        quantize="nf4",
        num_labels=3,
    )
    module.configure_model()
    for head in (module.model.classifier.dense, module.model.classifier.out_proj):
        assert type(head) is nn.Linear
        assert head.weight.dtype == torch.float32
        assert head.weight.requires_grad
    assert layers.quantized(module.model.roberta.encoder.layer[0].output.dense)


# ---- the command line


@pytest.fixture(scope="module")
def run(tiny_llama, tmp_path_factory):
    """Folder of a run over an nf4 base, with what it printed."""
    import contextlib
    import io

    from adaptrank.cli import main

    folder = tmp_path_factory.mktemp("run")
    config = {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "backbone": tiny_llama,
                "adapters": [{"parameterization": [{"class_path": "LoRA"}]}],
                "quantize": "nf4",
                "dtype": "fp32",
                "max_new_tokens": 2,
                "generate": False,
            },
        },
        "data": {
            "class_path": "ArithmeticProblems",
            "init_args": {"batch_size": 4, "train_size": 8, "val_size": 4},
        },
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "runs": str(folder / "runs"),
    }
    (folder / "nf4.yaml").write_text(yaml.safe_dump(config))
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main(["fit", "--config", str(folder / "nf4.yaml")])
    return folder / "runs" / "nf4" / "0", said.getvalue()


def test_the_printed_commands_work(run, tmp_path, capsys):
    folder, said = run
    assert "The base was loaded in nf4, and so it is by generate. merge takes it as it" in said
    printed = re.findall(r"python -m adaptrank ((?:generate|merge) .*)", said)
    assert [line.split()[0] for line in printed] == ["generate", "merge"]
    adapter = folder / "adapter"
    code, out, err = command(capsys, "generate", adapter, "--prompt", "How many", "--json")
    assert code == 0, err
    assert "The base is loaded in nf4, as in training" in err
    plain = command(capsys, "generate", adapter, "--prompt", "a", "--quantize", "none")
    assert plain[0] == 0
    assert "as in training" not in plain[2]
    code, out, err = command(capsys, "merge", adapter, "--out", tmp_path / "merged")
    assert code == 0, err
    assert "float32" in out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(layers.quantized(module) for module in merged.modules())
    code, _, err = command(capsys, "generate", tmp_path / "merged", "--prompt", "How many")
    assert code == 0, err


def test_it_is_exported_to_peft(run, tiny_llama, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    folder, _ = run
    code, _, err = command(capsys, "export", folder / "adapter", "--out", tmp_path / "peft")
    assert code == 0, err
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ours = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), folder / "adapter")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-5)


def test_a_base_that_is_quantized_in_its_files_gets_no_merge_command(tiny_llama, tmp_path, capsys):
    from adaptrank.cli.output import next_commands

    quantized = built(tiny_llama, quantize="nf4")
    module = built(tiny_llama, quantize="nf4")
    module.loading = causal(tiny_llama).loading
    assert "merge:    python" in next_commands(tmp_path, quantized)
    said = next_commands(tmp_path, module)
    assert "merge:    python" not in said
    assert "The base is quantized in its files. To merge, name its plain form" in said
