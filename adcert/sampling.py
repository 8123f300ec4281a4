"""Which steps of a run are certified where not all of them are: one of each window of ``every`` consecutive steps."""

from __future__ import annotations

import hashlib


def drawn(step: int, every: int, seed: int) -> int:
    """The step that is certified in the window of ``step``; steps count from 1, windows are ``every`` steps long.

    It is uniform over the window and independent of the other windows, so that each step is certified with
    probability 1 / every whatever the period of the data, and ``every`` times a sum over the certified steps has the
    sum over all steps as its expectation (Horvitz and Thompson, 1952), in an incomplete last window too.

    A function of its arguments alone, SHA-256 of the seed and the window: it keeps no state, reads no random state,
    and is the same on every machine, in every process of a distributed run and after a resumption.

    Example:
        >>> [drawn(step, 4, seed=0) for step in (1, 4, 5, 9)], drawn(7, 1, seed=0)
        ([4, 4, 5, 12], 7)
    """
    window = (step - 1) // every
    digest = hashlib.sha256(f"{seed} {window}".encode()).digest()
    return window * every + 1 + int.from_bytes(digest) % every


def count_drawn(steps: int, every: int, seed: int) -> int:
    """How many of the first ``steps`` steps are certified.

    Example:
        >>> [count_drawn(steps, 4, seed=0) for steps in (0, 3, 4, 8)]
        [0, 0, 1, 2]
    """
    whole, rest = divmod(steps, every)
    return whole + (rest > 0 and drawn(steps, every, seed) <= steps)
