"""Time of one call on a GPU: by events and within a CUDA graph, on random data, operands rotated past the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

L2_BYTES = 60 << 20
CALLS = 30

Call = Callable[[], Any]


def copies(bytes_each: int, dry: bool) -> int:
    """How many sets of operands keep each call from finding its own in the cache."""
    return 1 if dry else min(max(2, -(-2 * L2_BYTES // max(bytes_each, 1))), 64)


def measure(calls: Sequence[Call], dry: bool) -> dict[str, float]:
    """Microseconds: `us` (median), `p10`, `p90` between events around each call; `graph_us` of one in a replay.

    `calls` are the same on different operands. Without a GPU it is the host's clock, and no figure.
    """
    if dry:
        began = time.perf_counter()
        for call in calls:
            call()
        return {"us": 1e6 * (time.perf_counter() - began) / len(calls)}
    for call in islice(cycle(calls), max(len(calls), 5)):
        call()
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(CALLS)]
    for (start, end), call in zip(marks, cycle(calls), strict=False):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = sorted(1e3 * start.elapsed_time(end) for start, end in marks)
    deciles = statistics.quantiles(times, n=10)
    return {"us": statistics.median(times), "p10": deciles[0], "p90": deciles[-1], "graph_us": _in_graph(calls)}


def _in_graph(calls: Sequence[Call]) -> float:
    """Per call, of a graph of all of them: without gaps between launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(times)


class Floor:
    """What this device reached in the section `ceilings`; none where that did not run."""

    def __init__(self, rows: Sequence[dict[str, Any]]):
        known = {row["what"]: row["rate"] for row in rows if "rate" in row}
        self.bytes, self.flops = known.get("copy"), known.get("bf16 product")

    def share(self, measured: dict[str, float], flops: float, moved: float) -> dict[str, float]:
        """`floor_us`, the longer of arithmetic and traffic, and which part of the time that is."""
        if not self.bytes or not self.flops:
            return {}
        floor = 1e6 * max(flops / self.flops, moved / self.bytes)
        return {"floor_us": floor, "share": floor / measured.get("graph_us", measured["us"])}
