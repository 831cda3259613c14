"""Which convs and linears to leave in float because the whole model then runs faster: measured, not guessed.

An int8 kernel that is faster by itself may cost more than it saves, since its neighbours must quantize for it. So the
model is measured as a whole: the layers are split into runs of neighbours, a run is flipped between int8 and float, and
what makes the model faster stays; then the halves of each run are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A flip must bring so much of the latency to count: less is noise.
_GAIN = 0.015
_FIRST_RUNS, _MOST_MEASUREMENTS = 8, 48

Latency = Callable[[frozenset[str]], float]


def choose_floats(names: Sequence[str], latency: Latency) -> frozenset[str]:
    """The layers of *names* to leave in float. The empty set if nothing beats all of them in int8.

    Args:
        names: in graph order.
        latency: milliseconds of the model with the given layers in float and all others in int8.
    """
    floats, best = frozenset[str](), latency(frozenset())
    time = latency(frozenset(names))
    if time < best * (1 - _GAIN):
        floats, best = frozenset(names), time
    size = max(1, -(-len(names) // _FIRST_RUNS))
    runs = [tuple(names[i : i + size]) for i in range(0, len(names), size)]
    measured = 2
    while runs and measured < _MOST_MEASUREMENTS:
        run = runs.pop(0)
        trial = floats - set(run) if floats & set(run) else floats | set(run)
        time, measured = latency(trial), measured + 1
        if time < best * (1 - _GAIN):
            floats, best = trial, time
        if len(run) > 1:
            middle = len(run) // 2
            runs += [run[:middle], run[middle:]]
    return floats if _confirmed(floats, latency) else frozenset()


def _confirmed(floats: frozenset[str], latency: Latency) -> bool:
    """Whether *floats* is faster than all int8 when both are measured in turn; single measurements drift."""
    pairs = [(latency(floats), latency(frozenset())) for _ in range(3)] if floats else []
    return bool(pairs) and min(a for a, _ in pairs) < min(b for _, b in pairs)
