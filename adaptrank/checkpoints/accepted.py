"""Make accepted changes of an optimizer hold, since its state would restore the old settings."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

from adaptrank.checkpoints.differences import compare_settings
from adaptrank.checkpoints.other_runs import same_groups


def accept_optimizers(
    trainer: Trainer,
    here: Mapping[str, Any],
    stored: Mapping[str, Any],
    checkpoint: dict[str, Any],
) -> None:
    """Put the hyperparameters of this run into the states that Lightning is going to restore.

    An optimizer of another class or with other groups starts anew. A changed learning rate keeps
    its place in the schedule.

    Args:
        trainer: its optimizers are those of this run, before anything is restored.
        here: settings of this run.
        stored: settings in the checkpoint.
        checkpoint: the checkpoint, changed in place.
    """
    states = checkpoint["optimizer_states"]
    described_here, described_stored = here["optimizers"], stored.get("optimizers", [])
    for index, optimizer in enumerate(trainer.optimizers):
        known = index < min(len(states), len(described_stored))
        if known and same_groups(described_here[index], described_stored[index]):
            groups = states[index]["param_groups"]
            for number, group in enumerate(groups):
                new = described_here[index]["groups"][number]
                old = described_stored[index]["groups"][number]
                _change_group(group, optimizer.param_groups[number], new, old)
        else:
            stored_groups = states[index]["param_groups"] if index < len(states) else []
            states[index : index + 1] = [_fresh_state(optimizer, stored_groups)]
    del states[len(trainer.optimizers) :]
    for config, state in zip(
        trainer.lr_scheduler_configs, checkpoint["lr_schedulers"], strict=False
    ):
        if "base_lrs" in state:
            state["base_lrs"] = list(config.scheduler.base_lrs)


def _change_group(
    group: dict[str, Any],
    present: Mapping[str, Any],
    new: Mapping[str, Any],
    old: Mapping[str, Any],
) -> None:
    """Give a stored group the hyperparameters that changed."""
    for difference in compare_settings(new, old):
        name = difference.name
        if name != "lr":
            group[name] = present[name] if name in present else group.get(name)
            continue
        start = group.get("initial_lr", group["lr"])
        progress = float(group["lr"]) / float(start) if float(start) else 1.0
        target = present.get("initial_lr", present["lr"])
        group["lr"] = target * progress
        if "initial_lr" in group:
            group["initial_lr"] = target


def _progress_of(group: Mapping[str, Any]) -> float | None:
    """Return the learning rate of a group as a share of its start, or None for a start of 0."""
    rate = float(group.get("lr", 1.0))
    start = float(group.get("initial_lr", rate))
    return rate / start if start else None


def _fresh_state(optimizer: Optimizer, stored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the state of an optimizer that has made no step, at a place in the schedule.

    A group takes its place from the stored group of its number if there are as many. Otherwise all
    take that of the first group whose learning rate does not start at 0.
    """
    state = optimizer.state_dict()
    groups = state["param_groups"]
    places = [_progress_of(group) for group in stored]
    common = next((place for place in places if place is not None), 1.0)
    if len(places) != len(groups):
        places = [common] * len(groups)
    for group, place in zip(groups, places, strict=True):
        if "initial_lr" in group:
            group["lr"] = group["initial_lr"] * (common if place is None else place)
    return state
