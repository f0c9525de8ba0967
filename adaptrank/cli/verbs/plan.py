"""`plan`: say what a configuration would train, take and leave, without loading a weight."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

from adaptrank.cli.errors import ConfigError

DESCRIPTION = """\
Say what a configuration would train, take and leave, without loading a weight: parameters of each
kind of layer, the budget over the events, the rounds of a training strategy, memory of weights,
gradients, optimizer and activations, the least time that training takes, and whether `fit` would
refuse it. Each figure says how it was obtained. It takes --config FILE and all other keys of
`fit`."""

TAKES_KEYS = True

ROWS = 10
"""Events of a budget that are printed."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add = parser.add_argument
    add("--layers", action="store_true", help="every layer, not only every kind")
    tokens = "count activations for rows of this length, not for the longest rows of the data"
    add("--tokens", type=int, metavar="N", help=tokens)
    measure = "also run this many steps with the real weights, and measure time and memory"
    add("--measure", type=int, metavar="N", help=measure)
    add("--json", action="store_true", help="as JSON")


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    for name in ("tokens", "measure"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give 1 or more.")
    if not options.keys:
        raise ConfigError(
            "plan needs a configuration. Type `python -m adaptrank plan --config FILE`."
        )
    # The keys are those of `fit`, which are known before PyTorch is imported.
    from adaptrank.cli.dispatch import prepare
    from adaptrank.cli.start_up import (
        end_without_garbage_collection,
        without_garbage_collection,
    )

    keys = prepare("fit", options.keys)
    if options.measure is None:
        end_without_garbage_collection()
    with without_garbage_collection():
        from adaptrank.cli.forecast import forecast
        from adaptrank.cli.preparation import build

        data = forecast(build(keys), options.tokens)
    if options.measure is not None:
        from adaptrank.cli.measured import measure_steps

        data["measured"] = measure_steps(keys, options.measure)
    if options.json:
        print(json.dumps(data, indent=2))
    else:
        _print(data, options.layers)


def _print(data: Mapping[str, Any], every_layer: bool) -> None:
    print(f"Backbone {data['backbone']}")
    rows = data["layers"] if every_layer else data["kinds"]
    width = max([24, *map(len, rows)])
    for name, count in rows.items():
        print(f"  {name:{width}} {count:14,}")
    parameters = data["trainable"] + data["frozen_parameters"]
    print(f"  {'trainable':{width}} {data['trainable']:14,} of {parameters:,} parameters")
    for name, group in data["learning_rates"].items():
        label = f"at rate {group['lr']:g}"
        print(f"  {label:{width}} {group['parameters']:14,}  {name}")
    if data["allocator"]:
        _print_budget(data)
    if data["training_strategy"]:
        _print_rounds(data)
    _print_memory(data, width)
    _print_time(data, width)
    if "measured" in data:
        _print_measured(data["measured"], width)


def _print_budget(data: Mapping[str, Any]) -> None:
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
    at_end = data.get("trainable_at_end")
    if at_end is not None:
        share = at_end / max(data["trainable"], 1)
        print(f"  at the end about {at_end:,} numbers train, {share:.0%} of the start")
    if data.get("growth"):
        print(f"  {data['growth']}")


def _print_rounds(data: Mapping[str, Any]) -> None:
    """Print the rounds of a training strategy, or some of them, evenly spread."""
    rounds = data["rounds"]
    print(f"\n{data['training_strategy']}, {len(rounds)} rounds")
    every = max(1, -(-len(rounds) // ROWS))
    for each in [*rounds[:-1:every], rounds[-1]]:
        span = f"steps {each['start'] + 1} to {each['end']}"
        print(f"  round {each['round'] + 1:4}  {span:24} {each['trained']:,} numbers train")
    if every > 1:
        print(f"  (every {every}th round is listed)")


def _print_memory(data: Mapping[str, Any], width: int) -> None:
    """Print the parts of the memory on each device, and how each was obtained."""
    how, size = data["how"], data["bytes"]
    print(f"\nMemory, MiB{_devices(data)}")

    def line(label: str, value: int | None, source: str) -> None:
        figure = "not counted" if value is None else f"{value / 2**20:,.2f}"
        print(f"  {label:{width}} {figure:>14}  {source}")

    for name in ("frozen", "parameters", "gradients", "optimizer"):
        line(name, size[name], how[name])
    for name, value in data["activations"].items():
        label = name.replace("_", " ").replace("with", "activations, with")
        line(label, value, how["activations"] if value is not None else data["not_simulated"])
    line("together at the peak", size["peak"], "computed: the sum, as configured")
    line("adapter file", size["file"], how["file"])
    batch = data["batch"]
    tokens = f" of {batch['tokens']} tokens" if batch["tokens"] else ""
    print(f"  The batch has {batch['rows']} rows{tokens}: {batch['from']}.")


def _devices(data: Mapping[str, Any]) -> str:
    devices = data["time"]["devices"]
    return f" on each of {devices} devices" if devices > 1 else ""


def _print_time(data: Mapping[str, Any], width: int) -> None:
    """Print the steps, and the least time that they take."""
    facts, how = data["time"], data["how"]
    steps = data["steps"]
    print(f"\nTime on {facts['device']}")
    print(f"  {'steps':{width}} {steps if steps else 'no end':>14}")
    if "seconds_per_step" not in facts:
        print(f"  {'a step':{width}} {'not counted':>14}  {data['not_simulated']}")
        return
    for label, value, unit, source in (
        ("operations a step", facts["flops_per_step"] / 1e9, "GFLOP", how["flops"]),
        ("speed", facts["flops_per_second"] / 1e9, "GFLOP/s", how["speed"]),
        ("a step, at least", facts["seconds_per_step"], "s", how["seconds"]),
    ):
        print(f"  {label:{width}} {value:14,.3f}  {unit}, {source}")
    if "seconds" in facts:
        minutes, seconds = divmod(round(facts["seconds"]), 60)
        print(f"  {'training, at least':{width}} {f'{minutes}:{seconds:02}':>14}  min, computed")


def _print_measured(facts: Mapping[str, Any], width: int) -> None:
    print(f"\nMeasured in {facts['steps']} steps with the real weights")
    print(f"  {'a step':{width}} {facts['seconds_per_step']:14,.3f}  s, without the first one")
    peak = facts["peak_bytes"] / 2**20
    print(f"  {'peak memory':{width}} {peak:14,.2f}  MiB, {facts['of']}")
