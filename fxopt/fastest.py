"""Which variant of each layer makes the whole model fastest: measured, not guessed.

A kernel that is faster by itself may cost more than it saves, since its neighbours must convert for it. So the model is
measured as a whole: with all layers in one variant, then with layers that are alike moved to another, then with runs of
neighbours moved, then with the halves of each run. What makes the model faster stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

# A move must bring so much of the latency to count: less is noise.
_GAIN = 0.015
_FIRST_RUNS, _MOST_MEASUREMENTS = 8, 64

Plan = Mapping[str, str]
"""For each layer its variant."""
Latency = Callable[[Plan], float]


def choose(
    names: Sequence[str], variants: Sequence[str], latency: Latency, alike: Sequence[Sequence[str]] = ()
) -> Plan:
    """The fastest plan found; every layer in the first variant if nothing beats that.

    Args:
        names: of the layers in graph order.
        variants: what a layer can be, such as "int8" and "float".
        latency: milliseconds of the model under a plan.
        alike: groups of layers that are of one kind and shape.
    """
    start = dict.fromkeys(names, variants[0])
    search = _Search(start, latency)
    for group in (names, *alike, *_runs(names)):
        for variant in variants:
            search.move(group, variant)
    return search.best if search.best != start and _is_faster(search.best, start, latency) else start


class _Search:
    """The best plan so far."""

    def __init__(self, start: Plan, latency: Latency) -> None:
        self.latency = latency
        self.best, self.time = start, latency(start)
        self.left = _MOST_MEASUREMENTS

    def move(self, names: Sequence[str], variant: str) -> None:
        """Keep the plan with *names* in *variant* if it is faster."""
        trial = {**self.best, **dict.fromkeys(names, variant)}
        if trial == self.best or not self.left:
            return
        time, self.left = self.latency(trial), self.left - 1
        if time < self.time * (1 - _GAIN):
            self.best, self.time = trial, time


def _runs(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbours: long runs first, then their halves."""
    size = max(1, -(-len(names) // _FIRST_RUNS))
    pending = [names[i : i + size] for i in range(0, len(names), size)]
    while pending:
        run = pending.pop(0)
        yield run
        if len(run) > 1:
            pending += [run[: len(run) // 2], run[len(run) // 2 :]]


def _is_faster(plan: Plan, than: Plan, latency: Latency) -> bool:
    """Whether *plan* is faster when both are measured in turn; single measurements drift."""
    pairs = [(latency(plan), latency(than)) for _ in range(3)]
    return min(a for a, _ in pairs) < min(b for _, b in pairs)
