"""Fused experts of mixtures are listed as left out, with their share: in fit, plan and Python."""

import logging
import re

import pytest
import yaml
from loading_runs import causal, command
from transformers import (
    AutoTokenizer,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from adaptrank import adapt, describe
from adaptrank.parameterizations import LoRA

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def mixtral(tokens):
    config = MixtralConfig(
        **SIZES, vocab_size=tokens, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2
    )
    return MixtralForCausalLM(config)


def qwen3(tokens):
    config = Qwen3MoeConfig(
        **SIZES, vocab_size=tokens, intermediate_size=32, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, decoder_sparse_step=1, head_dim=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


@pytest.fixture(params=[mixtral, qwen3], ids=lambda make: make.__name__)
def mixture(request, tmp_path, tiny_llama):
    """A mixture of experts, and its folder."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = request.param(len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return model, str(tmp_path / "base")


def share_of(model, name):
    whole = sum(p.numel() for p in model.parameters())
    fused = [p for n, p in model.named_parameters() if n.endswith(name)]
    assert all(p.dim() == 3 for p in fused)
    return 100 * sum(p.numel() for p in fused) / whole


def test_in_python_and_in_a_run(mixture, caplog):
    caplog.set_level(logging.WARNING, "adaptrank")
    model, folder = mixture
    shares = {name: share_of(model, name) for name in ("gate_up_proj", "down_proj")}
    adapt(model, "all-linear", LoRA)
    causal(folder, adapters=[_all_linear()]).configure_model()
    for name, share in shares.items():
        line = f"eft out: 1 x {name}, {share:.2g} % of the parameters: a parameter of"
        assert line in describe(model)
        assert caplog.text.count(line) == 2


def _all_linear():
    from adaptrank.modules import Adapter

    return Adapter([LoRA], targets="all-linear")


def test_in_plan(mixture, tmp_path, capsys):
    model, folder = mixture
    config = {
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "backbone": folder,
                "adapters": [{"parameterization": [{"class_path": "LoRA"}]}],
            },
        },
        "data": {"class_path": "ArithmeticProblems"},
    }
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    code, out, err = command(capsys, "plan", "--config", tmp_path / "a.yaml")
    assert code == 0, err
    found = dict(re.findall(r"eft out: 1 x (\w+), ([\d.]+) %", out + err))
    for name in ("gate_up_proj", "down_proj"):
        assert found[name] == f"{share_of(model, name):.2g}"


def test_naming_an_expert_says_why_it_is_no_layer(mixture):
    model, _ = mixture
    with pytest.raises(ValueError, match=r"'gate_up_proj' names .*experts.*no layer that can be"):
        adapt(model, ["gate_up_proj"], LoRA)
