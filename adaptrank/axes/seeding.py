"""Random number generators that every process of a run, and a resumed run, seed alike."""

import hashlib

import torch


def generator(seed: int, axis_key: str, step: int) -> torch.Generator:
    """Return the CPU generator of an event on an axis, seeded by (seed, axis key, step)."""
    digest = hashlib.blake2b(f"{seed}/{axis_key}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
