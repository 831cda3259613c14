"""Short latency measurements: enough to tell engines apart, too short to be felt."""

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


def race(first: Callable[[], object], second: Callable[[], object], *, budget_s: float = 0.8) -> float:
    """How long *second* takes, in times of *first*: both in turn, so that a machine that slows down slows both.

    The median over rounds, at least 3 and at most 20 within *budget_s* seconds, each of which compares the fastest of
    a few calls. It ends early where *second* was clearly slower each time.
    """
    start = time.perf_counter()
    ratios: list[float] = []
    while len(ratios) < 3 or (len(ratios) < 20 and time.perf_counter() - start < budget_s):
        ratios.append(_fastest(second) / _fastest(first))
        if len(ratios) == 4 and min(ratios) > 1.03:
            break
    return statistics.median(ratios)


def _fastest(call: Callable[[], object]) -> float:
    """Seconds of the fastest of three calls after one that fills the caches."""
    call()
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)
