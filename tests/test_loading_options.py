"""Keys that say how a backbone is loaded: attention, devices, revision, and code of its own."""

import json
import shutil

import pytest
import torch
from conftest import perturb
from lightning.pytorch import Trainer
from loading_runs import QUIET, causal, command, fit, problems
from transformers import AutoModelForCausalLM

from adaptrank import adapt, save_adapter
from adaptrank.artifacts.header import digest_of
from adaptrank.backbones import Source, resolve
from adaptrank.cli.loading import find_adapter
from adaptrank.parameterizations import LoRA

IDS = torch.arange(3, 19).reshape(2, 8)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"attn_implementation": "sdp"}, "Did you mean 'sdpa'"),
        ({"device_map": "gpu"}, "Give a device such as cuda:0"),
        ({"device_map": {"model": -1}}, "Give a device such as cuda:0"),
        ({"trust_remote_code": "yes"}, "Give true or false"),
        ({"added_tokens": ["<a>", "<a>"]}, "Give different texts"),
        ({"added_tokens": [" "]}, "Give different texts"),
        ({"gradient_checkpointing": {"every": 2}}, "no option 'every'.*every_n_layers"),
        ({"gradient_checkpointing": {"every_n_layers": 0}}, "from 1"),
        ({"gradient_checkpointing": {"offload": 1}}, "Give true or false"),
        ({"gradient_checkpointing": "yes"}, "Give true, false, or options"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_a_wrong_value_is_one_sentence_before_anything_is_loaded(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        causal("no/such-model", **arguments)


# ---- attention


def test_the_attention_is_that_of_the_key_and_resuming_compares_it(tiny_llama):
    for name in ("eager", "sdpa"):
        module = causal(tiny_llama, attn_implementation=name)
        module.configure_model()
        assert module.model.config._attn_implementation == name
        assert module.describe_training()["attn_implementation"] == name
    assert "attn_implementation" not in causal(tiny_llama).describe_training()


def test_an_attention_that_is_not_there_is_one_sentence(tiny_llama):
    module = causal(tiny_llama, attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2 does not go with"):
        module.configure_model()


# ---- devices


@pytest.mark.parametrize("device_map", ["auto", {"model": "cpu", "lm_head": 0}])
def test_a_run_of_training_refuses_devices_that_lightning_would_change(device_map, tiny_llama):
    with pytest.raises(ValueError, match="spreads the model over devices, and SingleDevice"):
        fit(causal(tiny_llama, device_map=device_map), max_steps=1)


def test_another_device_than_the_trainers_is_refused_and_the_same_is_not(tiny_llama):
    with pytest.raises(ValueError, match=r"moves the model to cpu\. Leave device_map out"):
        fit(causal(tiny_llama, device_map="cuda:0"), max_steps=1)
    fit(causal(tiny_llama, device_map="cpu"), max_steps=1)


def test_the_command_refuses_it_before_it_evaluates(tiny_llama, tmp_path, capsys):
    options = {"backbone": tiny_llama, "device_map": "auto", "dtype": "fp32"}
    args = [f"--model.{key}={value}" for key, value in options.items()]
    code, out, err = command(
        capsys, "fit", "--model", "CausalLM", *args,
        '--model.adapters=[{"parameterization": [{"class_path": "LoRA"}]}]',
        "--data", "ArithmeticProblems", "--data.train_size", "8", "--data.val_size", "4",
        "--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--runs", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert "device_map='auto' spreads the model over devices" in err
    assert "loss" not in out


def test_validation_takes_a_device_map(tiny_llama):
    pytest.importorskip("accelerate")
    settings = {**QUIET, "limit_val_batches": 1}
    module = causal(tiny_llama, device_map="auto", generate=False)
    (result,) = Trainer(**settings).validate(module, datamodule=problems(), verbose=False)
    plain = causal(tiny_llama, generate=False)
    (expected,) = Trainer(**settings).validate(plain, datamodule=problems(), verbose=False)
    assert result == expected


# ---- revisions


def test_a_revision_is_of_the_hub(tiny_llama, tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(ValueError, match=r"a version of a model on the Hub, and .* is a folder"):
        resolve(tiny_llama, "main")
    snapshot = tmp_path / "snapshot"
    shutil.copytree(tiny_llama, snapshot)
    stored = {"v1": str(snapshot / "config.json")}
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda name, file, revision=None: stored.get(revision),
    )
    found = resolve("owner/model", "v1")
    assert found == Source("owner/model", "cache", str(snapshot), revision="v1")
    assert resolve("owner/model", "v2") == Source("owner/model", "hub", "owner/model", None, "v2")
    module = causal("owner/model", revision="v1")
    module.configure_model()
    assert module.describe_base()["revision"] == "v1"
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    assert find_adapter(str(tmp_path / "adapter"), None).source == found


# ---- code that comes with a model

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tiny_llama, tmp_path, monkeypatch):
    """Folder of a model whose classes come with it, and the file that its code leaves."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    monkeypatch.syspath_prepend(str(tmp_path / "hf"))
    folder, marker = tmp_path / "own", tmp_path / "was_run"
    shutil.copytree(tiny_llama, folder)
    (folder / "own_llama.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own-llama"
    config["auto_map"] = {
        "AutoConfig": "own_llama.OwnConfig",
        "AutoModelForCausalLM": "own_llama.OwnForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, marker


def test_code_of_a_model_is_run_only_if_the_configuration_says_so(own_code):
    folder, marker = own_code
    with pytest.raises(
        ValueError, match=r"Python code that comes with it.*trust_remote_code: true"
    ):
        causal(str(folder)).configure_model()
    assert not marker.exists()
    module = causal(str(folder), trust_remote_code=True)
    module.configure_model()
    assert marker.exists()
    assert type(module.model).__name__ == "OwnForCausalLM"


def adapter_that_asks(folder, tiny_llama, tmp_path):
    """An adapter whose file names the model with code, and asks in all ways to trust it."""
    model = adapt(AutoModelForCausalLM.from_pretrained(tiny_llama), ["q_proj"], LoRA)
    perturb(model)
    asks = {"name": str(folder), "auto_class": "AutoModelForCausalLM", "trust_remote_code": True}
    adapter = save_adapter(model, tmp_path / "asks", asks, run={"trust_remote_code": True})
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    description = json.loads((adapter / "adapter_config.json").read_text())
    description["conventions"] = {"trust_remote_code": True}
    description["digest"] = digest_of(description, tensors)
    save_file(tensors, file, {"adaptrank": json.dumps(description)})
    return adapter


def test_no_adapter_can_ask_to_run_code(own_code, tiny_llama, tmp_path, capsys):
    folder, marker = own_code
    adapter = adapter_that_asks(folder, tiny_llama, tmp_path)
    for verb in (
        ["generate", adapter, "--prompt", "a"],
        ["merge", adapter, "--out", tmp_path / "m"],
    ):
        code, _, err = command(capsys, *verb)
        assert code == 2
        assert "--trust_remote_code" in err
    with pytest.raises(ValueError, match="it is not run"):
        causal(str(folder), adapters=None, adapter=str(adapter)).configure_model()
    assert not marker.exists()
    code, _, err = command(capsys, "generate", adapter, "--prompt", "a", "--trust_remote_code")
    assert code == 0, err
    assert marker.exists()
