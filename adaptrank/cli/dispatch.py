"""Pick the verb. What it needs is imported only then, so that help is there at once."""

import os
import sys
from collections.abc import Sequence

from adaptrank._errors import did_you_mean
from adaptrank.cli.completion import complete, is_asked
from adaptrank.cli.errors import fail
from adaptrank.cli.start_up import without_garbage_collection
from adaptrank.cli.verbosity import read_verbosity

TRAINING_VERBS = ("fit", "validate", "test", "predict")

VERBS = {
    "fit": "train adapters from a YAML file, evaluate before and after, leave a run folder",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "predict, or complete prompts",
    "methods": "list parameterizations and allocators: formula, source, axes, cost, pairs",
    "plan": "say what a configuration would train, take and leave, without loading a weight",
    "compare": "run a study: methods, allocators, budgets, learning rates, seeds; with a report",
    "report": "draw what an allocator did in a run: pictures and a page of HTML",
    "inspect": "show the spectra of an adapter: size and rank of its changes, intruder dimensions",
    "compose": "put several adapters together: sums, TIES, DARE, KnOTS, compression",
    "export": "write an adapter in the format of HF PEFT, for PEFT or for servers with one rank",
    "import": "read an adapter of HF PEFT: LoRA, DoRA, AdaLoRA, LoKr",
    "generate": "complete prompts with an adapter, or with a merged model",
    "push": "share an adapter on the Hugging Face Hub, with a card that says how to load it",
    "pull": "fetch an adapter from the Hugging Face Hub",
    "extract": "make an adapter of a checkpoint of a run: the best one, or of any step",
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

every verb takes --quiet (no progress) and --verbose (all that the libraries log)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb. A mistake in the arguments exits with 2.

    Args:
        argv: the arguments; by default those of the process.
    """
    if is_asked():
        complete(VERBS, TRAINING_VERBS)
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        verbs = "\n".join(f"  {verb:10} {summary}" for verb, summary in VERBS.items())
        print(HELP.format(verbs=verbs), end="")
        return
    if args[0] == "--version":
        from adaptrank import __version__

        print(f"adaptrank {__version__}")
        return
    # A user's own classes stand beside their YAML. The console script does not look there itself.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    verb, *rest = read_verbosity(args)
    if verb not in VERBS:
        fail(f"{verb!r} is no verb.{did_you_mean(verb, VERBS)} There are: {', '.join(VERBS)}.")
    if verb not in TRAINING_VERBS:
        from adaptrank.cli.options import run_verb

        run_verb(verb, rest)
    elif "-h" in rest or "--help" in rest:
        from adaptrank.cli.help import usage

        print(usage(verb), end="")
    else:
        rest = prepare(verb, rest)
        with without_garbage_collection():
            from adaptrank.cli.train import run

        run(verb, rest)


def prepare(verb: str, args: Sequence[str]) -> list[str]:
    """Check the keys of a command line before PyTorch is imported, and expand list positions.

    A mistake exits with 2.

    Args:
        verb: fit, validate, test or predict.
        args: the command line after the verb.

    Returns:
        The command line without options that name an item of a list.
    """
    from adaptrank._errors import UserError
    from adaptrank.cli.early_check import check_early
    from adaptrank.cli.errors import debugging
    from adaptrank.cli.list_items import expand_items

    try:
        expanded = expand_items(args)
        check_early(verb, expanded)
    except UserError as error:
        if debugging(args):
            raise
        fail(str(error))
    return expanded
