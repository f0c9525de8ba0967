"""Compare the record in a checkpoint with the record of the run that resumes from it."""

from collections.abc import Mapping, Sequence
from typing import Any

from adaptrank._errors import some
from adaptrank.checkpoints.differences import Difference, compare_settings, equal
from adaptrank.checkpoints.nests import compare_nests

Record = Mapping[str, Any]

WORDED_BY_THE_ENGINE = frozenset({"budget", "unit", "every", "warmup", "final"})
"""Arguments of an allocator that its engine compares, in steps and units of the run."""
STEPS_OF_SCHEDULE = "steps_of_schedule"
"""Setting of a module: all steps of the run, or None if its learning rate does not depend on it."""


def compare_models(here: Record, stored: Record) -> list[Difference]:
    """Return how two adapted models differ: nests, modules that train whole, classes, and base."""
    new, old = here["adapter"], stored["adapter"]
    differences = compare_nests(new["adapters"], old["adapters"])
    trained_new, trained_old = set(new["trained_modules"]), set(old["trained_modules"])
    if trained_new != trained_old:
        clause = (
            f"the modules that train whole are {_listed(trained_new)} here and "
            f"{_listed(trained_old)} in the checkpoint"
        )
        differences.append(Difference("train_modules", clause))
    names_new, names_old = (each.get("conventions", {}).get("class_names") for each in (new, old))
    if names_new and names_old and names_new != names_old:
        clause = (
            f"the classes are {_in_order(names_new)} here and {_in_order(names_old)} in the "
            f"checkpoint (data.classes sets them)"
        )
        differences.append(Difference("data.classes", clause))
    base_new, base_old = new["base"], old["base"]
    prints = base_new.get("fingerprint"), base_old.get("fingerprint")
    if all(prints) and prints[0] != prints[1] and trained_new == trained_old:
        clause = (
            f"the frozen weights are those of {base_new.get('name', 'another base')} here "
            f"({prints[0]}) and of {base_old.get('name', 'another base')} in the checkpoint "
            f"({prints[1]})"
        )
        differences.append(Difference("backbone", clause))
    return differences


def _in_order(names: Sequence[str]) -> str:
    return f"[{some(names, 12)}]"


def _listed(names: set[str]) -> str:
    return some(sorted(names), 3) or "none"


def compare_allocators(
    here: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]
) -> list[Difference]:
    """Return how the allocators of two runs differ: their classes, and their arguments."""
    new = {entry["class"]: entry for entry in here}
    old = {entry["class"]: entry for entry in stored}
    differences = []
    if new.keys() != old.keys():
        clause = (
            f"the allocator is {' and '.join(sorted(new)) or 'none'} here and "
            f"{' and '.join(sorted(old)) or 'none'} in the checkpoint"
        )
        differences.append(Difference("allocator", clause))
    for name in new.keys() & old.keys():
        if "init_args" in new[name] and "init_args" in old[name]:
            present_arguments = new[name].get("present_arguments", dict)
            differences += compare_settings(
                new[name]["init_args"],
                present_arguments(old[name]["init_args"]),
                new[name].get("defaults"),
                f" of {name}",
            )
    return differences


def compare_training(here: Record, stored: Record, step: int) -> list[Difference]:
    """Return how the settings of two runs differ.

    Args:
        here: `training_settings` of this run.
        stored: those in the checkpoint.
        step: optimizer steps that the checkpoint's run has made.
    """
    differences = compare_optimizers(here.get("optimizers", ()), stored.get("optimizers", ()))
    differences += compare_settings(here.get("trainer", {}), stored.get("trainer", {}))
    module_new, module_old = dict(here.get("module", {})), dict(stored.get("module", {}))
    if module_new and module_old:
        # Another length is legitimate, and `longer_schedule` says what follows.
        module_new.pop(STEPS_OF_SCHEDULE, None)
        module_old.pop(STEPS_OF_SCHEDULE, None)
        _forget_what_is_over(module_new, module_old, step)
        differences += compare_settings(module_new, module_old)
    data_new, data_old = here.get("data"), stored.get("data")
    if data_new and data_old:
        differences += compare_settings(data_new, data_old, of=" of the data")
    return differences


def _forget_what_is_over(new: dict[str, Any], old: dict[str, Any], step: int) -> None:
    """Leave out what no longer matters: the warm-up of a constant schedule once it is over."""
    constant = new.get("schedule") == old.get("schedule") == "constant"
    lengths = [settings.get("warmup", 0) for settings in (new, old)]
    if constant and all(isinstance(length, int) and step >= length for length in lengths):
        new.pop("warmup", None)
        old.pop("warmup", None)


def changed_length(here: Record, stored: Record) -> str:
    """Return a sentence if a schedule that depends on the length of the run has another length."""
    new, old = (each.get("module", {}) for each in (here, stored))
    lengths = new.get(STEPS_OF_SCHEDULE), old.get(STEPS_OF_SCHEDULE)
    if None in lengths or lengths[0] == lengths[1]:
        return ""
    return (
        f"The {new.get('schedule')} schedule of the learning rate runs over {lengths[0]} steps "
        f"here and over {lengths[1]} in the checkpoint's run. From here on it is that of "
        f"{lengths[0]} steps."
    )


def compare_optimizers(
    here: Sequence[Mapping[str, Any]], stored: Sequence[Mapping[str, Any]]
) -> list[Difference]:
    """Return how the optimizers of two runs differ: classes, groups and hyperparameters."""
    classes_new = [entry["class"] for entry in here]
    classes_old = [entry["class"] for entry in stored]
    if classes_new != classes_old:
        clause = (
            f"the optimizer is {' and '.join(classes_new)} here and {' and '.join(classes_old)} "
            "in the checkpoint"
        )
        return [Difference("optimizer", clause)]
    differences = []
    for new, old in zip(here, stored, strict=True):
        name, groups_new, groups_old = new["class"], new["groups"], old["groups"]
        if len(groups_new) != len(groups_old):
            clause = (
                f"{name} has {len(groups_new)} parameter groups here and {len(groups_old)} in "
                "the checkpoint"
            )
            differences.append(Difference("optimizer", clause))
            continue
        for group_new, group_old in zip(groups_new, groups_old, strict=True):
            differences += compare_settings(group_new, group_old, of=f" of {name}")
    return list(dict.fromkeys(differences))


def same_groups(here: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Return whether the state of one optimizer fits the other: equal classes and groups.

    Groups with own learning rates have names. Others are told by their number.
    """
    names_here, names_stored = ([g.get("name") for g in each["groups"]] for each in (here, stored))
    return equal(here["class"], stored["class"]) and names_here == names_stored
