"""A short latency measurement: enough to tell engines apart, too short to be felt."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def latency_ms(call: Callable[[], object], *, budget_s: float = 0.3, calls: int = 10, warmup: int = 2) -> float:
    """Median milliseconds of *call*: *warmup* calls, then at most *calls* within *budget_s* seconds, at least one."""
    start = time.perf_counter()
    for _ in range(warmup):
        call()
        if time.perf_counter() - start > budget_s:
            break
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < calls and (not times or time.perf_counter() - start < budget_s):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)
