"""`extract`: make an adapter's folder of a checkpoint."""

import argparse
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adaptrank.cli.errors import ConfigError, missing_file
from adaptrank.cli.options import FORCE

DESCRIPTION = """\
Make an adapter's folder of a checkpoint (.ckpt) of a run: the best one, one of an earlier step, or
interrupted.ckpt. The folder is what the run would have saved at that step. The base is not loaded,
and no code in the file is run. A checkpoint of an earlier version does not describe its adapter:
then the config.yaml of its run builds the model once more."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint of a run, .ckpt")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder for the adapter")
    config = "config.yaml of the run, for a checkpoint of an earlier version; by default that in "
    config += "the run folder around the checkpoint"
    parser.add_argument("--config", metavar="FILE", help=config)
    parser.add_argument("--force", action="store_true", help=FORCE)


def run(options: argparse.Namespace) -> None:
    """Write the adapter."""
    from adaptrank.artifacts import TENSORS, extract_adapter
    from adaptrank.checkpoints import RECORD, read_checkpoint
    from adaptrank.cli.out_folder import check_out, write_folder

    file, out = Path(options.checkpoint).expanduser(), Path(options.out)
    if file.is_dir():
        raise ConfigError(_about_folder(file))
    if not file.is_file():
        raise ConfigError(missing_file(options.checkpoint, "checkpoint"))
    check_out(out, options.force, {file.parent: "checkpoint"})
    checkpoint = read_checkpoint(file)
    description = checkpoint.get(RECORD, {}).get("adapter")
    if description is not None and TENSORS in checkpoint:
        write_folder(out, lambda folder: extract_adapter(checkpoint, description, file, folder))
    else:
        _extract_by_config(file, options.config, out)
    step = checkpoint.get("global_step")
    print(f"Adapter of {file}, step {step}: {out}")
    for line in closed_units(checkpoint):
        print(f"  {line}")
    folder = shlex.quote(str(out))
    print(f"  merge:    python -m adaptrank merge {folder} --out FOLDER")
    print(f"  evaluate: python -m adaptrank test --config FILE --model.adapter {folder}")


def closed_units(checkpoint: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each allocator that had closed units which were still there."""
    lines = []
    for name, state in checkpoint.get("callbacks", {}).items():
        closed = state.get("closed") if isinstance(state, Mapping) else None
        if closed:
            count = sum(map(len, closed.values()))
            lines.append(
                f"{name} had closed {count} units at this step, and not removed them. The "
                f"adapter contains them."
            )
    return lines


def _about_folder(folder: Path) -> str:
    """Return the sentence for a folder where a checkpoint belongs."""
    inside = [*sorted(folder.glob("*.ckpt")), *sorted(folder.glob("checkpoints/*.ckpt"))]
    hint = f" Did you mean {inside[-1]}?" if inside else ""
    return f"{folder} is a folder, and a checkpoint is a file.{hint}"


def _extract_by_config(file: Path, config: str | None, out: Path) -> None:
    """Build the model of the run again, load the checkpoint into it, and save its adapter."""
    from adaptrank.cli.rebuilding import save_rebuilt

    candidates = [file.parent.parent / "config.yaml", file.parent / "config.yaml"]
    found = [candidate for candidate in candidates if candidate.is_file()]
    if config is None and not found:
        raise ConfigError(
            f"{file} does not describe its adapter, and there is no config.yaml of its run around "
            f"it: name that file with --config."
        )
    save_rebuilt(file, Path(config) if config else found[0], out)
