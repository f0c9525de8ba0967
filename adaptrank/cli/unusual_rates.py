"""Tell learning rates that are far from those that the studies of a method tried."""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim import Optimizer

from adaptrank.parameterizations import wrappers

FAR = 10.0
"""A rate so many times above the largest one that was tried, or below the smallest, is unusual."""


def unusual_rates(model: nn.Module, optimizers: Iterable[Optimizer]) -> Iterator[str]:
    """Yield a sentence for each method with such a rate.

    The studies took AdamW. Optimizers without the coefficients of Adam are left alone, and so are
    rates of 0.

    Args:
        model: the adapted model.
        optimizers: optimizers of the run, with or without a schedule.
    """
    rate_of: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "betas" in group:
                rate = float(group.get("initial_lr", group["lr"]))
                rate_of.update((id(parameter), rate) for parameter in group["params"])
    rates: dict[type, set[float]] = {}
    for wrapper in wrappers(model):
        for _, parameter in wrapper.own_parameters():
            if rate_of.get(id(parameter)):
                rates.setdefault(type(wrapper), set()).add(rate_of[id(parameter)])
    for method, values in rates.items():
        # A class that derives from a method was not studied itself.
        tried = vars(method).get("tried_rates")
        if tried is None:
            continue
        for rate in sorted(values):
            if not tried.low / FAR <= rate <= tried.high * FAR:
                yield (
                    f"{method.__name__} trains at a learning rate of {rate:g}. Its study tried "
                    f"{tried.low:g} to {tried.high:g} with AdamW, and chose {tried.chosen:g} "
                    f"({tried.page})."
                )
