"""`export` and `import`: adapters in the format of HF PEFT."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaptrank.cli import errors
from adaptrank.cli.verbs import (
    check_out,
    find_model,
    make_parser,
    run_verb,
    stored_dtype,
    write_folder,
)

FORMATS = {
    "peft": "ranks and scales as they are, by rank_pattern and alpha_pattern",
    "lora-uniform": "one rank, filled up with zeros, and a scale of 1, for servers such as vLLM and llama.cpp's converter",
}
TEXTS = (
    "The capital of France is Paris.",
    "If a train leaves at noon and drives for three hours, it arrives at",
    "1 + 2 = 3, and 2 + 2 =",
)
"""What the effect of an approximation on logits is measured on."""


def export(args: Sequence[str]) -> None:
    """An adapter in the format of HF PEFT."""
    formats = "\n".join(f"  {name:14}{what}" for name, what in FORMATS.items())
    parser = make_parser(
        "export",
        "Write an adapter so that HF PEFT and servers load it. LoRA, DoRA and LoKr leave as what they are, whatever is a\n"
        "product of small factors as a LoRA, exactly. What is no product (HyperAdapt, most hybrids) leaves as the best\n"
        f"LoRA of a stated --rank or --error, and the loss is told, or exactly by `merge`.\n\nformats:\n{formats}",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="a run's adapter folder")
    parser.add_argument(
        "--format", default="peft", metavar="NAME", help="peft or lora-uniform (peft)"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--rank", type=int, metavar="K", help="of the LoRA in place of what is no product"
    )
    parser.add_argument(
        "--error", type=float, metavar="E", help="or its largest relative error in a layer"
    )
    parser.add_argument(
        "--base", metavar="NAME", help="the base; by default what the adapter's file names"
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    run_verb(_export, parser.options(args))


def _export(options: argparse.Namespace) -> None:
    from adaptrank.artifacts import read_adapter
    from adaptrank.artifacts.run import write_json
    from adaptrank.interop.peft import export_peft

    if options.format == "gguf":
        raise errors.ConfigError(
            "llama.cpp's converter is a script of its repository, and no package: export with --format lora-uniform, then run "
            "`python convert_lora_to_gguf.py FOLDER --base BASE_FOLDER` there."
        )
    if options.format not in FORMATS:
        raise errors.ConfigError(
            f"--format {options.format} is unknown{errors.hint(options.format, FORMATS)} There are {', '.join(FORMATS)}."
        )
    if options.rank is not None and options.error is not None:
        raise errors.ConfigError(
            "--rank and --error both say how near a LoRA has to come; give one."
        )
    if (options.rank is not None and options.rank < 1) or (
        options.error is not None and not 0 < options.error < 1
    ):
        raise errors.ConfigError("--rank is 1 or more, --error above 0 and below 1.")
    out = Path(options.out)
    found = find_model(options.adapter, options.base, must_be_adapter=True)
    assert found.adapter is not None
    check_out(out, options.force, {found.adapter: "adapter", Path(found.source.path): "base"})
    if read_adapter(found.adapter).get("pruned"):
        raise errors.ConfigError(
            f"{found.adapter} cuts heads or channels out of its base, which PEFT cannot state."
        )
    model = found.load(stored_dtype(found.source))
    base = {"name": found.source.name, "auto_class": found.auto_class}
    report: dict[str, Any] = {}

    def write(folder: Path) -> None:
        nonlocal report
        report = export_peft(
            model, folder, base, options.format == "lora-uniform", options.rank, options.error
        )
        write_json(folder / "export.json", report)

    write_folder(out, write)
    layers = report["layers"]
    ranks = [facts["rank"] for facts in layers.values()]
    print(f"Exported {found.adapter} as {options.format}, {report['type']}: {out}")
    print(f"  {len(layers)} layers, ranks {min(ranks)} to {max(ranks)}")
    lossy = {path: facts["error"] for path, facts in layers.items() if facts["error"]}
    if lossy:
        worst = max(lossy, key=lambda path: lossy[path])
        print(
            f"  relative error of the changes: mean {sum(lossy.values()) / len(lossy):.3f}, largest {lossy[worst]:.3f} at {worst}; each in export.json"
        )
        if found.auto_class == "AutoModelForCausalLM":
            print(f"  {_effect(found, model, out)}")
    print(f"  load: peft.PeftModel.from_pretrained(base, {str(out)!r})")


def _effect(found: Any, exact: Any, out: Path) -> str:
    """What an approximation does to the logits of some sentences."""
    import torch

    from adaptrank.backbones import load_tokenizer
    from adaptrank.interop.peft import import_peft

    near = import_peft(found.load(stored_dtype(found.source), adapted=False), out).train(False)
    tokenizer = load_tokenizer(found.source)
    off, divergence, agree = 0.0, [], []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor(tokenizer([text])["input_ids"])
            if not ids.numel():
                continue
            one, two = (
                model(input_ids=ids).logits.float().log_softmax(-1) for model in (exact, near)
            )
            off = max(off, float((one - two).abs().max()))
            divergence.append(float((one.exp() * (one - two)).sum(-1).mean()))
            agree.append(float((one.argmax(-1) == two.argmax(-1)).float().mean()))
    if not agree:
        return "its effect on logits was not measured: the tokenizer has no words of ours"
    count = len(agree)
    return (
        f"on {count} sentences: KL divergence {sum(divergence) / count:.4f} a token, largest difference of a log-probability {off:.3f}, "
        f"{100 * sum(agree) / count:.0f} % of tokens the same"
    )


def import_(args: Sequence[str]) -> None:
    """An adapter of HF PEFT in our classes."""
    parser = make_parser(
        "import",
        "Read an adapter that HF PEFT wrote (LoRA with rsLoRA, DoRA and patterns; AdaLoRA; LoKr), and write it as ours:\n"
        "for allocators, compose, inspect, merge. Only safetensors and JSON are read.",
    )
    parser.add_argument("adapter", metavar="PEFT_FOLDER", help="what PEFT's save_pretrained wrote")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    parser.add_argument(
        "--base", metavar="NAME", help="the base; by default what the configuration names"
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    run_verb(_import, parser.options(args))


def _import(options: argparse.Namespace) -> None:
    import transformers

    from adaptrank import backbones
    from adaptrank.artifacts import save_adapter
    from adaptrank.injection import describe
    from adaptrank.interop.peft import TASKS, import_peft, read_config

    folder, out = Path(options.adapter), Path(options.out)
    if not folder.is_dir():
        raise errors.ConfigError(errors.missing_file(options.adapter, "folder of a PEFT adapter"))
    config = read_config(folder)
    named = options.base or config.get("base_model_name_or_path")
    if not named:
        raise errors.ConfigError(
            f"{folder} does not say what base it was trained on; name it with --base."
        )
    auto_class = next(
        (ours for ours, task in TASKS.items() if task == config.get("task_type")),
        "AutoModelForCausalLM",
    )
    try:
        source = backbones.resolve(named)
    except FileNotFoundError as error:
        raise errors.ConfigError(
            f"The base of {folder}: {error} Name the base with --base."
        ) from error
    check_out(out, options.force, {folder: "adapter", Path(source.path): "base"})
    model = backbones.load_model(source, getattr(transformers, auto_class), stored_dtype(source))
    import_peft(model, folder)
    write_folder(
        out, lambda new: save_adapter(model, new, {"name": named, "auto_class": auto_class})
    )
    print(f"Imported {folder} on {source.name}: {out}")
    print("\n".join(f"  {line}" for line in describe(model).splitlines()))
    if auto_class == "AutoModelForCausalLM":
        print(f"  generate: python -m adaptrank generate {shlex.quote(str(out))} --prompt TEXT")
