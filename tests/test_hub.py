"""Adapters on the Hub: pushed, pulled, and loaded by name, against a Hub in a thread."""

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from fake_hub import TOKEN, FakeHub, serving
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from test_cli import cli, here, write  # noqa: F401
from transformers import AutoModelForCausalLM

from adaptrank import adapt, load_adapter, save_adapter
from adaptrank._errors import UserError
from adaptrank.artifacts import WEIGHTS, hub_name, parse_hub_name, read_adapter, shown_adapter
from adaptrank.cli.loading import find_adapter, find_model
from adaptrank.composition import compose
from adaptrank.interop.hub import local_paths
from adaptrank.interop.peft import export_peft, import_peft
from adaptrank.parameterizations import HyperAdapt, LoRA
from adaptrank.reports.card import write_card
from adaptrank.reports.card_mark import is_unedited
from adaptrank.testing import perturb

NAME = "ann/adapter"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub with an empty cache, and a token that may write."""
    hub = FakeHub()
    close_session()
    with serving(hub) as address:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub
    close_session()


def go_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def build(folder, tiny, base, make=LoRA, seed=1):
    """Save an adapter of a tiny model, and return the model."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    adapt(model, ["q_proj", "v_proj"], make)
    perturb(model, 0.05, seed)
    save_adapter(model, folder, base)
    return model


SUMMARY = {
    "base": {"name": "org/base", "auto_class": "AutoModelForCausalLM"},
    "layers": [{"kind": "q_proj", "count": 2, "method": "LoRA", "trainable": 10}],
    "trainable": 10,
    "parameters": 100,
    "ranks": 8,
    "steps": 12,
    "seconds": 3.0,
    "before": {"loss": 2.0},
    "after": {"loss": 1.5, "accuracy": 0.75, "train_loss": 1.0},
    "saved": {"weights": "last", "step": 12, "of": 12},
    "warnings": [],
}


@pytest.fixture
def run(here, tiny_llama):  # noqa: F811
    """A run folder, with everything that must not leave the machine."""
    folder = here / "runs" / "x" / "0"
    base = {
        "name": "org/base",
        "source": f"org/base: local cache ({here}/models/base)",
        "auto_class": "AutoModelForCausalLM",
    }
    build(folder / "adapter", tiny_llama, base)
    config = f"data: {{sources: {here}/secret.csv}}\n"
    (folder / "config.yaml").write_text(config)
    write_card(folder / "adapter", SUMMARY, {}, config)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "ranks.jsonl").write_text('{"step": 0, "allocators": ["ElaLoRA (two pools)"]}\n')
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "adapter" / "optimizer.pt").write_bytes(b"secret")
    return folder


def tensors(folder):
    return load_file(Path(folder) / WEIGHTS)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits


# ---- push, pull, load


def test_what_is_pushed_is_loaded_by_its_name(run, hub, cli, tiny_llama, monkeypatch):  # noqa: F811
    want = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter")
    options = ("--license", "mit", "--language", "en", "--commit-message", "first")
    code, out, err = cli("push", run, NAME, *options)
    assert code == 0, err
    assert err == ""
    assert f"/{NAME} (commit " in out

    # Only the adapter, in one commit after the first one, and no path of this machine.
    files = hub.files(NAME)
    assert files.keys() == {".gitattributes", WEIGHTS, "adapter_config.json", "README.md"}
    assert hub.repositories[NAME]["messages"] == ["initial commit", "first"]
    assert not hub.repositories[NAME]["private"]
    for name, content in files.items():
        assert str(run.parents[2]).encode() not in content, name

    code, out, err = cli("pull", NAME)
    assert code == 0, err
    assert "LoRA on 4 layers of org/base" in out
    assert f"python -m adaptrank generate {NAME}" in out
    snapshot = next((Path(constants.HF_HUB_CACHE)).glob("models--*/snapshots/*"))
    assert (snapshot / WEIGHTS).is_symlink()
    assert equal(tensors(snapshot), tensors(run / "adapter"))

    go_offline(monkeypatch)
    hub.seen.clear()
    for name in (NAME, f"{NAME}@main", f"{NAME}@{snapshot.name}"):
        fresh = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), name)
        assert torch.equal(logits(fresh), logits(want))
    assert hub.seen == []

    code, out, err = cli("pull", NAME, "--out", "copy")
    assert code == 0, err
    assert not any(file.is_symlink() for file in Path("copy").iterdir())
    assert equal(tensors("copy"), tensors(run / "adapter"))
    assert "is not empty" in cli("pull", NAME, "--out", "copy")[2]
    assert cli("pull", NAME, "--out", "copy", "--force")[0] == 0


def test_a_name_is_downloaded_when_it_is_used(run, hub, cli, tiny_llama):  # noqa: F811
    assert cli("push", run / "adapter", NAME, "--revision", "v2", "--license", "mit")[0] == 0
    assert WEIGHTS in hub.files(NAME, "v2")
    assert WEIGHTS not in hub.files(NAME, "main")
    model = load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), f"{NAME}@v2")
    assert torch.equal(
        logits(model),
        logits(load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), run / "adapter")),
    )
    # A local folder of this name comes first.
    build(Path(NAME), tiny_llama, {"name": "org/other"}, HyperAdapt)
    assert read_adapter(NAME)["base"]["name"] == "org/other"
    assert read_adapter(f"{NAME}@v2")["base"]["name"] == "org/base"


def test_the_verbs_take_names_offline(run, hub, cli, tiny_llama, monkeypatch):  # noqa: F811
    assert cli("push", run, NAME, "--license", "mit")[0] == 0
    assert cli("pull", NAME)[0] == 0
    go_offline(monkeypatch)
    stored = find_adapter(NAME, tiny_llama)
    assert stored.is_causal
    assert shown_adapter(stored.adapter).startswith(f"{NAME}@")
    assert find_model(NAME, tiny_llama).adapter == stored.adapter
    ask = ("--prompt", "1 2", "--max_new_tokens", 1, "--base", tiny_llama)
    code, out, err = cli("generate", "--adapter", NAME, *ask)
    assert code == 0, err
    assert out == cli("generate", run / "adapter", *ask)[1]
    code, out, err = cli("merge", f"--adapter={NAME}", "--base", tiny_llama, "--out", "merged")
    assert code == 0, err
    assert NAME in out

    # Of two names the report says which is which.
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    build(Path("other"), tiny_llama, {"name": "org/base"}, seed=2)
    report = compose(base, [NAME, "other"])
    assert report["pairs"][0]["adapters"][0].startswith("adapter@")

    # `model.adapter` of the training verbs, and their `--adapter`.
    write(run, tiny_llama)
    quick = ("--config", run / "tiny.yaml", "--allocator", "null", "--model.generate", "false")
    code, out, err = cli("validate", *quick, "--adapter", NAME)
    assert code == 0, err
    assert f"Scores the adapter {NAME}" in out
    assert out.replace(NAME, "") == cli("validate", *quick, "--model.adapter", run / "adapter")[
        1
    ].replace(str(run / "adapter"), "")
    code, _, err = cli("generate", "ann/none", "--prompt", "1")
    assert code == 2
    assert "There is no adapter and no model 'ann/none'" in err
    code, _, err = cli("validate", *quick, "--adapter", "ann/none")
    assert code == 2
    assert "model.adapter: There is no adapter 'ann/none'" in err
    assert "HF_HUB_OFFLINE" in err


def test_peft_adapters_by_name(hub, cli, here, tiny_llama, monkeypatch):  # noqa: F811
    model = build(Path("ours"), tiny_llama, {"name": "org/base"}, partial(LoRA, rank=2))
    export_peft(model, Path("peft"), {"name": tiny_llama, "auto_class": "AutoModelForCausalLM"})
    code, out, err = cli("push", "peft", NAME, "--license", "mit", "--base", "org/base")
    assert code == 0, err
    files = hub.files(NAME)
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    matter = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert matter["library_name"] == "peft"
    code, out, err = cli("pull", NAME)
    assert code == 0, err
    assert f"python -m adaptrank import {NAME}" in out
    go_offline(monkeypatch)
    again = import_peft(AutoModelForCausalLM.from_pretrained(tiny_llama), NAME)
    torch.testing.assert_close(logits(again), logits(model))
    code, out, err = cli("import", NAME, "--base", tiny_llama, "--out", "imported")
    assert code == 0, err
    assert equal(tensors("imported"), tensors("ours"))
    with pytest.raises(UserError, match="python -m adaptrank import"):
        load_adapter(AutoModelForCausalLM.from_pretrained(tiny_llama), NAME)


# ---- the card


def card_on(hub):
    text = hub.files(NAME)["README.md"].decode()
    front, body = text.split("---\n", 2)[1:]
    return yaml.safe_load(front), body


def test_the_card_says_what_is_known_and_no_more(run, hub, cli):  # noqa: F811
    assert cli("push", run, NAME, "--license", "apache-2.0", "--language", "en")[0] == 0
    matter, body = card_on(hub)
    assert matter == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "adaptrank",
        "license": "apache-2.0",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "tags": ["adaptrank", "adapter", "LoRA", "ElaLoRA"],
    }
    for words in (
        f"load_adapter(base, '{NAME}')",
        "from_pretrained('org/base')",
        f"python -m adaptrank generate {NAME} --prompt TEXT",
        "| loss | 2.0000 | 1.5000 |",
        "| accuracy |  | 0.7500 |",
        "with ranks moved or chosen by ElaLoRA (two pools)",
        "| q_proj | 2 | LoRA |",
        "32 units on 4 axes",
        read_adapter(run / "adapter")["base"]["fingerprint"],
    ):
        assert words in body, words
    assert "train_loss" not in body
    assert "secret.csv" not in body

    # A card that nobody edited is brought up to date. What is not known is left out.
    (run / "summary.json").unlink()
    code, _, err = cli("push", run, NAME)
    assert code == 0
    assert "no licence" in err
    matter, body = card_on(hub)
    assert "license" not in matter
    assert "language" not in matter
    assert "accuracy" not in body


def test_a_base_of_this_machine_is_not_named(here, hub, cli, tiny_llama):  # noqa: F811
    facts = {"name": tiny_llama, "source": f"{tiny_llama}: local folder ({tiny_llama})"}
    build(Path("local"), tiny_llama, facts)
    code, _, err = cli("push", "local", NAME, "--license", "mit")
    assert code == 0
    assert "--base user/name" in err
    assert "base_model" not in card_on(hub)[0]
    assert all(tiny_llama.encode() not in content for content in hub.files(NAME).values())
    assert cli("push", "local", NAME, "--license", "mit", "--base", "org/base")[2] == ""
    assert card_on(hub)[0]["base_model"] == "org/base"
    assert cli("pull", NAME, "--out", "pulled")[0] == 0
    assert read_adapter("pulled")["base"]["name"] == "org/base"
    code, _, err = cli("push", "local", NAME, "--base", tiny_llama)
    assert code == 2
    assert "is no name on the Hub" in err


def test_a_card_of_the_user_is_kept(run, hub, cli):  # noqa: F811
    mine = f"# Mine\n\nData: {run}\n"
    (run / "adapter" / "README.md").write_text(mine)
    code, out, err = cli("push", run, NAME)
    assert code == 0
    assert hub.files(NAME)["README.md"].decode() == mine
    assert f"names paths of this machine: {run}" in err
    assert "as it is" in out

    # On the Hub, too: also beside another one in the folder.
    hub.commit(NAME, "main", {"README.md": b"# Theirs"}, "by hand")
    for text in (mine, None):
        if text is None:
            (run / "adapter" / "README.md").unlink()
        code, out, _ = cli("push", run, NAME, "--license", "mit")
        assert code == 0
        assert hub.files(NAME)["README.md"] == b"# Theirs"
        assert "was kept" in out
    code, out, _ = cli("push", run, NAME, "--license", "mit", "--replace-readme")
    assert is_unedited(hub.files(NAME)["README.md"].decode())


def test_the_configuration_is_pushed_when_it_is_asked_for(run, hub, cli):  # noqa: F811
    assert cli("push", run, NAME, "--license", "mit", "--with-config", "--private")[0] == 0
    assert hub.repositories[NAME]["private"]
    assert hub.files(NAME)["config.yaml"] == (run / "config.yaml").read_bytes()
    assert "secret.csv" in card_on(hub)[1]


# ---- mistakes


MISTAKES = [
    (["push", "ADAPTER", "adapter"], "It has no owner. Write user/name"),
    (["push", "nothing", NAME], "There is no adapter folder 'nothing'"),
    (["push", ".", NAME], "No adapter at"),
    (["push", "a.ckpt", NAME], "is a checkpoint. Make an adapter of it first"),
    (["push", "ADAPTER", NAME, "--license", "Apache 2.0"], "Did you mean 'apache-2.0'?"),
    (["push", "ADAPTER", NAME, "--language", "English"], "is no code of a language"),
    (["push", "ADAPTER", "bob/public", "--private"], "everyone can see it"),
    (["push", "ADAPTER", f"{NAME}@a", "--revision", "b"], "Give one."),
    (["push", "ADAPTER", NAME, "--revision", "0" * 40], "is a commit, which cannot be written"),
    (["pull", "adapter"], "It has no owner"),
    (["pull", "bob/missing"], "The Hub has no repository bob/missing, or it is private"),
    (["pull", "bob/public@v9"], "has no revision 'v9'"),
    (["pull", "bob/gated"], "is gated: ask for access at"),
    (["pull", "bob/pickle"], "adapter_model.bin, which is never loaded"),
    (["pull", "bob/model"], "is a model and no adapter"),
    (["pull", "bob/public"], "is no adapter: it has no adapter_model.safetensors"),
    (["generate", "bob/pickle", "--prompt", "1"], "which is never loaded"),
    (["merge", "bob/model", "--out", "x"], "is a model and no adapter"),
]
"""A command that fails -> a part of its sentence."""


def test_mistakes_are_one_sentence(run, hub, cli):  # noqa: F811
    Path("a.ckpt").touch()
    weights = (run / "adapter" / WEIGHTS).read_bytes()
    hub.add("bob/public", {"notes.txt": b"-"})
    hub.add("bob/gated", {WEIGHTS: weights}, gated=True)
    hub.add("bob/pickle", {"adapter_model.bin": b"-", "adapter_config.json": b"{}"})
    hub.add("bob/model", {"config.json": b"{}", "model.safetensors": b"-"})
    before = {name: list(each["messages"]) for name, each in hub.repositories.items()}
    for args, wanted in MISTAKES:
        code, _, err = cli(*[run / "adapter" if arg == "ADAPTER" else arg for arg in args])
        assert code == 2, err
        assert wanted in err, err
        assert len(err.strip().splitlines()) == 1, err
        after = {name: each["messages"] for name, each in hub.repositories.items()}
        assert before == after, args


def test_a_failed_push_leaves_nothing_that_looks_whole(run, hub, cli, monkeypatch):  # noqa: F811
    hub.add(NAME, {"README.md": b"# Theirs"})
    for failing, wanted in (
        (f"POST /api/models/{NAME}/commit", "does not let you write"),
        ("PUT /upload", "does not let you write"),
        ("POST /api/repos/create", "does not let you write"),
    ):
        hub.failing = {failing: 403, f"GET /api/models/{NAME}": 403}
        hub.stored.clear()
        code, _, err = cli("push", run, NAME, "--license", "mit")
        assert code == 2
        assert wanted in err, err
        assert "Nothing was written" in err
        assert len(err.strip().splitlines()) == 1, err
        assert hub.files(NAME).keys() == {"README.md"}
    hub.failing = {}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    code, out, err = cli("push", run, NAME, "--license", "mit")
    assert code == 2
    assert "hf auth login" in err
    assert "hf_wrong" not in out + err
    assert hub.files(NAME).keys() == {"README.md"}
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    weights = run / "adapter" / WEIGHTS
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = cli("push", run, NAME, "--license", "mit")
    assert code == 2
    assert "digest" in err
    assert hub.files(NAME).keys() == {"README.md"}


def test_without_a_network(run, hub, cli, monkeypatch):  # noqa: F811
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for command in (("push", run, NAME, "--license", "mit"), ("pull", NAME)):
        code, _, err = cli(*command)
        assert code == 2
        assert "The Hub at http://127.0.0.1:9 cannot be reached" in err, err
        assert len(err.strip().splitlines()) == 1, err
    go_offline(monkeypatch)
    for command in (("push", run, NAME, "--license", "mit"), ("pull", NAME)):
        code, _, err = cli(*command)
        assert code == 2
        assert "HF_HUB_OFFLINE forbids the network" in err, err
        assert len(err.strip().splitlines()) == 1, err


# ---- links, names, paths


def test_a_link_may_not_leave_the_cache(run, hub, cli):  # noqa: F811
    assert cli("push", run, NAME, "--license", "mit")[0] == 0
    assert cli("pull", NAME)[0] == 0
    cache = Path(constants.HF_HUB_CACHE)
    link = next(cache.glob(f"models--*/snapshots/*/{WEIGHTS}"))
    blob = link.resolve()
    outside = shutil.copy(blob, run / "weights.safetensors")

    # The cache of several repositories keeps a blob in a folder of its own, with a mark.
    shared = cache / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    shutil.move(blob, shared)
    blob.symlink_to(shared)
    with pytest.raises(UserError, match="symbolic link"):
        read_adapter(NAME)
    (cache / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
    assert read_adapter(NAME)["base"]["name"] == "org/base"

    # A blob that leads elsewhere, a link past the blobs, and a link outside of any cache.
    blob.unlink()
    blob.symlink_to(outside)
    with pytest.raises(UserError, match="symbolic link"):
        read_adapter(NAME)
    link.unlink()
    link.symlink_to(outside)
    with pytest.raises(UserError, match="symbolic link"):
        read_adapter(NAME)
    plain = run / "linked"
    plain.mkdir()
    (plain / WEIGHTS).symlink_to(outside)
    with pytest.raises(UserError, match="symbolic link"):
        read_adapter(plain)


def test_names():
    assert str(hub_name("a/b@v1")) == "a/b@v1"
    assert hub_name("a/b", "v1") == hub_name("a/b@v1")
    for text in ("a", "a/b/c", "/a/b", "./a", "a/b@", "~/a", "a b/c"):
        assert parse_hub_name(text) is None, text


def test_paths_of_this_machine_are_found(tmp_path):
    text = f"See {tmp_path}, https://example.org/tmp/a and /no/such/place, not a/b or /tmp."
    assert local_paths(text) == [str(tmp_path)]


def test_a_missing_local_folder_is_not_asked_of_the_hub(hub, here, caplog):  # noqa: F811
    Path("runs/first").mkdir(parents=True)
    with caplog.at_level(logging.WARNING), pytest.raises(FileNotFoundError, match="runs/first"):
        read_adapter("runs/frist")
    assert hub.seen == []
