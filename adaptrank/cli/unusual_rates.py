"""Tell learning rates that are far from those that the studies of methods chose."""

from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.optim import Optimizer

from adaptrank.modules.learning_rates import head_parameters
from adaptrank.parameterizations import StudiedRate, wrappers

FAR = 20.0
"""A rate so many times above or below the one that a study chose is unusual.

In the study on TREC, rates that were 25 times too large ended at the share of the largest class.
Those that were 25 times too small ended far below the best.
"""


def unusual_rates(
    model: nn.Module, optimizers: Iterable[Optimizer], head: StudiedRate | None = None
) -> Iterator[str]:
    """Yield a sentence for each method with such a rate, and for a fresh head.

    The studies took AdamW. Optimizers without the coefficients of Adam are left alone, and so are
    rates of 0.

    Args:
        model: the adapted model.
        optimizers: optimizers of the run, with or without a schedule.
        head: rate that a study chose for the head, None if it has been trained or not studied.
    """
    rate_of: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "betas" in group:
                rate = float(group.get("initial_lr", group["lr"]))
                rate_of.update((id(parameter), rate) for parameter in group["params"])
    yield from _of_methods(model, rate_of)
    if head is not None:
        yield from _of_head(model, rate_of, head)


def _of_methods(model: nn.Module, rate_of: Mapping[int, float]) -> Iterator[str]:
    """Yield a sentence for each unusual rate of a method that was studied.

    Args:
        model: the adapted model.
        rate_of: id of a parameter -> its learning rate.
    """
    rates: dict[type, set[float]] = {}
    for wrapper in wrappers(model):
        for _, parameter in wrapper.own_parameters():
            if rate_of.get(id(parameter)):
                rates.setdefault(type(wrapper), set()).add(rate_of[id(parameter)])
    for method, values in rates.items():
        # A class that derives from a method was not studied itself.
        studied = vars(method).get("studied_rate")
        if studied is None:
            continue
        for rate in sorted(values):
            if _is_far(rate, studied):
                yield (
                    f"{method.__name__} trains at a learning rate of {rate:g}. Its study chose "
                    f"{studied.rate:g} with AdamW ({studied.page})."
                )


def _of_head(model: nn.Module, rate_of: Mapping[int, float], head: StudiedRate) -> Iterator[str]:
    """Yield a sentence for each unusual rate of a fresh head."""
    rates = {rate_of[name] for name in head_parameters(model) if rate_of.get(name)}
    for rate in sorted(rates):
        if _is_far(rate, head):
            yield (
                f"The head is new, and trains at a learning rate of {rate:g}. A study of 77 "
                f"classes gave it {head.rate:g} with AdamW ({head.page}): "
                f"learning_rates: {{head: {head.rate:g}}}."
            )


def _is_far(rate: float, studied: StudiedRate) -> bool:
    return not studied.rate / FAR <= rate <= studied.rate * FAR
