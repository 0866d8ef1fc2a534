"""Counter-based draws: hashes of (seed, stream, counters), which hold no state and so need no order of drawing."""

from __future__ import annotations

import numpy as np

# Which part of the plan a hash belongs to. Appending is safe; renumbering changes every run.
ORDER_STREAM, BOX_STREAM, PHOTOMETRIC_STREAM, SHUFFLE_STREAM, BANK_STREAM = range(5)
KEYED_STREAM, SHARD_STREAM, WINDOW_STREAM, PACK_STREAM = range(5, 9)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_words(*words: int | np.ndarray) -> np.ndarray:
    """Hash of broadcast non-negative words: uint64, at least one-dimensional.

    Each word selects one output of a SplitMix64 generator (Steele, Lea and Flood, 2014) whose state is the hash of the
    words before it.
    """
    state = np.zeros(1, np.uint64)
    for word in words:
        state = mix(state + (np.atleast_1d(np.asarray(word)).astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return state


def uniform(*words: int | np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from the upper 53 bits of `hash_words`, float64."""
    return (hash_words(*words) >> np.uint64(11)) * 2.0**-53


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 whose output bits each depend on all input bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
