"""Stateless randomness: a generator is a function of what it is for, never of what was drawn before.

`generator("order", seed, epoch)` gives the same numbers in a resumed run as in an uninterrupted one, on every device, and
leaves torch's global generator alone.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

__all__ = ["generator"]


def generator(purpose: str, *key: int) -> torch.Generator:
    """Return a fresh CPU generator seeded with (purpose, *key).

    Args:
        purpose: names the stream, so that two uses of the same numbers do not share their draws.
        key: non-negative integers, such as seed, epoch and batch.
    """
    # The length goes in because SeedSequence pads with zeros: (1, 2) and (1, 2, 0) would give the same stream.
    words = np.random.SeedSequence((zlib.crc32(purpose.encode()), len(key), *key)).generate_state(2, np.uint32)
    return torch.Generator().manual_seed((int(words[0]) << 32) | int(words[1]))
