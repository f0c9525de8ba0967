"""`plan`: what a configuration would take, without loading a weight."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from adaptrank.cli import errors
from adaptrank.cli.quiet import quiet
from adaptrank.cli.verbs import make_parser, run_verb


def plan(args: Sequence[str]) -> None:
    """Say what a configuration would train, take and leave."""
    parser = make_parser(
        "plan",
        "What a configuration would train, take and leave, without loading a weight: parameters of each kind of layer, the\n"
        "budget over the events, memory of adapter, gradients and optimizer, the size of the file; and whether a run\n"
        "would be refused. It takes --config FILE and all else that fit takes.",
    )
    parser.add_argument("--layers", action="store_true", help="every layer, not only every kind")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "rest", nargs=argparse.REMAINDER, metavar="--config FILE ...", help="all that `fit` takes"
    )
    own = [arg for arg in args if arg in ("--layers", "--json", "--debug", "-h", "--help")]
    rest = [arg for arg in args if arg not in own]
    options = parser.options(own)
    options.rest = rest
    if not rest:
        errors.fail("plan needs a configuration; type `python -m adaptrank plan --config FILE`.")
    run_verb(_plan, options)


def _plan(options: argparse.Namespace) -> None:
    data = describe(options.rest)
    if options.json:
        print(json.dumps(data, indent=2))
        return
    print(f"Backbone {data['backbone']}")
    rows = data["layers"].items() if options.layers else data["kinds"].items()
    width = max(map(len, dict(rows)))
    for name, count in rows:
        print(f"  {name:{width}} {count:14,}")
    print(
        f"  {'trainable':{width}} {data['trainable']:14,} of {data['trainable'] + data['frozen_parameters']:,} parameters"
    )
    if data["allocator"]:
        _print_budget(data)
    print("\nMemory, beside activations")
    for name in ("frozen", "parameters", "gradients", "optimizer"):
        print(f"  {name:{width}} {data['bytes'][name] / 2**20:14,.2f} MiB")
    print(f"  {'adapter file':{width}} {data['bytes']['file'] / 2**20:14,.2f} MiB")
    if data.get("trainable_at_end") is not None:
        print(
            f"  at the end about {data['trainable_at_end']:,} numbers train, {data['trainable_at_end'] / max(data['trainable'], 1):.0%} of the start"
        )


def _print_budget(data: dict[str, Any]) -> None:
    curve = data["budget"]
    print(f"\n{data['allocator']}, {data['units_at_start']} units at the start")
    if data["note"]:
        print(f"  {data['note']}")
    step = max(1, -(-len(curve) // 10))
    shown = [*curve[:-1:step], curve[-1]] if curve else []
    for at, budget in shown:
        print(
            f"  step {at:6} {'the outcome says' if budget is None else f'{budget:,} ' + data['unit']}"
        )
    if len(curve) > len(shown):
        print(f"  ({len(curve)} events in all)")


def describe(args: Sequence[str]) -> dict[str, Any]:
    """The plan of a configuration, as JSON-able data.

    Raises:
        ConfigError: for whatever `fit` would refuse.
    """
    import torch
    import transformers

    from adaptrank.artifacts import planning
    from adaptrank.axes import rank_axes
    from adaptrank.cli.train import AdaptrankCLI
    from adaptrank.modules.adapted import AdaptedModule

    class Planned(AdaptrankCLI):
        """Parses and builds the configuration, and runs nothing."""

        def instantiate_trainer(self, **kwargs: Any) -> Any:
            return None

        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing: what is asked for is known."""

    with quiet():  # again, now that what speaks is imported
        cli = Planned("fit", args)
    module = cli.model
    if not isinstance(module, AdaptedModule):
        raise errors.ConfigError(
            f"plan knows the library's own modules, such as CausalLM, and not {type(module).__name__}."
        )
    if module.adapter is not None:
        raise errors.ConfigError(
            "plan tells what a new adapter takes; leave model.adapter out, and name its parameterization."
        )

    if getattr(module, "num_labels", 0) is None:
        module.__dict__["num_labels"] = getattr(cli.datamodule, "num_classes", None)

    def on_meta() -> Any:
        classes = getattr(module, "num_labels", None)
        labels = {"num_labels": classes} if isinstance(classes, int) else {}
        config = transformers.AutoConfig.from_pretrained(module.source.path, **labels)
        with torch.device("meta"):
            return (
                getattr(transformers, module.auto_class).from_config(config).to(module.frozen_dtype)
            )

    module.load_backbone = on_meta  # type: ignore[method-assign]
    module.configure_model()
    model = module.model
    states = planning.states_of(module.optimizer)
    size = planning.footprint(model, states)
    layers = planning.by_layer(model)
    kinds: dict[str, int] = {}
    for path, count in layers.items():
        kind = path.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + count
    data: dict[str, Any] = {
        "backbone": module.source.describe(),
        "layers": layers,
        "kinds": kinds,
        "trainable": size.trainable,
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "bytes": {
            name: getattr(size, name)
            for name in ("frozen", "parameters", "gradients", "optimizer", "file")
        },
        "optimizer_states": states,
        "allocator": None,
        "units_at_start": sum(len(axis) for axis in rank_axes(model).values()),
    }
    allocator = cli._get(cli.config_init, "allocator")
    steps = cli._get(cli.config, "trainer.max_steps")
    if allocator is not None:
        data |= {
            "allocator": type(allocator).__name__,
            "unit": allocator.unit,
            "budget": [],
            "note": "",
        }
        if cli._get(cli.config_init, "initial_ranks") is not None or not allocator.moves:
            data["note"] = "the ranks to start from are chosen when the data are there"
        if not steps or steps < 0:
            data["note"] = "the events are told once trainer.max_steps says where training ends"
        else:
            curve = allocator.foresee(model, steps)
            data["budget"] = [[at, budget] for at, budget in curve]
            if curve and (last := curve[-1][1]) is not None:
                heads = size.trainable - sum(layers.values())
                data["trainable_at_end"] = planning.at_the_end(model, allocator.unit, last) + heads
    return data
