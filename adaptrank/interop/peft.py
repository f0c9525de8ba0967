"""Adapters in the format of HF PEFT: written so that PEFT and servers load them, and read into our own classes.

An adapter in, a folder of two files out, and back. Both are checked before anything is made of them.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adaptrank import layers as kinds
from adaptrank._errors import UserError
from adaptrank.artifacts.adapter import CONFIG, WEIGHTS, trained_modules, write_files
from adaptrank.composition.changes import Change, Dense, Product, change_of, rank_for, truncated
from adaptrank.injection import adapt, undone_on_error
from adaptrank.parameterizations import Parameterization, named_layers, wrapped_layers
from adaptrank.parameterizations.dora import DoRA
from adaptrank.parameterizations.lokr import LoKr
from adaptrank.parameterizations.lora import LoRA
from adaptrank.parameterizations.svd import SVD

Model = TypeVar("Model", bound=nn.Module)

PREFIX = "base_model.model."
TASKS = {"AutoModelForCausalLM": "CAUSAL_LM", "AutoModelForSequenceClassification": "SEQ_CLS"}


# ---- out


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    base: Mapping[str, Any] | None = None,
    uniform: bool = False,
    rank: int | None = None,
    error: float | None = None,
) -> dict[str, Any]:
    """Write the adapter of a model as one of HF PEFT.

    A layer whose method PEFT has too (LoRA, DoRA, LoKr) leaves with its own tensors; one whose change is a product leaves as a LoRA of
    that product; both are exact. Ranks and scales that differ from layer to layer go into `rank_pattern` and `alpha_pattern`. What is no
    product leaves as the best LoRA of a stated rank or error.

    Args:
        model: any module that holds wrappers; a fused layer that was split is put together.
        folder: made if need be.
        base: what is known of the frozen model: {"name": ..., "auto_class": ...}.
        uniform: one rank for all layers, filled up with zeros, and a scale of 1 (alpha = r), for servers that know one of each; the true
            ranks are in the header of the weights.
        rank: of a LoRA in place of what is no product.
        error: or its relative error in Frobenius norm.
    Returns:
        {"type", "layers": {path: {"rank", "error"}}}; errors of what was approximated, exact ones are 0.
    Raises:
        ValueError: if there is nothing to write, or a layer has no such form; nothing is written then.
    """
    layers = wrapped_layers(model)
    if not layers:
        raise UserError("This model holds no adapter to export.")
    forms, facts = _forms(model, layers, uniform, rank, error)
    config, tensors, ranks = _fill(forms, uniform)
    config |= {
        "base_model_name_or_path": (base or {}).get("name"),
        "task_type": TASKS.get((base or {}).get("auto_class") or ""),
        "target_modules": _targets(model, list(forms)),
        "inference_mode": True,
    }
    modules = named_layers(model)
    plain = {path: _plain(modules[path]) for path in forms}
    if any(isinstance(layer, Conv1D) for layer in plain.values()):
        config["fan_in_fan_out"] = True
    tensors = dict(_laid_out(plain, key, value) for key, value in tensors.items())
    whole = trained_modules(model)
    if whole:
        config["modules_to_save"] = sorted(
            {name.rpartition(".")[0].rpartition(".")[2] for name in whole}
        )
        tensors |= {f"{PREFIX}{name}": value for name, value in whole.items()}
    write_files(
        Path(folder),
        {key: value.detach().contiguous().clone() for key, value in tensors.items()},
        {"format": "pt", "ranks": json.dumps(ranks)},
        json.dumps(config, indent=2),
    )
    return {"type": config["peft_type"], "layers": facts}


Form = tuple[dict[str, Any], dict[str, Tensor]]


def _forms(
    model: nn.Module,
    layers: Mapping[str, Parameterization],
    uniform: bool,
    rank: int | None,
    error: float | None,
) -> tuple[dict[str, Form], dict[str, dict[str, Any]]]:
    """Of each layer of the plain model its settings and tensors, and what was lost."""
    forms: dict[str, Form] = {}
    facts: dict[str, dict[str, Any]] = {}
    owners = _fused(model)
    for path, layer in layers.items():
        if not isinstance(layer.innermost, kinds.MATRICES):
            raise UserError(
                f"{type(layer).__name__} at {path} changes no single matrix, and PEFT's LoRA has no place for it; merge it instead."
            )
        if (owner := owners.get(path)) is not None:
            if owner not in forms:
                whole = _joined(model, owner, layers)
                forms[owner], facts[owner] = _as_lora(whole, owner, rank, error)
            continue
        on = [wrapper for wrapper in layer.nest if wrapper.enabled]
        own = on[0].peft() if len(on) == 1 and not on[0].gates else None
        if own is not None and not (
            uniform and ("use_dora" in own[0] or own[0]["peft_type"] != "LORA")
        ):
            forms[path], facts[path] = own, {"rank": own[0]["r"], "error": 0.0}
        else:
            forms[path], facts[path] = _as_lora(change_of(layer), path, rank, error)
    return forms, facts


def _fused(model: nn.Module) -> dict[str, str]:
    """Path of a part of a split layer -> path of that layer."""
    return {
        f"{path}.{name}" if path else name: path
        for path, module in named_layers(model).items()
        if isinstance(module, kinds.Parts)
        for name in module.names
    }


def _joined(model: nn.Module, owner: str, layers: Mapping[str, Parameterization]) -> Change:
    """The change of a fused layer from those of its parts, one below the other."""
    parts = model.get_submodule(owner)
    assert isinstance(parts, kinds.Parts)
    found: list[Change] = []
    for name, plain in zip(parts.names, parts.plain, strict=True):
        layer = layers.get(f"{owner}.{name}" if owner else name)
        (m, n), dtype = kinds.shape(plain), torch.promote_types(torch.float32, kinds.dtype(plain))
        found.append(
            Product(torch.zeros(m, 0, dtype=dtype), torch.zeros(0, n, dtype=dtype))
            if layer is None
            else change_of(layer)
        )
    products = [change for change in found if isinstance(change, Product)]
    if len(products) == len(found):
        U: Tensor = torch.block_diag(*(p.U for p in products))  # type: ignore[no-untyped-call]
        return Product(U, torch.cat([p.V for p in products]))
    return Dense(torch.cat([change.dense() for change in found]))


def _as_lora(
    change: Change, path: str, rank: int | None, error: float | None
) -> tuple[Form, dict[str, Any]]:
    lost = 0.0
    if not isinstance(change, Product):
        if rank is None and error is None:
            raise UserError(
                f"The change at {path} is no product of small factors, and a LoRA can only come near it: state the rank or the error "
                f"of the approximation, or merge instead."
            )
        k = rank if rank is not None else rank_for(change, error=error)
        S = change.spectrum.S
        lost = float(S[k:].norm() / S.norm()) if float(S.sum()) else 0.0
        change = truncated(change, k)
    r = max(1, change.rank)  # PEFT knows no rank of 0
    U, V = change.U, change.V
    if not change.rank:
        U, V = U.new_zeros(U.shape[0], 1), V.new_zeros(1, V.shape[1])
    return ({"peft_type": "LORA", "r": r, "lora_alpha": r}, {"lora_A": V, "lora_B": U}), {
        "rank": change.rank,
        "error": lost,
    }


def _fill(
    forms: Mapping[str, Form], uniform: bool
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, int]]:
    """(configuration, tensors by PEFT's keys, true ranks)."""
    types = {(s["peft_type"], s.get("use_dora", False)) for s, _ in forms.values()}
    if len(types) > 1:
        some = " and ".join(sorted({"DoRA" if dora else kind for kind, dora in types}))
        raise UserError(
            f"One PEFT adapter is of one kind, and these layers are {some}; export with uniform ranks, or merge."
        )
    ((kind, _),) = types
    alpha_name = "lora_alpha" if kind == "LORA" else "alpha"
    ranks = {path: int(settings["r"]) for path, (settings, _) in forms.items()}
    tensors: dict[str, Tensor] = {}
    if uniform:
        widest = max(ranks.values())
        for path, (settings, own) in forms.items():
            scale, missing = settings["lora_alpha"] / settings["r"], widest - settings["r"]
            A, B = own["lora_A"].detach(), own["lora_B"].detach() * scale
            padded = {
                "lora_A": torch.cat([A, A.new_zeros(missing, A.shape[1])]),
                "lora_B": torch.cat([B, B.new_zeros(len(B), missing)], 1),
            }
            tensors |= {f"{PREFIX}{path}.{name}.weight": value for name, value in padded.items()}
        return (
            {"peft_type": kind, "r": widest, "lora_alpha": widest, "bias": "none"},
            tensors,
            ranks,
        )
    alphas = {path: float(settings[alpha_name]) for path, (settings, _) in forms.items()}
    common = {
        key: value
        for key, value in next(iter(forms.values()))[0].items()
        if key not in ("r", alpha_name)
    }
    for path, (settings, own) in forms.items():
        for key, value in common.items():
            if settings[key] != value:
                raise UserError(
                    f"{path} has {key}={settings[key]!r}, other layers {value!r}; one PEFT adapter has one of them."
                )
        weight = {"lora_A", "lora_B"}
        tensors |= {
            f"{PREFIX}{path}.{name}{'.weight' if name in weight else ''}": value
            for name, value in own.items()
        }
    r, alpha = _most(ranks), _most(alphas)
    config = {**common, "r": r, alpha_name: alpha, "bias": "none"}
    if kind != "LORA":
        config.pop("bias")
    config["rank_pattern"] = {_exactly(path): k for path, k in ranks.items() if k != r}
    config["alpha_pattern"] = {_exactly(path): a for path, a in alphas.items() if a != alpha}
    return config, tensors, ranks


def _laid_out(layers: Mapping[str, nn.Module], key: str, value: Tensor) -> tuple[str, Tensor]:
    """An embedding's factors have names of their own in PEFT, a convolution's the shape of kernels."""
    path, name = _split(key, Path())
    plain = layers[path]
    if name in ("lora_A", "lora_B") and isinstance(plain, nn.Embedding):
        return f"{PREFIX}{path}.{name.replace('lora_', 'lora_embedding_')}", value
    if name in ("lora_A", "lora_B") and isinstance(plain, nn.Conv2d):
        taps = (len(value), -1, *plain.kernel_size) if name == "lora_A" else (*value.shape, 1, 1)
        return key, value.reshape(taps)
    return key, value


def _most(values: Mapping[str, Any]) -> Any:
    """The most frequent value."""
    found = list(values.values())
    return max(dict.fromkeys(found), key=found.count)


def _exactly(path: str) -> str:
    """A pattern for one path: PEFT matches it as a regular expression at the end of the path, after a dot or from its beginning."""
    return f"^{re.escape(path)}"


def _plain(module: nn.Module) -> nn.Module:
    """The layer under its wrappers; of one that was split a part, which is of its kind."""
    if isinstance(module, kinds.Parts):
        module = module.plain[0]
    return module.innermost if isinstance(module, Parameterization) else module


def _targets(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Last components, where they mean just these layers, else whole paths."""
    names = {path.rpartition(".")[2] for path in paths}
    meant = [path for path in named_layers(model) if path.rpartition(".")[2] in names]
    return sorted(names) if set(meant) == set(paths) else sorted(paths)


# ---- in


def import_peft(model: Model, folder: str | os.PathLike[str], name: str = "default") -> Model:
    """Put an adapter of HF PEFT on its base, in our own classes: LoRA (with rsLoRA and patterns), DoRA, AdaLoRA and LoKr.

    Args:
        model: the base, without an adapter of that name.
        folder: what PEFT's `save_pretrained` wrote, as safetensors.
        name: of the adapter here.
    Returns:
        The same model.
    Raises:
        FileNotFoundError: if a file is missing; a pickle is never read.
        ValueError: if it is another kind of adapter, or does not fit the model; the model is unchanged then.
    """
    folder = Path(folder)
    config, stored = read_peft(folder)
    modules = named_layers(model)
    whole: dict[str, Tensor] = {}
    of: dict[str, dict[str, Tensor]] = {}
    with undone_on_error(model, {}):
        before: dict[Tensor, Tensor] = {}
        parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for key, tensor in stored.items():
            path, own = _split(key, folder)
            if own is None:
                whole[path] = tensor
            else:
                of.setdefault(path, {})[own] = tensor
        for path, tensors in of.items():
            layer = modules.get(path)
            if layer is None or not isinstance(getattr(layer, "innermost", layer), kinds.MATRICES):
                raise UserError(
                    f"{folder} adapts {path!r}, which is no layer of this model; was it made for another base?"
                )
            maker, values = _maker(config, path, tensors, folder)
            m, n = kinds.shape(getattr(layer, "innermost", layer))
            if isinstance(maker.keywords.get("rank"), int) and maker.keywords["rank"] > 4 * (m + n):
                raise UserError(
                    f"{folder}: a rank of {maker.keywords['rank']:,} for {path} of {m} x {n} is absurd."
                )
            adapt(model, f"^{re.escape(path)}$", maker, name=name, split_fused=False)
            wrapper = next(w for w in wrapped_layers(model)[path].nest if w.name == name)
            for attribute, value in values.items():
                mine = getattr(wrapper, attribute)
                if tuple(value.shape) != tuple(mine.shape):
                    raise UserError(
                        f"{folder}: {attribute} of {path} is {tuple(value.shape)}, this model's is {tuple(mine.shape)}."
                    )
                with torch.no_grad():
                    mine.copy_(value)
            wrapper.refresh()
        try:
            for key, value in whole.items():
                have = parameters.get(key)
                if have is None or have.shape != value.shape:
                    raise UserError(
                        f"{folder} holds {key} {tuple(value.shape)}, which this model has not."
                    )
                before[have] = have.detach().clone()
                with torch.no_grad():
                    have.copy_(value)
                if have.is_floating_point():
                    have.requires_grad_(key in dict(model.named_parameters()))
        except BaseException:
            with torch.no_grad():
                for tensor, value in before.items():
                    tensor.copy_(value)
            raise
    return model


def read_peft(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT adapter.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if one is damaged, or the adapter is of a kind that we have not.
    """
    config = read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as stored:
            return config, {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS} is damaged: {error}.") from None


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a PEFT adapter whose weights are there, too.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if it is damaged, or the adapter is of a kind that we have not.
    """
    for file in (CONFIG, WEIGHTS):
        if (folder / file).is_symlink():
            raise UserError(
                f"{folder / file} is a symbolic link, which may lead anywhere; copy the file itself."
            )
        if not (folder / file).is_file():
            pickled = (
                " adapter_model.bin is a pickle, which is never loaded."
                if (folder / "adapter_model.bin").is_file()
                else ""
            )
            raise FileNotFoundError(
                f"No PEFT adapter at {str(folder)!r}: it has no {file}.{pickled}"
            )
    try:
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG} is no JSON: {error}.") from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind is None:
        raise UserError(f"{folder} is no adapter of PEFT: its {CONFIG} names no peft_type.")
    if kind not in ("LORA", "ADALORA", "LOKR"):
        raise UserError(
            f"{folder} is of PEFT's kind {kind}, which is not imported; LORA (with DoRA), ADALORA and LOKR are."
        )
    for name, off in (
        ("bias", "none"),
        ("lora_bias", False),
        ("use_qalora", False),
        ("layer_replication", None),
        ("trainable_token_indices", None),
    ):
        if config.get(name, off) not in (off, None):
            raise UserError(
                f"{folder} was trained with {name}={config[name]!r}, which none of our classes has."
            )
    _check_config(config, folder)
    found: dict[str, Any] = config
    return found


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Types and ranges of all that is read of a configuration."""

    def need(true: bool, name: str) -> None:
        if not true:
            raise UserError(
                f"{folder / CONFIG} has {name}={config.get(name)!r}, which is not what PEFT writes."
            )

    def number(value: Any) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    kind = config["peft_type"]
    if kind != "ADALORA":
        need(
            isinstance(config.get("r"), int)
            and not isinstance(config["r"], bool)
            and 1 <= config["r"] < 1 << 20,
            "r",
        )
    name = "alpha" if kind == "LOKR" else "lora_alpha"
    need(config.get(name) is None or number(config[name]), name)
    for name in ("use_rslora", "use_dora", "decompose_both"):
        need(config.get(name) in (None, True, False), name)
    factor = config.get("decompose_factor")
    need(factor is None or (isinstance(factor, int) and -1 <= factor < 1 << 20), "decompose_factor")
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name)
        need(pattern is None or isinstance(pattern, dict), name)
        for key, value in (pattern or {}).items():
            fits = number(value) or (kind == "ADALORA" and isinstance(value, list))
            need(fits and len(key) <= 1000 and _compiles(key), name)
    named = config.get("base_model_name_or_path")
    need(named is None or isinstance(named, str), "base_model_name_or_path")


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


_OWN = re.compile(
    r"^(?P<path>.+)\.(?P<name>lora_[AB]|lora_embedding_[AB]|lora_E|ranknum|lora_magnitude_vector|lokr_w1|lokr_w2|lokr_w[12]_[ab])(\.weight)?$"
)


def _split(key: str, folder: Path) -> tuple[str, str | None]:
    """(path, tensor) of a key; (whole name, None) of a module that was trained whole."""
    if not key.startswith(PREFIX):
        raise UserError(f"{folder} holds {key!r}, and PEFT's keys begin with {PREFIX!r}.")
    match = _OWN.match(key.removeprefix(PREFIX))
    return (match["path"], match["name"]) if match else (key.removeprefix(PREFIX), None)


def _maker(
    config: Mapping[str, Any], path: str, tensors: dict[str, Tensor], folder: Path
) -> tuple[Any, dict[str, Tensor]]:
    """Our class with its arguments, and its tensors by their names there."""
    names = set(tensors)
    if config["peft_type"] == "LOKR":
        return _lokr(config, path, tensors, folder)
    A = tensors.get("lora_A", tensors.get("lora_embedding_A"))
    B = tensors.get("lora_B", tensors.get("lora_embedding_B"))
    if A is None or B is None:
        raise UserError(
            f"{folder} has no lora_A or no lora_B of {path}; it has {', '.join(sorted(names))}."
        )
    if (
        A.dim() < 2
        or B.dim() < 2
        or not len(A)
        or not A.is_floating_point()
        or not B.is_floating_point()
    ):
        raise UserError(
            f"{folder}: the factors of {path} are {tuple(A.shape)} and {tuple(B.shape)}, which are no matrices."
        )
    A, B = A.flatten(1), B.flatten(1)
    r = len(A)
    if config["peft_type"] == "ADALORA":
        if "lora_E" not in tensors:
            raise UserError(f"{folder} is of AdaLoRA, and has no lora_E of {path}.")
        alpha = float(config.get("lora_alpha") or 8)
        count = (
            float(tensors["ranknum"])
            if tensors.get("ranknum", torch.empty(0)).numel() == 1
            else _rank_of(config, path, r)
        )
        scale = alpha / (count + 1e-5)  # as PEFT divides
        return partial(SVD, rank=r, alpha=scale * r), {
            "Q": A,
            "P": B,
            "l": tensors["lora_E"].flatten(),
        }
    stated = _by_pattern(config.get("rank_pattern"), path, config["r"])
    if stated != r:
        raise UserError(f"{folder} states a rank of {stated} for {path}, and its tensors have {r}.")
    alpha = float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha") or 8))
    if config.get("use_rslora"):
        alpha *= math.sqrt(
            r
        )  # a rank that an allocator changes later leaves the scale alone, so both forms are one
    if config.get("use_dora"):
        magnitude = tensors.get("lora_magnitude_vector")
        if magnitude is None:
            raise UserError(f"{folder} says use_dora, and has no lora_magnitude_vector of {path}.")
        return partial(DoRA, rank=r, alpha=alpha), {"A": A, "B": B, "m": magnitude.flatten()}
    return partial(LoRA, rank=r, alpha=alpha), {"A": A, "B": B}


def _lokr(
    config: Mapping[str, Any], path: str, tensors: dict[str, Tensor], folder: Path
) -> tuple[Any, dict[str, Tensor]]:
    if "lokr_w2" in tensors:
        raise UserError(
            f"{folder}: the large factor of {path} is whole, and our LoKr has it as a product; lower the rank in PEFT."
        )
    r = int(_by_pattern(config.get("rank_pattern"), path, config["r"]))
    alpha = float(_by_pattern(config.get("alpha_pattern"), path, config.get("alpha") or 8))
    both = "lokr_w1_a" in tensors
    needed = {"lokr_w2_a", "lokr_w2_b", *({"lokr_w1_a", "lokr_w1_b"} if both else {"lokr_w1"})}
    if missing := sorted(needed - tensors.keys()):
        raise UserError(f"{folder} has no {missing[0]} of {path}.")
    if r > max(t.numel() for t in tensors.values()):
        raise UserError(f"{folder} states a rank of {r} for {path}, and its tensors are smaller.")
    made = partial(
        LoKr,
        rank=r,
        alpha=alpha,
        factor=int(config.get("decompose_factor") or -1),
        decompose_both=both,
    )
    coarse = (
        {"A1": tensors["lokr_w1_a"], "A2": tensors["lokr_w1_b"]}
        if both
        else {"A": tensors["lokr_w1"]}
    )
    return made, {**coarse, "B1": tensors["lokr_w2_a"], "B2": tensors["lokr_w2_b"]}


def _rank_of(config: Mapping[str, Any], path: str, r: int) -> int:
    """AdaLoRA's final rank of a layer: its pattern says which units are left."""
    pattern = config.get("rank_pattern") or {}
    for key, left in pattern.items():
        if path in key and isinstance(left, list):
            return sum(map(bool, left))
    return r


def _by_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """As PEFT looks it up: the first key that matches the path from its beginning or after a dot, to its end."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
