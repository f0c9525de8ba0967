"""Sentences for members of a parameterization that have another name now."""

RENAMED = {
    "adapted": "forward_adapted",
    "product": "factors, of a class that derives from LowRankUpdate",
    "dropped": "apply_dropout",
    "multiplies": "fuses",
    "with_product": "add_product",
    "accumulated": "add_low_rank",
    "folded": "gated",
    "needs_weight": "require_weight",
}
"""Previous name of a member -> its name now."""


def renamed_definition(cls: type) -> str | None:
    """Return a sentence about a method of the class that has a previous name, or None."""
    for name in ("adapted", "product"):
        if hasattr(cls, name):
            return f"{cls.__name__}.{name} is not called any more; it is named {RENAMED[name]}."
    return None


def renamed_use(cls: type, name: str) -> str | None:
    """Return a sentence about a member that is looked up under a previous name, or None."""
    return f"{cls.__name__}.{name} is named {RENAMED[name]} now." if name in RENAMED else None
