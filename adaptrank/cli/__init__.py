"""The command line. The package of a verb is imported only when that verb is asked for."""

from adaptrank.cli.dispatch import VERBS, main

__all__ = ["VERBS", "main"]
