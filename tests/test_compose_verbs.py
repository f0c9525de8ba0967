"""The verbs `compose` and `inspect`, on adapters of a tiny Llama in folders."""

import json
from functools import partial

import pytest
import torch
from test_cli import cli, here  # noqa: F401
from transformers import AutoModelForCausalLM

from adaptrank import adapt, load_adapter, save_adapter
from adaptrank.parameterizations import HyperAdapt, LoRA
from adaptrank.testing import perturb


@pytest.fixture
def two(here, tiny_llama):  # noqa: F811
    """Two adapters, LoRAs of rank 2 and 3, and a HyperAdapt."""
    for name, method, seed in (
        ("a", partial(LoRA, rank=2), 1),
        ("b", partial(LoRA, rank=3), 2),
        ("h", HyperAdapt, 3),
    ):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        torch.manual_seed(seed)
        adapt(model, "all-linear", method)
        perturb(model, 0.05, seed)
        save_adapter(
            model, here / name, {"name": str(tiny_llama), "auto_class": "AutoModelForCausalLM"}
        )
    return here


def logits(model):
    return model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


def test_compose_writes_an_adapter_and_its_report(two, cli, tiny_llama):  # noqa: F811
    code, out, err = cli("compose", "a", "b", "--method", "sum", "--weights", 1, 0.5, "--out", "c")
    assert code == 0, err
    assert "Composed sum of 2 adapters: c" in out
    assert "rms cos" in out
    assert "ranks: 5 to 5 on 14 layers" in out
    report = json.loads((two / "c" / "composition.json").read_text())
    assert report["weights"] == [1, 0.5]
    assert report["pairs"][0]["adapters"] == ["a", "b"]
    assert 0 < report["pairs"][0]["rms_cos"] < 0.5
    assert (two / "c" / "composition.png").stat().st_size > 5000
    composed = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), two / "c")
    by_hand = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(by_hand, two / "a", "a")
    load_adapter(by_hand, two / "b", "b")
    for layer in by_hand.modules():
        if isinstance(layer, LoRA) and layer.name == "b":
            layer.scale *= 0.5
    torch.testing.assert_close(logits(composed), logits(by_hand), rtol=1e-5, atol=1e-5)
    assert cli("generate", "c", "--prompt", "1 2", "--max_new_tokens", 2)[0] == 0


def test_compose_merges_what_is_no_product(two, cli, tiny_llama):  # noqa: F811
    code, _, err = cli("compose", "a", "h", "--out", "c")
    assert code == 2
    assert err.count("\n") == 1
    assert "make it one with a rank, an energy or an error, or merge it into the base" in err
    assert not (two / "c").exists()
    code, out, err = cli("compose", "a", "h", "--merge", "--out", "c")
    assert code == 0, err
    merged = AutoModelForCausalLM.from_pretrained(two / "c")
    nested = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(nested, two / "h", "h")
    load_adapter(nested, two / "a", "a")  # a HyperAdapt in a LoRA is their sum
    torch.testing.assert_close(logits(merged), logits(nested), rtol=1e-4, atol=1e-5)
    trimming = ("--method", "ties", "--trim", "layer")
    code, out, _ = cli("compose", "a", "h", *trimming, "--energy", 0.9, "--json", "--out", "low")
    report = json.loads(out)
    assert report["options"]["trim"] == "layer"
    errors = [facts["error"] for facts in report["layers"].values()]
    assert max(errors) ** 2 <= 0.1 + 1e-6


def test_compose_in_sequence(two, cli, tiny_llama):  # noqa: F811
    code, _, err = cli("compose", "h", "a", "--sequential", "--out", "c")
    assert code == 2
    assert "the order matters" in err
    code, out, err = cli("compose", "h", "a", "--sequential", "--order", 2, 1, "--out", "c")
    assert code == 0, err
    assert "Composed a then h" in out
    nested = AutoModelForCausalLM.from_pretrained(tiny_llama)
    load_adapter(load_adapter(nested, two / "a", "a"), two / "h", "h")
    again = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), two / "c")
    torch.testing.assert_close(logits(again), logits(nested), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "missing", "--out", "c"], "missing"),
        (["a", "b", "--out", "a"], "--out a is not empty"),
        (["a", "b", "--out", "a", "--force"], "--out a holds the adapter that is read"),
        (
            ["a", "b", "--methd", "sum", "--out", "c"],
            "unknown option --methd. did you mean '--method'",
        ),
        (["a", "b", "--method", "tie", "--out", "c"], "Did you mean 'ties'?"),
        (["a", "b", "--weights", "1", "--out", "c"], "1 weights for 2 adapters"),
        (["a", "b", "--density", "0.5", "--out", "c"], "sum has no option 'density'"),
        (["a", "b", "--method", "ties", "--trim", "all", "--out", "c"], "one of whole, layer"),
        (["a", "b", "--rank", "2", "--error", "0.1", "--out", "c"], "rank and error were given"),
    ],
)
def test_compose_says_what_is_wrong_in_a_line(two, cli, arguments, sentence):  # noqa: F811
    code, _, err = cli("compose", *arguments)
    assert code == 2
    assert sentence.lower() in err.lower()
    assert err.count("\n") <= 2
    assert not (two / "c").exists()


def test_inspect(two, cli):  # noqa: F811
    code, out, err = cli("inspect", "h")
    assert code == 0, err
    assert "|D|/|W|" in out
    assert "q_proj" in out
    data = json.loads((two / "inspected" / "h" / "inspect.json").read_text())
    assert len(data["layers"]) == 14
    assert data["summary"]["all"]["share"] > 0.9, "a HyperAdapt has full rank"
    assert (two / "inspected" / "h" / "inspect.png").stat().st_size > 5000
    code, out, _ = cli(
        "inspect", "a", "--layers", r".*layers\.0\.self_attn.*", "--no-intruders", "--json"
    )
    layers = json.loads(out)["layers"]
    assert len(layers) == 4
    assert all(facts["rank"] == 2 and "intruders" not in facts for facts in layers.values())
    assert not (two / "inspected" / "a").exists()
    assert not (two / "h" / "inspect").exists()
    code, _, err = cli("inspect", "h", "--out", "h/inside")
    assert code == 2
    assert "lies in the adapter's folder h, which is left as it is" in err
    for wrong, sentence in (
        (["--layers", "("], "no regular expression"),
        (["--layers", "nothing"], "no layer matches"),
    ):
        code, _, err = cli("inspect", "a", *wrong)
        assert code == 2
        assert sentence in err


# ---- export and import


def test_export_and_import_are_a_round_trip(two, cli, tiny_llama):  # noqa: F811
    import peft

    code, out, err = cli("export", "a", "--out", "p")
    assert code == 0, err
    assert "Exported a as peft, LORA: p" in out
    want = logits(load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), two / "a"))
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_llama), two / "p"
    )
    torch.testing.assert_close(logits(theirs), want, rtol=1e-5, atol=1e-5)
    code, out, err = cli("import", "p", "--out", "back")
    assert code == 0, err
    assert "LoRA" in out
    back = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), two / "back")
    torch.testing.assert_close(logits(back), want, rtol=1e-5, atol=1e-5)
    assert cli("generate", "back", "--prompt", "1 2", "--max_new_tokens", 2)[0] == 0


def test_what_only_comes_near_says_by_how_much(two, cli):  # noqa: F811
    code, _, err = cli("export", "h", "--out", "p")
    assert code == 2
    assert "state the rank or the error" in err
    assert not (two / "p").exists()
    code, out, err = cli("export", "h", "--format", "lora-uniform", "--error", 0.5, "--out", "p")
    assert code == 0, err
    assert "relative error of the changes: mean" in out
    assert "KL divergence" in out
    each = json.loads((two / "p" / "export.json").read_text())["layers"]
    assert len(each) == 14
    assert all(0 < facts["error"] <= 0.5 for facts in each.values())
    config = json.loads((two / "p" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "a", "--format", "gguf", "--out", "p"], "convert_lora_to_gguf.py"),
        (["export", "a", "--format", "pet", "--out", "p"], "Did you mean 'peft'"),
        (["export", "a", "--rank", "2", "--error", "0.1", "--out", "p"], "Give one"),
        (["export", "a", "--rank", "0", "--out", "p"], "--rank is 1 or more"),
        (["export", "missing", "--out", "p"], "missing"),
        (["import", "a", "--out", "p"], "names no peft_type"),
        (["import", "missing", "--out", "p"], "missing"),
    ],
)
def test_export_and_import_say_what_is_wrong_in_a_line(two, cli, arguments, sentence):  # noqa: F811
    code, _, err = cli(*arguments)
    assert code == 2
    assert sentence in err
    assert err.count("\n") <= 2
    assert not (two / "p").exists()
