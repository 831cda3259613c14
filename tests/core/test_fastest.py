"""The search for the fastest variants finds what a model of latency hides, and is not led astray by noise."""

from __future__ import annotations

import itertools

from fxopt import fastest

NAMES = [f"layer{i}" for i in range(16)]


def test_finds_a_run_of_neighbours() -> None:
    slow = set(NAMES[4:8])

    def latency(plan: fastest.Plan) -> float:
        borders = sum(plan[a] != plan[b] for a, b in itertools.pairwise(NAMES))
        return 10 + sum((plan[n] == "int8") == (n in slow) for n in NAMES) + 0.4 * borders

    plan = fastest.choose(NAMES, ("int8", "float"), latency)
    assert {name for name, variant in plan.items() if variant == "float"} == slow


def test_finds_layers_that_are_alike_and_far_apart() -> None:
    slow = NAMES[::4]

    def latency(plan: fastest.Plan) -> float:
        return 10 + sum((plan[n] == "int8") == (n in slow) for n in NAMES)

    plan = fastest.choose(NAMES, ("int8", "float"), latency, [slow, NAMES[1::4]])
    assert [name for name, variant in plan.items() if variant == "float"] == slow


def test_takes_the_best_of_three_variants() -> None:
    cost = {"int8": 2.0, "bf16": 1.0, "float": 3.0}

    def latency(plan: fastest.Plan) -> float:
        return sum(cost[plan[n]] for n in NAMES[:8]) + sum(3 - cost[plan[n]] / 2 for n in NAMES[8:])

    plan = fastest.choose(NAMES, ("int8", "bf16", "float"), latency)
    assert [plan[name] for name in NAMES] == ["bf16"] * 8 + ["float"] * 8


def test_stays_with_the_first_variant_where_others_only_seem_faster() -> None:
    calls = itertools.count()

    def latency(plan: fastest.Plan) -> float:
        drift = 0.05 * next(calls)  # the machine warms up: everything measured later is faster
        return 10 - drift + (0.0 if set(plan.values()) == {"int8"} else 0.5)

    assert set(fastest.choose(NAMES, ("int8", "float"), latency).values()) == {"int8"}


def test_measures_a_bounded_number_of_plans() -> None:
    measured = 0

    def latency(plan: fastest.Plan) -> float:
        nonlocal measured
        measured += 1
        return float(measured)

    many = [f"layer{i}" for i in range(500)]
    assert set(fastest.choose(many, ("int8", "float"), latency).values()) == {"int8"}
    assert measured <= 70
