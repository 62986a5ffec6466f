"""Random numbers with an address: the same draw for the same place, however it is batched."""

from __future__ import annotations

import hashlib

import numpy as np


def keyed_generator(*address: int | str) -> np.random.Generator:
    """Return a separate generator for this address, which begins with the run's seed."""
    text = "\x1f".join(str(part) for part in address)
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def keyed_uniforms(count: int, *address: int | str) -> np.ndarray:
    """Return `count` float32 numbers strictly between 0 and 1 for this address.

    For a token's draw the address is (seed, step, example id, node), and entry t belongs to the
    node's token t. A longer request begins with the numbers of a shorter one.
    """
    bits = keyed_generator(*address).integers(0, 2**23, count)
    return ((bits + 0.5) / 2**23).astype(np.float32)  # midpoints: exact, and never 0 or 1
