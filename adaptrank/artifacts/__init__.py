"""What a run leaves: adapters, merged models, summaries."""

from adaptrank.artifacts.adapter import describe_adapter, load_adapter, read_adapter, save_adapter
from adaptrank.artifacts.merging import merge, unmerge

__all__ = ["describe_adapter", "load_adapter", "merge", "read_adapter", "save_adapter", "unmerge"]
