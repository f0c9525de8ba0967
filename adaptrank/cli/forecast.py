"""Figures of a run that is about to begin: parameters, budget, memory and time, and where each
figure comes from."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from adaptrank._errors import UserError
from adaptrank.allocation import Participant, possible_growth
from adaptrank.artifacts import planning
from adaptrank.artifacts.known_shapes import KnownShapes
from adaptrank.artifacts.simulation import SimulatedStep, simulate_step
from adaptrank.axes import rank_axes
from adaptrank.cli.preparation import MOST_ROWS, Planned
from adaptrank.cli.round_facts import round_facts
from adaptrank.data import TaskData
from adaptrank.injection import by_layer
from adaptrank.modules import AdaptedModule
from adaptrank.ops.cross_entropy import CHUNK_BYTES

SIDE = 768
"""Sides of the matrices whose product measures the speed of a device."""

COUNTED = "counted from the shapes of the tensors"
SIMULATED = "counted in a step on tensors without values"
HOW = {
    "frozen": COUNTED,
    "parameters": COUNTED,
    "gradients": COUNTED,
    "optimizer": "counted in one step of the optimizer on a small tensor",
    "file": COUNTED,
    "activations": SIMULATED,
    "flops": SIMULATED,
    "speed": f"measured here: a product of two {SIDE} x {SIDE} matrices",
    "seconds": "computed: operations over speed. All that is no matrix product comes on top",
}
"""Figure -> how it was obtained."""


def forecast(cli: Planned, tokens: int | None = None) -> dict[str, Any]:
    """Return the plan of a run, as JSON-able data.

    Args:
        cli: the configuration, built.
        tokens: length of every row of the batch that memory is counted for. By default the longest
            rows of the data.

    Raises:
        UserError: if `fit` would refuse the configuration.
    """
    data: dict[str, Any] = {}

    def look(trainer: Trainer, module: AdaptedModule) -> None:
        steps = _steps(cli, trainer)
        data.update(_model_facts(module, cli.unloaded.saved))
        data["learning_rates"] = _rate_facts(trainer)
        data.update(_budget_facts(cli, module, steps, data))
        data.update(round_facts(trainer, module.model, steps))
        data.update(_memory_facts(cli, trainer, module, tokens))
        data["steps"] = steps
        data["bytes"]["peak"] = _peak(cli, data)
        data["time"] = _time_facts(cli, trainer, module, data)
        data["how"] = HOW

    cli.prepare(look)
    return data


# ---- the model and the budget


def _steps(cli: Planned, trainer: Trainer) -> int | None:
    """Return the optimizer steps of the run, or None if it has no end."""
    total = trainer.estimated_stepping_batches
    if total in (float("inf"), -1):
        return None
    # Without max_steps, several processes share the batches.
    processes = cli.trainer.world_size if trainer.max_steps == -1 else 1
    return -(-int(total) // processes)


def _model_facts(module: AdaptedModule, saved: int) -> dict[str, Any]:
    """Return the parameters of a model, and the bytes of what a run keeps.

    Args:
        module: with its model.
        saved: bytes by which a quantization makes the frozen weights smaller.
    """
    model = module.model
    states = planning.states_of(module.optimizer, model)
    size = planning.footprint(model, states)
    layers = by_layer(model)
    kinds: dict[str, int] = {}
    for path, count in layers.items():
        kind = path.rpartition(".")[2]
        kinds[kind] = kinds.get(kind, 0) + count
    whole = size.trainable - sum(layers.values())
    if whole:
        kinds["trained whole"] = whole
    parts = ("frozen", "parameters", "gradients", "optimizer", "file")
    sizes: dict[str, int] = {name: getattr(size, name) for name in parts}
    sizes["frozen"] -= saved
    return {
        "backbone": module.source.describe(),
        "layers": layers,
        "kinds": kinds,
        "trainable": size.trainable,
        "frozen_parameters": sum(p.numel() for p in model.parameters() if not p.requires_grad),
        "bytes": sizes,
        "optimizer_states": states,
        "units_at_start": sum(len(axis) for axis in rank_axes(model).values()),
    }


def _rate_facts(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """Return the learning rate and the parameters of each named group. Empty without own rates."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {
        group["name"]: {
            "lr": float(group.get("initial_lr", group["lr"])),
            "parameters": sum(parameter.numel() for parameter in group["params"]),
        }
        for group in groups
        if "name" in group
    }


def _budget_facts(
    cli: Planned, module: AdaptedModule, steps: int | None, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the allocator's budget over the events, and the numbers that train at the end."""
    allocator: Participant | None = cli.configured("allocator")
    if allocator is None:
        return {"allocator": None}
    facts: dict[str, Any] = {
        "allocator": type(allocator).__name__,
        "allocator_title": allocator.title,
        "unit": allocator.unit,
        "budget": [],
        "note": "",
    }
    if cli.configured("initial_ranks") is not None or not allocator.moves:
        facts["note"] = "the ranks to start from are chosen from the data when training starts"
    if not steps:
        facts["note"] = "the events are told once trainer.max_steps says where training ends"
        return facts
    curve = allocator.foresee(module.model, steps)
    facts["budget"] = [[at, budget] for at, budget in curve]
    facts["growth"] = possible_growth(allocator)
    last = curve[-1][1] if curve else None
    if last is not None:
        whole = data["trainable"] - sum(data["layers"].values())
        at_end = planning.at_the_end(module.model, allocator.unit, last)
        facts["trainable_at_end"] = at_end + whole
    return facts


# ---- memory


def _memory_facts(
    cli: Planned, trainer: Trainer, module: AdaptedModule, tokens: int | None
) -> dict[str, Any]:
    """Return the largest batch, and what a step on it holds, with and without checkpointing."""
    batch = _largest_batch(cli.datamodule, trainer, tokens)
    rows, length = _shape(batch)
    facts: dict[str, Any] = {"batch": {"rows": rows, "tokens": length}}
    given = tokens is not None
    facts["batch"]["from"] = "as asked" if given else _origin(cli.datamodule)
    activations: dict[str, int | None] = {}
    simulated: dict[bool, SimulatedStep] = {}
    shapes = KnownShapes()
    for recomputes in (False, True):
        name = "with_checkpointing" if recomputes else "without_checkpointing"
        try:
            step = _simulate(trainer, module, batch, recomputes, shapes)
        except UserError as error:
            # Some methods refuse gradient checkpointing, which this run does not ask for.
            if not recomputes or module.gradient_checkpointing is not None:
                raise
            facts["not_simulated"] = str(error)
            activations[name] = None
            continue
        except Exception as error:
            facts["not_simulated"] = _reason(error)
            activations[name] = None
            continue
        activations[name] = step.activations
        simulated[recomputes] = step
    facts["activations"] = activations
    facts["checkpointing"] = module.gradient_checkpointing is not None
    used = simulated.get(facts["checkpointing"])
    facts["flops"] = None if used is None else used.flops
    return facts


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"the model reads values in a step ({type(error).__name__}: {lines[0][:120]})"


def _origin(data: Any) -> str:
    if not isinstance(data, TaskData):
        return "the first batch of the data"
    return f"the longest among the first {MOST_ROWS:,} rows of the data"


def _largest_batch(data: Any, trainer: Trainer, tokens: int | None) -> Any:
    """Return a training batch on the host, of the longest rows where their lengths are known."""
    if not isinstance(data, TaskData):
        loader: Any = trainer.train_dataloader
        if loader is None:
            trainer.fit_loop.setup_data()
            loader = trainer.train_dataloader
        return next(iter(loader))
    # Packed rows hold several examples each.
    examples, collate = data.batched("train")
    some = [examples[position] for position in range(min(len(examples), MOST_ROWS))]
    longest = sorted(some, key=_length)[-data.batch_size :]
    if tokens is not None:
        longest = [_stretched(example, tokens) for example in longest]
    return collate(longest)


def _length(example: Mapping[str, Any]) -> int:
    ids = example.get("input_ids")
    return len(ids) if ids is not None else 0


def _stretched(example: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """Return an example with another number of tokens, by repeating its own."""
    length = _length(example)
    if not length:
        return dict(example)
    stretched = dict(example)
    for key, value in example.items():
        if isinstance(value, Tensor) and value.dim() and len(value) == length:
            repeats = -(-tokens // length)
            stretched[key] = value.repeat(repeats, *([1] * (value.dim() - 1)))[:tokens]
    return stretched


def _shape(batch: Any) -> tuple[int, int | None]:
    """Return the rows of a batch, and the tokens of a row where it has tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor) and ids.dim() == 2:
        return int(ids.shape[0]), int(ids.shape[1])
    tensors = batch.values() if isinstance(batch, Mapping) else [batch]
    sizes = [len(value) for value in tensors if isinstance(value, Tensor) and value.dim()]
    return (sizes[0] if sizes else 0), None


def _simulate(
    trainer: Trainer, module: AdaptedModule, batch: Any, recomputes: bool, shapes: KnownShapes
) -> SimulatedStep:
    """Simulate a training step on a batch, with or without gradient checkpointing."""
    backbone = module.model
    # Inputs of blocks that are kept on the host count as if they were kept beside the model.
    options = module.gradient_checkpointing or {}
    _set_checkpointing(backbone, recomputes, options.get("every_n_layers", 1))
    # The batch is known on the host, and its tensors are on the meta device, as if it had moved.
    moved = {
        key: value.to("meta") if isinstance(value, Tensor) else value
        for key, value in dict(batch).items()
    }
    module.host_batch.note(dict(batch), moved)
    attention = getattr(backbone.config, "_attn_implementation", None)

    def loss() -> Tensor:
        with trainer.precision_plugin.train_step_context():
            output: Any = module.training_step(moved, 0)
        result: Tensor = output["loss"] if isinstance(output, Mapping) else output
        return result

    module.train()
    device = trainer.strategy.root_device.type
    is_fused = attention != "eager"
    with _logging_nothing(module), _chunks_of(device):
        return simulate_step(module, loss, is_fused, shapes)


def _set_checkpointing(backbone: Any, recomputes: bool, every: int) -> None:
    """Switch gradient checkpointing on or off, by the name that transformers has for it.

    Args:
        backbone: a model of transformers.
        recomputes: whether to switch it on.
        every: number of blocks of which one is recomputed.
    """
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if not recomputes and hasattr(backbone, f"{name}_disable"):
            getattr(backbone, f"{name}_disable")()
            return
        if recomputes and hasattr(backbone, f"{name}_enable"):
            arguments: dict[str, Any] = {f"{name}_kwargs": {"use_reentrant": False}}
            if every > 1:
                arguments["every_n_layers"] = every
            getattr(backbone, f"{name}_enable")(**arguments)
            return


@contextmanager
def _chunks_of(device: str) -> Iterator[None]:
    """Within the block, cut the loss of a head on the meta device as on another device."""
    size = CHUNK_BYTES.get(device)
    if size is not None:
        CHUNK_BYTES["meta"] = size
    try:
        yield
    finally:
        CHUNK_BYTES.pop("meta", None)


@contextmanager
def _logging_nothing(module: AdaptedModule) -> Iterator[None]:
    """Within the block, let a training step log nothing."""
    names = ("log", "log_dict")
    for name in names:
        module.__dict__[name] = _nothing
    try:
        yield
    finally:
        for name in names:
            del module.__dict__[name]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stand in for a module's `log`."""


def _peak(cli: Planned, data: Mapping[str, Any]) -> int | None:
    """Return the bytes on each device at the peak of a step, or None without activations."""
    name = "with_checkpointing" if data["checkpointing"] else "without_checkpointing"
    activations = data["activations"][name]
    if activations is None:
        return None
    size = data["bytes"]
    frozen = size["frozen"]
    if isinstance(cli.trainer.strategy, ModelParallelStrategy):
        # The frozen blocks are shared out over the processes.
        frozen = frozen // cli.trainer.world_size
    trained = size["parameters"] + size["gradients"] + size["optimizer"]
    return int(frozen + trained + activations)


# ---- time


def _time_facts(
    cli: Planned, trainer: Trainer, module: AdaptedModule, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Return operations, the speed of the device, and the least time that training takes."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    facts: dict[str, Any] = {"device": name, "devices": cli.trainer.world_size}
    if data["flops"] is None:
        return facts
    batches = int(trainer.accumulate_grad_batches)
    share = _mean_share(cli.datamodule, data["batch"])
    per_step = data["flops"] * batches * share
    speed = measured_speed(device, module.frozen_dtype)
    facts |= {"flops_per_step": round(per_step), "flops_per_second": speed}
    facts["seconds_per_step"] = per_step / speed
    if data["steps"]:
        facts["seconds"] = data["steps"] * per_step / speed
    return facts


def _mean_share(data: Any, batch: Mapping[str, Any]) -> float:
    """Return the tokens of a row on average, over those of a row of the largest batch."""
    if not isinstance(data, TaskData) or not batch["tokens"]:
        return 1.0
    examples, _ = data.batched("train")
    lengths = [_length(examples[position]) for position in range(min(len(examples), MOST_ROWS))]
    longest: int = batch["tokens"]
    return min(1.0, sum(lengths) / len(lengths) / longest)


def measured_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a matrix product on a device."""
    left = torch.randn(SIDE, SIDE, device=device).to(dtype)
    right = torch.randn(SIDE, SIDE, device=device).to(dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        product = left @ right
        # Reading a number waits for a device that works by itself.
        product[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)
