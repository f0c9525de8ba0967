"""`plan`: say what a configuration would train and take, without loading a weight."""

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from adaptrank.cli.errors import ConfigError
from adaptrank.cli.quiet import quiet

if TYPE_CHECKING:
    from adaptrank.allocation import Participant
    from adaptrank.modules import AdaptedModule

DESCRIPTION = """\
Say what a configuration would train, take and leave, without loading a weight: parameters of each
kind of layer, the budget over the events, memory of adapter, gradients and optimizer, the size of
the file, and whether a run would be refused. It takes --config FILE and all other keys of `fit`."""

TAKES_KEYS = True

ROWS = 10
"""Events of a budget that are printed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.add_argument("--layers", action="store_true", help="every layer, not only every kind")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    if not options.keys:
        raise ConfigError(
            "plan needs a configuration. Type `python -m adaptrank plan --config FILE`."
        )
    data = describe(options.keys)
    if options.json:
        print(json.dumps(data, indent=2))
        return
    print(f"Backbone {data['backbone']}")
    rows = data["layers"] if options.layers else data["kinds"]
    width = max(map(len, rows))
    for name, count in rows.items():
        print(f"  {name:{width}} {count:14,}")
    parameters = data["trainable"] + data["frozen_parameters"]
    print(f"  {'trainable':{width}} {data['trainable']:14,} of {parameters:,} parameters")
    if data["allocator"]:
        _print_budget(data)
    print("\nMemory, beside activations")
    for name in ("frozen", "parameters", "gradients", "optimizer", "file"):
        label = "adapter file" if name == "file" else name
        print(f"  {label:{width}} {data['bytes'][name] / 2**20:14,.2f} MiB")
    at_end = data.get("trainable_at_end")
    if at_end is not None:
        share = at_end / max(data["trainable"], 1)
        print(f"  at the end about {at_end:,} numbers train, {share:.0%} of the start")


def _print_budget(data: dict[str, Any]) -> None:
    curve = data["budget"]
    print(f"\n{data['allocator_title']}, {data['units_at_start']} units at the start")
    if data["note"]:
        print(f"  {data['note']}")
    step = max(1, -(-len(curve) // ROWS))
    shown = [*curve[:-1:step], curve[-1]] if curve else []
    for at, budget in shown:
        total = "as the plan decides" if budget is None else f"{budget:,} {data['unit']}"
        print(f"  step {at:6} {total}")
    if len(curve) > len(shown):
        print(f"  ({len(curve)} events in all)")


def describe(args: Sequence[str]) -> dict[str, Any]:
    """Return the plan of a configuration, as JSON-able data.

    Args:
        args: the command line of `fit`, without the verb.
    Raises:
        UserError: if `fit` would refuse the configuration.
    """
    from adaptrank.artifacts import planning
    from adaptrank.axes import rank_axes

    cli = _built(args)
    module = _checked(cli.model)
    model = _configured(module, getattr(cli.datamodule, "num_classes", None))
    states = planning.states_of(module.optimizer)
    size = planning.footprint(model, states)
    layers = planning.by_layer(model)
    kinds: dict[str, int] = {}
    for path, count in layers.items():
        kind = path.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + count
    parts = ("frozen", "parameters", "gradients", "optimizer", "file")
    data: dict[str, Any] = {
        "backbone": module.source.describe(),
        "layers": layers,
        "kinds": kinds,
        "trainable": size.trainable,
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "bytes": {name: getattr(size, name) for name in parts},
        "optimizer_states": states,
        "allocator": None,
        "units_at_start": sum(len(axis) for axis in rank_axes(model).values()),
    }
    allocator = cli.configured("allocator")
    if allocator is not None:
        heads = size.trainable - sum(layers.values())
        starts = cli.configured("initial_ranks") is not None or not allocator.moves
        steps = cli.configured("trainer.max_steps")
        data |= _budget(allocator, model, steps, starts, heads)
    return data


def _built(args: Sequence[str]) -> Any:
    """Return the parsed and built configuration of `fit`, with nothing run."""
    from adaptrank.cli.train import AdaptrankCLI

    class Planned(AdaptrankCLI):
        """Parses and builds the configuration, and runs nothing."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            """No-op: the verb's work is the plan."""

    # Once more, now that the libraries that print are imported.
    with quiet():
        return Planned("fit", args)


def _checked(module: Any) -> "AdaptedModule":
    """Refuse a module that `plan` cannot describe."""
    from adaptrank.modules import AdaptedModule

    if not isinstance(module, AdaptedModule):
        raise ConfigError(
            f"plan knows the library's own modules, such as CausalLM, "
            f"and not {type(module).__name__}."
        )
    if module.adapter is not None:
        raise ConfigError(
            "plan tells what a new adapter takes. Leave model.adapter out, and name its "
            "parameterization."
        )
    return module


def _configured(module: "AdaptedModule", num_classes: int | None) -> Any:
    """Return the module's adapted model on the meta device."""
    import torch
    import transformers

    if getattr(module, "num_labels", 0) is None:
        module.__dict__["num_labels"] = num_classes

    def on_meta() -> Any:
        classes = getattr(module, "num_labels", None)
        labels = {"num_labels": classes} if isinstance(classes, int) else {}
        config = transformers.AutoConfig.from_pretrained(module.source.path, **labels)
        auto_class = getattr(transformers, module.auto_class)
        with torch.device("meta"):
            return auto_class.from_config(config).to(module.frozen_dtype)

    module.load_backbone = on_meta  # type: ignore[method-assign]
    module.configure_model()
    return module.model


def _budget(
    allocator: "Participant", model: Any, steps: int | None, starts: bool, heads: int
) -> dict[str, Any]:
    """Return the allocator's budget over the events, and the numbers that train at the end.

    Args:
        allocator: the allocator.
        model: the adapted model, on the meta device.
        steps: optimizer steps of the run, if the configuration gives them.
        starts: whether the ranks to start from are chosen from the data.
        heads: numbers that train outside the adapted layers.
    """
    from adaptrank.artifacts import planning

    data: dict[str, Any] = {
        "allocator": type(allocator).__name__,
        "allocator_title": allocator.title,
        "unit": allocator.unit,
        "budget": [],
        "note": "",
    }
    if starts:
        data["note"] = "the ranks to start from are chosen when the data are there"
    if not steps or steps < 0:
        data["note"] = "the events are told once trainer.max_steps says where training ends"
        return data
    curve = allocator.foresee(model, steps)
    data["budget"] = [[at, budget] for at, budget in curve]
    last = curve[-1][1] if curve else None
    if last is not None:
        data["trainable_at_end"] = planning.at_the_end(model, allocator.unit, last) + heads
    return data
