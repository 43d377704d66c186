"""Which replica a request goes to."""

from __future__ import annotations

import random

from holdfast.gateway.balance import REMEMBERED, SLACK, STRETCH, Balancer


def prompt(seed: int, length: int = 3 * STRETCH) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(50_000) for _ in range(length)]


def test_a_conversation_stays_where_it_is_known():
    """Every turn computed anew on another replica; one that has died, and is chosen still."""
    balancer = Balancer()
    first = balancer.choose(prompt(1), {0: 0, 1: 0, 2: 0})
    for turn in range(1, 20):
        assert balancer.choose(prompt(1) + prompt(2, turn * 50), {0: 1, 1: 1, 2: 1}) == first
    others = {replica: 0 for replica in (0, 1, 2) if replica != first}
    second = balancer.choose(prompt(1), others)
    assert second in others
    assert balancer.choose(prompt(1), {0: 0, 1: 0, 2: 0}) == second


def test_who_is_much_busier_gets_nothing_for_knowing():
    balancer = Balancer()
    first = balancer.choose(prompt(1), {0: 0, 1: 0})
    assert balancer.choose(prompt(1), {first: 2 * 3 + SLACK, 1 - first: 3}) == first
    assert balancer.choose(prompt(1), {first: 2 * 3 + SLACK + 1, 1 - first: 3}) == 1 - first


def test_strangers_are_spread_evenly():
    """Prompts too short to know each other by, or with one stretch in common but not the first."""
    loads = dict.fromkeys(range(4), 0)
    balancer = Balancer()
    for seed in range(400):
        asked = prompt(seed, STRETCH - 1) if seed % 2 else prompt(seed, STRETCH) + prompt(0, STRETCH)
        loads[balancer.choose(asked, loads)] += 1
    assert max(loads.values()) - min(loads.values()) <= 8


def test_memory_is_bounded():
    balancer = Balancer()
    for seed in range(300):
        balancer.choose([seed] * 10_000, {0: 0, 1: 0})
    assert len(balancer._known) <= min(REMEMBERED, 300 * 64)
