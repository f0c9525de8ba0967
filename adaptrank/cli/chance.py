"""Tell a run that learned nothing: its figures are those of guessing, or those from before it."""

from collections.abc import Mapping

from lightning.pytorch import LightningModule

from adaptrank.modules import AdaptedModule

ROUNDING = 5e-5
"""Half a unit of the last digit that is printed of a metric."""
NEAR_CHANCE = 0.99
"""A loss above this share of the loss of guessing counts as guessing: few examples leave noise."""

ADVICE = (
    "Tune the learning rate, train longer, and look at the data. The adapter is saved all the same."
)


def no_better_than_chance(
    module: LightningModule, before: Mapping[str, float], after: Mapping[str, float]
) -> str | None:
    """Return a warning about a run that learned nothing, or None.

    All processes have to call this, because labels are counted on all of them.

    Args:
        module: the trained module, after its evaluation.
        before: metrics before training. Empty without an evaluation.
        after: metrics after training.
    """
    chance = module.chance() if isinstance(module, AdaptedModule) else {}
    loss = after.get("loss", after.get("train_loss") if "accuracy" not in chance else None)
    if loss is None:
        return None
    if loss != loss:
        return f"The loss after training is not a number. {ADVICE}"
    guessing = _like_guessing(loss, after, chance)
    if guessing is not None:
        return f"No better than chance: {guessing}. {ADVICE}"
    if "loss" in before and "loss" in after and loss >= before["loss"] - ROUNDING:
        return (
            f"No better than before training: the loss is {loss:.4f} after it, and "
            f"{before['loss']:.4f} before it. {ADVICE}"
        )
    return None


def _like_guessing(
    loss: float, after: Mapping[str, float], chance: Mapping[str, float]
) -> str | None:
    """Compare the loss, and the accuracy where there is one, with those of guessing."""
    if "loss" not in chance:
        return None
    losses = f"the loss is {loss:.4f}, and guessing has {chance['loss']:.4f}"
    if "accuracy" not in chance or "accuracy" not in after:
        return losses if loss >= chance["loss"] * _margin(chance) else None
    accuracy, most_frequent = after["accuracy"], chance["accuracy"]
    # The accuracy of guessing scatters with the number of examples, by its standard error.
    is_frequent = accuracy <= most_frequent + ROUNDING
    is_near = accuracy <= most_frequent + chance["accuracy_error"]
    if is_frequent or (is_near and loss >= NEAR_CHANCE * chance["loss"]):
        return (
            f"{losses}; the accuracy is {accuracy:.4f}, and naming the most frequent class has "
            f"{most_frequent:.4f}"
        )
    return None


def _margin(chance: Mapping[str, float]) -> float:
    """Return 1 for a vocabulary, of which no guess comes close, else a little less."""
    return 1.0 if "vocabulary" in chance else NEAR_CHANCE
