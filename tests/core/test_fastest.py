"""The search for the fastest variants finds what a model of latency hides, and is not led astray by noise."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import pytest

from fxopt import fastest, measure

NAMES = [f"layer{i}" for i in range(16)]
Latency = Callable[[fastest.Plan], float]


real_race = measure.race


@pytest.fixture(autouse=True)
def _stopwatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of these tests do not run: a call gives the milliseconds that it pretends to take."""
    monkeypatch.setattr(measure, "race", lambda first, second: second() / first())


def choose(variants: Sequence[str], latency: Latency, alike: Sequence[Sequence[str]] = ()) -> fastest.Plan:
    return fastest.choose(NAMES, variants, lambda plan: functools.partial(latency, plan), alike)


def test_finds_a_run_of_neighbours() -> None:
    slow = set(NAMES[4:8])

    def latency(plan: fastest.Plan) -> float:
        borders = sum(plan[a] != plan[b] for a, b in itertools.pairwise(NAMES))
        return 10 + sum((plan[n] == "int8") == (n in slow) for n in NAMES) + 0.4 * borders

    plan = choose(("int8", "float"), latency)
    assert {name for name, variant in plan.items() if variant == "float"} == slow


def test_finds_layers_that_are_alike_and_far_apart() -> None:
    slow = NAMES[::4]

    def latency(plan: fastest.Plan) -> float:
        return 10 + sum((plan[n] == "int8") == (n in slow) for n in NAMES)

    plan = choose(("int8", "float"), latency, [slow, NAMES[1::4]])
    assert [name for name, variant in plan.items() if variant == "float"] == slow


def test_takes_the_best_of_three_variants() -> None:
    cost = {"int8": 2.0, "bf16": 1.0, "float": 3.0}

    def latency(plan: fastest.Plan) -> float:
        return sum(cost[plan[n]] for n in NAMES[:8]) + sum(3 - cost[plan[n]] / 2 for n in NAMES[8:])

    plan = choose(("int8", "bf16", "float"), latency)
    assert [plan[name] for name in NAMES] == ["bf16"] * 8 + ["float"] * 8


def test_stays_with_the_first_variant_where_others_only_seem_faster() -> None:
    plans: list[fastest.Plan] = []

    def latency(plan: fastest.Plan) -> float:
        plans.append(plan)
        lucky = len(plans) < 40 and set(plan.values()) != {"int8"}
        return 9.0 if lucky else 10.0 + (set(plan.values()) != {"int8"})

    assert set(choose(("int8", "float"), latency).values()) == {"int8"}


def test_builds_a_bounded_number_of_models() -> None:
    built = 0

    def build(plan: fastest.Plan) -> fastest.Call:
        nonlocal built
        built += 1
        return lambda: 1.0

    many = [f"layer{i}" for i in range(500)]
    assert set(fastest.choose(many, ("int8", "float"), build).values()) == {"int8"}
    assert built <= 65


def test_a_race_compares_what_runs() -> None:
    work = list(range(2000))
    ratio = real_race(lambda: sum(work), lambda: [sum(work) for _ in range(10)], budget_s=0.05)
    assert ratio > 2
