"""`import`: read an adapter of HF PEFT, and write it as the library's own."""

import argparse
import shlex
from pathlib import Path

from adaptrank.cli.errors import ConfigError, missing_file
from adaptrank.cli.options import FORCE

DESCRIPTION = """\
Read an adapter that HF PEFT wrote (LoRA with rsLoRA, DoRA and patterns; AdaLoRA; LoKr), and write
it as an adapter of this library: for allocators, compose, inspect, merge. Only safetensors and JSON
are read."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    adapter = "what PEFT's save_pretrained wrote, or its name on the Hub, user/name"
    parser.add_argument("adapter", metavar="PEFT_FOLDER", help=adapter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    base = "the base model; by default the one that PEFT's configuration names"
    parser.add_argument("--base", metavar="NAME", help=base)
    initial = "the adapter as PEFT saved it before training, which CorDA, LoRA-GA and others need"
    parser.add_argument("--initial", metavar="PEFT_FOLDER", help=initial)
    parser.add_argument("--force", action="store_true", help=FORCE)


def run(options: argparse.Namespace) -> None:
    """Write the adapter, and print what it wraps."""
    import transformers

    from adaptrank import backbones
    from adaptrank.artifacts import locate_adapter, parse_hub_name, save_adapter, shown_adapter
    from adaptrank.cli.loading import find_base, stored_dtype
    from adaptrank.cli.out_folder import check_out, write_folder
    from adaptrank.injection import describe
    from adaptrank.interop.peft import TASKS, import_peft, read_config

    out = Path(options.out)
    given = Path(options.adapter).expanduser()
    if not given.is_dir() and (given.exists() or parse_hub_name(options.adapter) is None):
        raise ConfigError(missing_file(options.adapter, "folder of a PEFT adapter"))
    folder = locate_adapter(options.adapter)
    config = read_config(folder)
    if not options.base and config.get("revision") not in (None, "main"):
        raise ConfigError(
            f"{folder} was trained on revision {config['revision']!r} of its base. Download that "
            "revision, and name its folder with --base."
        )
    name = options.base or config.get("base_model_name_or_path")
    source = find_base(folder, name)
    auto_classes = {task: auto_class for auto_class, task in TASKS.items()}
    auto_class = auto_classes.get(str(config.get("task_type")), "AutoModelForCausalLM")
    check_out(out, options.force, {folder: "adapter", Path(source.path): "base"})
    model = backbones.load_model(source, getattr(transformers, auto_class), stored_dtype(source))
    import_peft(model, folder, initial=options.initial)
    base = {"name": name, "auto_class": auto_class}
    write_folder(out, lambda new: save_adapter(model, new, base))
    print(f"Imported {shown_adapter(folder)} on {source.name}: {out}")
    print("\n".join(f"  {line}" for line in describe(model).splitlines()))
    if auto_class == "AutoModelForCausalLM":
        print(f"  generate: python -m adaptrank generate {shlex.quote(str(out))} --prompt TEXT")
