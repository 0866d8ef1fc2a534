"""Reads what a profiler wrote: torch's Chrome trace, or the tree of Triton's proton, as one row a kernel and part."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any, NamedTuple

from fastmoco.contrast.parts import PARTS

STEP = "step "  # a recorded step is a range called "step 1", "step 2", ...
LAUNCHES = ("cuda_runtime", "cuda_driver")  # Triton launches through the driver
WAITS = {
    f"{api}{name}"
    for api, names in (
        ("cuda", ("DeviceSynchronize", "StreamSynchronize", "EventSynchronize")),
        ("cu", ("CtxSynchronize", "StreamSynchronize", "EventSynchronize")),
    )
    for name in names
}
TO_HOST = "Memcpy DtoH"


class Row(NamedTuple):
    """One kernel (on a CPU: one operator without what it calls) over all recorded steps."""

    name: str
    part: str
    """Part of the step that launched it, one of `parts.PARTS`, or "other"."""
    calls: int
    seconds: float
    by_step: tuple[float, ...] = ()
    """Seconds in each step; empty where the tool keeps sums over all steps."""


def leaves(tree: dict[str, Any]) -> list[Row]:
    """Rows of a tree of proton's, the slowest first: its kernels, in the part above them."""
    sums: dict[tuple[str, str], list[float]] = {}
    nodes = [(tree, "other")]
    while nodes:
        node, part = nodes.pop()
        name, metrics = node["frame"]["name"], node["metrics"]
        nodes += [(child, name if name in PARTS else part) for child in node["children"]]
        if not node["children"] and "time (ns)" in metrics:
            total = sums.setdefault((name, part), [0, 0.0])
            total[0] += metrics["count"]
            total[1] += metrics["time (ns)"] / 1e9
    return _slowest_first([Row(*key, int(count), seconds) for key, (count, seconds) in sums.items()])


def kernels(events: list[dict[str, Any]]) -> list[Row]:
    """Rows of a Chrome trace, the slowest first: the GPU's kernels, or without any, the CPU's operators."""
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    ranges = [event for event in spans if event.get("cat") == "user_annotation"]
    parts = [event for event in ranges if event["name"] in PARTS]
    steps = sorted((event for event in ranges if event["name"].startswith(STEP)), key=lambda event: event["ts"])
    launches = {_correlation(event): event["ts"] for event in spans if event.get("cat") in LAUNCHES}
    on_gpu = [event for event in spans if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_gpu:
        times = [(event["name"], launches.get(_correlation(event), event["ts"]), event["dur"]) for event in on_gpu]
    else:
        times = _own_times([event for event in spans if event.get("cat") == "cpu_op"])
    calls: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for name, start, duration in times:
        calls[name, _around(start, parts)].append((_around(start, steps), duration / 1e6))
    numbers = [event["name"] for event in steps]
    return _slowest_first([_row(*key, entries, numbers) for key, entries in calls.items()])


def waits(events: list[dict[str, Any]]) -> dict[str, int]:
    """Calls in which the host waits for the GPU, and copies from the GPU to the host, how many by name.

    Of a Chrome trace, what the host asked for between the begin of its first step and the end of its last; ValueError
    where it has no steps.
    """
    spans = [event for event in events if event.get("ph") == "X" and "dur" in event]
    steps = [event for event in spans if event.get("cat") == "user_annotation" and event["name"].startswith(STEP)]
    if not steps:
        raise ValueError("the trace has no steps in which to look for waits")
    first, last = min(event["ts"] for event in steps), max(event["ts"] + event["dur"] for event in steps)
    calls = [event for event in spans if event.get("cat") in LAUNCHES]
    call_times = {_correlation(event): event["ts"] for event in calls}
    moments = [(event["name"], event["ts"]) for event in calls if event["name"].partition("_v")[0] in WAITS]
    moments += [
        (TO_HOST, call_times.get(_correlation(event), event["ts"]))
        for event in spans
        if event.get("cat") == "gpu_memcpy" and event["name"].startswith(TO_HOST)
    ]
    return dict(Counter(name for name, moment in moments if first <= moment <= last))


def seconds_of_parts(rows: list[Row]) -> dict[str, tuple[float, list[float]]]:
    """Seconds of every part in all steps together, and in each of them where the rows tell them apart."""
    totals = {}
    for name in (*PARTS, "other"):
        inside = [row for row in rows if row.part == name]
        by_step = [sum(column) for column in zip(*(row.by_step for row in inside), strict=True)]
        totals[name] = (sum(row.seconds for row in inside), by_step)
    return totals


def _row(name: str, part: str, calls: list[tuple[str, float]], steps: list[str]) -> Row:
    by_step = dict.fromkeys(steps, 0.0)
    for step, seconds in calls:
        if step in by_step:
            by_step[step] += seconds
    return Row(name, part, len(calls), sum(seconds for _, seconds in calls), tuple(by_step.values()))


def _slowest_first(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.seconds)


def _correlation(event: dict[str, Any]) -> object:
    return event.get("args", {}).get("correlation")


def _around(moment: float, ranges: list[dict[str, Any]]) -> str:
    for event in ranges:
        if event["ts"] <= moment <= event["ts"] + event["dur"]:
            return event["name"]
    return "other"


def _own_times(events: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Name, start and duration of each operator, less the operators that it called, in microseconds."""
    spans: list[list[Any]] = []
    open_by_thread: dict[object, list[list[Any]]] = {}
    for event in sorted(events, key=lambda event: (event["ts"], -event["dur"])):
        stack = open_by_thread.setdefault(event["tid"], [])
        while stack and stack[-1][3] <= event["ts"]:
            stack.pop()
        if stack:
            stack[-1][2] -= event["dur"]
        entry = [event["name"], event["ts"], event["dur"], event["ts"] + event["dur"]]
        stack.append(entry)
        spans.append(entry)
    return [(name, start, max(0.0, own)) for name, start, own, _ in spans]
