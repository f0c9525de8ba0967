"""Soft pruning: units are closed rather than removed, and may come back until the last event."""

from adaptrank.allocation.plans import Close, Plan, Resize, Scores


def close_instead(plan: Plan, scores: Scores) -> Plan:
    """Return a plan that closes the units which the given plan removes."""
    soft: Plan = {}
    for key, change in plan.items():
        assert isinstance(change, Resize)
        removed = set(range(len(scores[key]))) - set(change.keep)
        soft[key] = Close(tuple(sorted(removed)))
    return soft
