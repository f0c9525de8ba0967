"""Table of the optimizers that work on each method."""

from adaptrank.optimizers.model_optimizer import ModelOptimizer
from adaptrank.parameterizations import PARAMETERIZATIONS, on_example


def optimizer_pair(optimizer: type[ModelOptimizer], *methods: str) -> str:
    """Return what becomes of an optimizer on a method or a nest, with default arguments.

    Args:
        optimizer: class of the optimizer, a member of `OPTIMIZERS`.
        methods: class names of a nest, innermost first.
    Returns:
        "works", also where the tensors of some methods of a nest are left to AdamW, or the reason
        why it is refused.
    """
    reasons = {}
    for method in methods:
        reason = _misfit(optimizer, method)
        if not reason:
            return "works"
        reasons[method] = reason
    if len(reasons) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{method} {reason}" for method, reason in reasons.items())


def _misfit(optimizer: type[ModelOptimizer], method: str) -> str:
    wrapper = on_example(PARAMETERIZATIONS[method])
    reason, pair = optimizer.misfit(wrapper), wrapper.factor_pair()
    if reason or not optimizer.mixes_units or pair is None:
        return reason
    tied = [name for name, _ in (pair.B, pair.A) if name in wrapper.shared]
    return f"ties {', '.join(tied)} across layers by default; share=False works" if tied else ""


def summary(optimizer: type[ModelOptimizer]) -> str:
    """Return the first sentence of an optimizer's docstring."""
    text = (optimizer.__doc__ or "").strip()
    return text.split("\n", 1)[0].rstrip(".")
