"""`export`: write an adapter in the format of HF PEFT."""

import argparse
from pathlib import Path
from typing import Any

from adaptrank._errors import did_you_mean
from adaptrank.cli.errors import ConfigError
from adaptrank.cli.loading import StoredModel
from adaptrank.cli.options import ADAPTER, BASE, FORCE, TRUST

FORMATS = {
    "peft": "ranks and scales as they are, by rank_pattern and alpha_pattern",
    "lora-uniform": "one rank, filled up with zeros, scale 1: for vLLM or llama.cpp's converter",
}

DESCRIPTION = """\
Write an adapter so that HF PEFT and servers load it. LoRA, DoRA and LoKr stay what they are. Any
other product of small factors becomes a LoRA, exactly. A change that is no product (HyperAdapt,
most hybrids) becomes the best LoRA of a stated --rank or --error, and the loss is printed. `merge`
is exact for all of them.

formats:
""" + "\n".join(f"  {name:14}{text}" for name, text in FORMATS.items())

TEXTS = (
    "The capital of France is Paris.",
    "If a train leaves at noon and drives for three hours, it arrives at",
    "1 + 2 = 3, and 2 + 2 =",
)
"""Texts on which the effect of an approximation on logits is measured."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    formats = "peft or lora-uniform (peft)"
    parser.add_argument("--format", default="peft", metavar="NAME", help=formats)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="new folder")
    rank = "rank of the LoRA that replaces a change which is no product"
    parser.add_argument("--rank", type=int, metavar="K", help=rank)
    error = "or its largest relative error in a layer"
    parser.add_argument("--error", type=float, metavar="E", help=error)
    parser.add_argument("--base", metavar="NAME", help=BASE)
    parser.add_argument("--trust_remote_code", action="store_true", help=TRUST)
    parser.add_argument("--force", action="store_true", help=FORCE)


def run(options: argparse.Namespace) -> None:
    """Write the adapter, and print what was lost."""
    from adaptrank._files import write_json
    from adaptrank.artifacts import shown_adapter
    from adaptrank.cli.loading import find_adapter, stored_dtype
    from adaptrank.cli.out_folder import check_out, write_folder
    from adaptrank.interop.peft import export_peft

    _check(options)
    out = Path(options.out)
    stored = find_adapter(options.adapter, options.base, options.trust_remote_code)
    assert stored.adapter is not None
    check_out(out, options.force, {stored.adapter: "adapter", Path(stored.source.path): "base"})
    _check_pruned(stored.adapter)
    model = stored.load(stored_dtype(stored.source, stored.trusts_code), folded=False)
    base = {"name": stored.source.name, "auto_class": stored.auto_class}
    report: dict[str, Any] = {}

    def write(folder: Path) -> None:
        uniform = options.format == "lora-uniform"
        report.update(export_peft(model, folder, base, uniform, options.rank, options.error))
        write_json(folder / "export.json", report)
        if stored.added_tokens:
            stored.tokenizer().save_pretrained(folder)

    write_folder(out, write)
    layers = report["layers"]
    ranks = [facts["rank"] for facts in layers.values()]
    print(f"Exported {shown_adapter(stored.adapter)} as {options.format}, {report['type']}: {out}")
    print(f"  {len(layers)} layers, ranks {min(ranks)} to {max(ranks)}")
    errors = {path: facts["error"] for path, facts in layers.items() if facts["error"]}
    if errors:
        mean, worst = sum(errors.values()) / len(errors), max(errors, key=lambda p: errors[p])
        print(f"  relative error of the changes: mean {mean:.3f}, ", end="")
        print(f"largest {errors[worst]:.3f} at {worst}; each in export.json")
        if stored.is_causal and not stored.trained_rows:
            print(f"  {_effect(stored, model, out)}")
    if stored.vocabulary:
        print(f"  first: base.resize_token_embeddings({stored.vocabulary})")
    print(f"  load: peft.PeftModel.from_pretrained(base, {str(out)!r})")


def _check(options: argparse.Namespace) -> None:
    """Refuse options that do not fit together."""
    if options.format == "gguf":
        raise ConfigError(
            "llama.cpp's converter is a script of its repository, and no package: export with "
            "--format lora-uniform, then run "
            "`python convert_lora_to_gguf.py FOLDER --base BASE_FOLDER` there."
        )
    if options.format not in FORMATS:
        hint = did_you_mean(options.format, FORMATS)
        raise ConfigError(
            f"--format {options.format} is unknown.{hint} There are {', '.join(FORMATS)}."
        )
    if options.rank is not None and options.error is not None:
        raise ConfigError("--rank and --error both say how near a LoRA has to come. Give one.")
    if options.rank is not None and options.rank < 1:
        raise ConfigError(f"--rank {options.rank}: --rank is 1 or more.")
    if options.error is not None and not 0 < options.error < 1:
        raise ConfigError(f"--error {options.error}: --error is above 0 and below 1.")


def _check_pruned(adapter: Path) -> None:
    from adaptrank.artifacts import read_adapter

    if read_adapter(adapter).get("pruned"):
        raise ConfigError(
            f"{adapter} cuts heads or channels out of its base, which PEFT cannot state."
        )


def _effect(stored: StoredModel, exact: Any, out: Path) -> str:
    """Return what an approximation does to the logits of some sentences, as a sentence.

    Args:
        stored: the adapter and its base.
        exact: the model with the adapter as it is.
        out: folder of the exported adapter.
    """
    import torch

    from adaptrank.cli.loading import stored_dtype
    from adaptrank.interop.peft import import_peft

    base = stored.load(stored_dtype(stored.source, stored.trusts_code), adapted=False)
    exported = import_peft(base, out).train(False)
    tokenizer = stored.tokenizer()
    difference, divergence, agreement = 0.0, [], []
    for text in TEXTS:
        ids = torch.tensor(tokenizer([text])["input_ids"])
        if not ids.numel():
            continue
        with torch.no_grad():
            log_p = exact(input_ids=ids).logits.float().log_softmax(-1)  # (1, tokens, vocabulary)
            log_q = exported(input_ids=ids).logits.float().log_softmax(-1)
        difference = max(difference, float((log_p - log_q).abs().max()))
        divergence.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
        agreement.append(float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean()))
    if not agreement:
        return "its effect on logits was not measured: the tokenizer reads none of the test texts"
    count = len(agreement)
    return (
        f"on {count} sentences: KL divergence {sum(divergence) / count:.4f} a token, largest "
        f"difference of a log-probability {difference:.3f}, "
        f"{100 * sum(agreement) / count:.0f} % of tokens the same"
    )
