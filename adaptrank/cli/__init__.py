"""The command line: picks the verb, and imports what it needs only then, so that help is there at once."""

import os
import sys
from collections.abc import Sequence

VERBS = {
    "fit": "train adapters from a YAML file, evaluate before and after, leave a run folder",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "predict, or complete prompts",
    "methods": "list parameterizations and allocators: formula, source, axes, cost, which pairs work",
    "plan": "say what a configuration would train, take and leave, without loading a weight",
    "compare": "run a study: methods, allocators, budgets, learning rates, seeds; with a report",
    "report": "draw what an allocator did in a run: pictures and a page of HTML",
    "inspect": "spectra of an adapter: how large and of what rank its changes are, intruder dimensions",
    "compose": "several adapters as one: sums, TIES, DARE, KnOTS, compression, with a report",
    "export": "an adapter in the format of HF PEFT, for PEFT itself or for servers that know one rank",
    "import": "an adapter of HF PEFT in ours: LoRA, DoRA, AdaLoRA, LoKr",
    "generate": "complete prompts with an adapter, or with a merged model",
    "merge": "fold an adapter into its base and write a plain transformers model",
}

HELP = """usage: python -m adaptrank VERB [...]

Adaptive-rank, parameter-efficient fine-tuning on PyTorch Lightning.

verbs:
{verbs}

start here:
  python -m adaptrank fit --config configs/smoke.yaml             seconds
  python -m adaptrank fit --config configs/hyperadapt_llama.yaml  minutes, on a real Llama
  python -m adaptrank VERB --help
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; argv is that of the process by default. Exits with 2 for a mistake in what was typed."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(
            HELP.format(verbs="\n".join(f"  {verb:10} {what}" for verb, what in VERBS.items())),
            end="",
        )
        return
    if args[0] == "--version":
        from adaptrank import __version__

        print(f"adaptrank {__version__}")
        return
    verb, rest = args[0], args[1:]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(
            0, os.getcwd()
        )  # a user's own classes beside their YAML, from the console script too
    if verb in ("fit", "validate", "test", "predict"):
        if any(arg in ("-h", "--help") for arg in rest):
            from adaptrank.cli.help import usage

            print(usage(verb), end="")
            return
        from adaptrank.cli.train import run

        run(verb, rest)
    elif verb in VERBS:
        from importlib import import_module

        # A verb of some length has a file of its name; `import` is a word that Python keeps for itself.
        home = {"methods": "verbs", "generate": "verbs", "merge": "verbs", "import": "export"}.get(
            verb, verb
        )
        name = "import_" if verb == "import" else verb
        getattr(import_module(f"adaptrank.cli.{home}"), name)(rest)
    else:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        print(
            f"adaptrank: {verb!r} is no verb.{hint} There are: {', '.join(VERBS)}.", file=sys.stderr
        )
        raise SystemExit(2)
