"""`merge`: fold an adapter into its base and write a plain transformers model."""

import argparse
import logging
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptrank.cli.errors import ConfigError
from adaptrank.cli.options import ADAPTER, BASE, FORCE, TRUST

if TYPE_CHECKING:
    import torch

log = logging.getLogger("adaptrank")

DESCRIPTION = """\
Fold an adapter into its base and write a plain transformers model with its tokenizer, which
`from_pretrained` loads without adaptrank. The sum is taken in float32. Class names, padding, stop
tokens and the chat template of training go into the model's configuration and its tokenizer."""

WARNED = 0.2
"""Rounding error, relative to the adapter's change, above which a warning is given."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the model")
    parser.add_argument("--base", metavar="NAME", help=BASE)
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    dtypes = ("auto", "fp32", "bf16", "fp16")
    dtype = "of the saved weights; auto is that of the base's files"
    parser.add_argument("--dtype", default="auto", choices=dtypes, help=dtype)
    parser.add_argument("--force", action="store_true", help=FORCE)


def run(options: argparse.Namespace) -> None:
    """Write the merged model."""
    import torch

    from adaptrank.artifacts import finish_configuration, shown_adapter
    from adaptrank.artifacts import merge as fold
    from adaptrank.backbones import auto_dtype
    from adaptrank.cli.loading import find_adapter, stored_dtype
    from adaptrank.cli.out_folder import check_out, write_folder
    from adaptrank.parameterizations import wrapped_layers

    out = Path(options.out)
    stored = find_adapter(options.adapter, options.base, options.trust_remote_code)
    assert stored.adapter is not None
    _check_pruned(stored.adapter)
    check_out(out, options.force, {stored.adapter: "adapter", Path(stored.source.path): "base"})
    base_dtype = stored_dtype(stored.source, stored.trusts_code)
    dtype = base_dtype if options.dtype == "auto" else auto_dtype(options.dtype)
    # The base is loaded as it is stored. Half precision is merged in float32 anyway, and float32
    # must not be rounded before the sum.
    model = stored.load(dtype if dtype == base_dtype else torch.float32)
    layers = len(wrapped_layers(model))
    _check_parameters(model)
    if dtype not in (torch.float32, base_dtype):
        _warn_of_rounding(model, dtype)
    model = fold(model).to(dtype)
    preprocessor = stored.preprocessor()
    finish_configuration(model, preprocessor, stored.conventions)
    write_folder(
        out, lambda folder: (model.save_pretrained(folder), preprocessor.save_pretrained(folder))
    )
    size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
    adapter = shown_adapter(stored.adapter)
    print(f"Merged {layers} layers of {adapter} into {stored.source.name}: {out} ", end="")
    print(f"({_short(dtype)}, {size:,.0f} MB)")
    trust = " --trust_remote_code" if stored.trusts_code else ""
    if stored.writes_text:
        print(
            f"  generate: python -m adaptrank generate {shlex.quote(str(out))} --prompt TEXT{trust}"
        )
    print(f"  load:     transformers.{stored.auto_class}.from_pretrained({str(out)!r})")


def _check_pruned(adapter: Path) -> None:
    """Refuse an adapter that cuts heads or channels out of its base."""
    from adaptrank.artifacts import read_adapter

    if pruned := read_adapter(adapter).get("pruned"):
        raise ConfigError(
            f"{adapter} cuts {len(pruned)} sets of heads or channels out of its base, each to its "
            f"own size, which no transformers configuration can state. Keep the adapter, and load "
            f"it with adaptrank.load_adapter(model, folder)."
        )


def _check_parameters(model: Any) -> None:
    """Refuse a merge that makes parameters which `from_pretrained` would leave out."""
    from adaptrank.parameterizations import wrapped_layers

    new = []
    for path, layer in wrapped_layers(model).items():
        known = dict(layer.innermost.named_parameters()).keys()
        new += [f"{path}.{name}" for name in layer.merged() if name not in known]
    if new:
        raise ConfigError(
            f"Merging would make {new[0]} ({len(new)} such), which {type(model).__name__} does "
            f"not have here: from_pretrained would leave it out. Keep the adapter, or merge in "
            f"Python, adaptrank.merge(model)."
        )


def _warn_of_rounding(model: Any, dtype: "torch.dtype") -> None:
    """Warn if the cast after the sum, which `artifacts.merge` cannot see, loses much of it."""
    from adaptrank.artifacts.merging import rounding_error

    error = rounding_error(model, dtype)
    if error > WARNED:
        log.warning(
            "Rounding to %s is an error of %.0f %% of the adapter's change. "
            "Merge with --dtype fp32 to keep it.",
            _short(dtype),
            100 * error,
        )


def _short(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")
