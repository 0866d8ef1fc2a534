"""Named points at which a test can kill the process: FASTMOCO_CRASH_AT="state written", or "after step:7" for the 7th.

Without the variable a point is one look into the environment.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "FASTMOCO_CRASH_AT"
POINTS = (
    "before load",
    "verified",
    "after load",
    "before step",
    "after step",
    "half a log line",
    "before copy",
    "after copy",
    "model written",
    "state written",
    "manifest written",
    "renamed",
    "latest set",
    "pruning",
)

_counts: Counter[str] = Counter()


def reach(point: str) -> None:
    """Kill this process (SIGKILL) if it was to crash at `point`, one of POINTS."""
    if about_to_crash(point):
        os.kill(os.getpid(), signal.SIGKILL)


def about_to_crash(point: str) -> bool:
    """Count a visit of `point`; whether it is the one at which the process is to crash."""
    target = os.environ.get(VARIABLE)
    if target is None:
        return False
    assert point in POINTS, point
    name, _, count = target.partition(":")
    _counts[point] += 1
    return name == point and _counts[point] == int(count or 1)
