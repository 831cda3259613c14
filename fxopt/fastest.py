"""Which variant of each layer makes the whole model fastest: measured, not guessed.

A kernel that is faster by itself may cost more than it saves, since its neighbours must convert for it. So the model is
measured as a whole: with all layers in one variant, then with layers that are alike moved to another, then with runs of
neighbours moved, then with the halves of each run. What makes the model faster stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fxopt import measure

# A move must bring so much of the latency to count: less is noise.
_GAIN = 0.015
_FIRST_RUNS, _MOST_TRIALS = 8, 64

Plan = Mapping[str, str]
"""For each layer its variant."""
Call = Callable[[], object]


def choose(
    names: Sequence[str],
    variants: Sequence[str],
    build: Callable[[Plan], Call],
    alike: Sequence[Sequence[str]] = (),
) -> Plan:
    """The fastest plan found; every layer in the first variant if nothing beats that.

    Args:
        names: of the layers in graph order.
        variants: what a layer can be, such as "int8" and "float".
        build: the model under a plan, as a function that runs it once.
        alike: groups of layers that are of one kind and shape.
    """
    start = dict.fromkeys(names, variants[0])
    first = build(start)
    search = _Search(start, first, build)
    for group in (names, *alike, *_runs(names)):
        for variant in variants:
            search.move(group, variant)
    return search.plan if search.plan != start and measure.race(first, search.call) < 1 - _GAIN else start


class _Search:
    """The best plan so far, and the model under it."""

    def __init__(self, plan: Plan, call: Call, build: Callable[[Plan], Call]) -> None:
        self.plan, self.call, self.build = plan, call, build
        self.left = _MOST_TRIALS

    def move(self, names: Sequence[str], variant: str) -> None:
        """Keep the plan with *names* in *variant* if it is faster."""
        trial = {**self.plan, **dict.fromkeys(names, variant)}
        if trial == self.plan or not self.left:
            return
        self.left -= 1
        call = self.build(trial)
        if measure.race(self.call, call) < 1 - _GAIN:
            self.plan, self.call = trial, call


def _runs(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """Neighbours: long runs first, then their halves."""
    size = max(1, -(-len(names) // _FIRST_RUNS))
    pending = [names[i : i + size] for i in range(0, len(names), size)]
    while pending:
        run = pending.pop(0)
        yield run
        if len(run) > 1:
            pending += [run[: len(run) // 2], run[len(run) // 2 :]]
