"""Adapters on the Hugging Face Hub.

`push_adapter` writes the files of an adapter into a repository, in one commit. `pull_adapter`
fetches them. The name of such a repository, `user/name`, stands for the adapter wherever a folder
does. Tokens are those of `huggingface_hub`: `hf auth login`, or HF_TOKEN.
"""

from adaptrank.interop.hub.publishing import Publication, local_paths, prepare
from adaptrank.interop.hub.pulling import check_adapter, pull_adapter
from adaptrank.interop.hub.pushing import Pushed, push_adapter

__all__ = [
    "Publication",
    "Pushed",
    "check_adapter",
    "local_paths",
    "prepare",
    "pull_adapter",
    "push_adapter",
]
