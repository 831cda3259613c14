"""How speed is measured: all contestants in one run, in rounds of blocks, medians.

Never call by call: the threads that one engine leaves spinning would be paid by the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

PAUSE_S = 0.05
DROPPED = 4


def block(call: Callable[[], object], calls: int) -> list[float]:
    """Milliseconds of each of *calls* calls, after a pause and the calls that are dropped."""
    time.sleep(PAUSE_S)
    for _ in range(DROPPED):
        call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def medians(contestants: Mapping[str, Callable[[], object]], *, rounds: int = 5, calls: int = 10) -> dict[str, float]:
    """Median milliseconds of a call of each contestant.

    Args:
        contestants: what to call, by name.
        rounds: how often each contestant gets a block; the order turns around from round to round.
        calls: timed calls in a block, at least; short calls get more, up to 0.1 s of them.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    counts: dict[str, int] = {}
    for number in range(rounds):
        names = list(contestants)[:: -1 if number % 2 else 1]
        for name in names:
            if name not in counts:
                once = statistics.median(block(contestants[name], 3))
                counts[name] = max(calls, min(10 * calls, int(100 / once)))
            times[name] += block(contestants[name], counts[name])
    return {name: statistics.median(values) for name, values in times.items()}


def geometric_mean(values: list[float]) -> float:
    """Geometric mean; NaN where there are no values."""
    return statistics.geometric_mean(values) if values else float("nan")
