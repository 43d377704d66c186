"""What is a leak, and what only looks like one."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from holdfast.cluster.leak import SAMPLES, SLACK, LeakWatch, private_memory

MB = 1_000_000


def verdicts(amounts: list[int], expected: int = 500 * MB) -> list[float]:
    """What a watch with a sample a second says of these, where it says anything."""
    watch = LeakWatch(expected, float(SAMPLES))
    found = [watch.look(has, float(second)) for second, has in enumerate(amounts)]
    return [slope for slope in found if slope is not None]


def test_memory_that_grows_beyond_what_was_expected_is_a_leak():
    dice = random.Random(0)
    amounts = [400 * MB + 20 * MB * second + dice.randrange(10 * MB) for second in range(60)]
    found = verdicts(amounts)
    assert found
    assert found[0] == pytest.approx(20 * MB, rel=0.1)
    assert amounts[60 - len(found)] >= 500 * MB + SLACK


@pytest.mark.parametrize(
    "amounts",
    [
        [min(100 * MB + 20 * MB * second, 500 * MB + SLACK - 1) for second in range(100)],
        [900 * MB + random.Random(1).randrange(50 * MB) for _ in range(100)],
        [(700 if second % 7 else 900) * MB for second in range(100)],
        [(600 + 100 * (second // 30)) * MB for second in range(100)],
    ],
    ids=["a cache that is filled", "much, but no more", "up and down", "steps, far from each other"],
)
def test_what_is_no_leak(amounts: list[int]):
    assert not verdicts(amounts)


def test_the_memory_of_a_process_is_known():
    """Of one that takes 50 MB when told to: this one may give some back at any moment."""
    script = "import sys; print(1, flush=True); input(); kept = b'x' * 50_000_000; print(2, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=-1, stdout=-1, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        before = private_memory(child.pid)
        child.stdin.write("\n")
        child.stdin.flush()
        child.stdout.readline()
        assert private_memory(child.pid) - before >= 49_000_000
        child.communicate("\n")
    assert private_memory(child.pid) == 0
