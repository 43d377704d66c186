"""What is said when a candidate does not fit, or when nothing does what is asked: how much is missing, and each thing
that would help."""

from __future__ import annotations

from holdfast.planner.candidates import Candidate, kinds_of
from holdfast.planner.estimate import Estimate, Question, shares_of
from holdfast.planner.memory.ranks import kv_bytes_of_sequence
from holdfast.planner.quantities import of_bytes, of_seconds, requests
from holdfast.planner.search import Found
from holdfast.planner.show.alternatives import (
    fast_with_fewer_bits,
    fewer_requests,
    fitting_bits,
    fitting_kv_format,
    longest_context,
    where_it_fits,
    where_it_is_fast,
)


def label(question: Question, candidate: Candidate) -> str:
    """Its name, and where the cluster has several kinds of devices, in which order it uses which."""
    kinds = kinds_of(question.cluster)
    if len(kinds) == 1:
        return candidate.name
    used = list(dict.fromkeys(group.device.name for group in candidate.replicas[0]))
    return f"{candidate.name} on {' → '.join(used)}"


def does_not_fit(question: Question, other: Estimate) -> str:
    """Which rank lacks how much, and what would make it fit."""
    return f"{_lacks(question, other)}; {' or '.join(makes_it_fit(question, other))} would make it fit"


def _lacks(question: Question, other: Estimate) -> str:
    index, lacking = shortfall(question, other)
    stage = other.stages[index]
    whose = "a rank" if len(other.stages) == 1 else f"a rank of stage {index}"
    used = stage.device_bytes * question.memory_engine.utilization
    kv = _kv_of_longest(question, other, index)
    others = stage.memory.without_kv - stage.memory.weights
    return (
        f"{whose} needs {of_bytes(stage.memory.without_kv + kv)} (weights {of_bytes(stage.memory.weights)}, "
        f"working memory {of_bytes(others)}, KV cache of {question.goal.longest:,} tokens {of_bytes(kv)}), "
        f"{of_bytes(lacking)} more than the {of_bytes(used)} it may use"
    )


def shortfall(question: Question, other: Estimate) -> tuple[int, float]:
    """The stage whose ranks lack most for one sequence of the goal's length, and the bytes they lack."""
    lacking = [
        _kv_of_longest(question, other, index) / question.memory_engine.kv_fraction - stage.kv_room
        for index, stage in enumerate(other.stages)
    ]
    index = lacking.index(max(lacking))
    return index, lacking[index]


def _kv_of_longest(question: Question, other: Estimate, stage: int) -> int:
    share = shares_of(question, other.candidate)[stage]
    return kv_bytes_of_sequence(question.table, share, question.goal.longest, question.load(), question.memory_engine)


def makes_it_fit(question: Question, other: Estimate) -> list[str]:
    """Each by itself: fewer bits, a shorter context, larger devices."""
    ways = []
    if less := fitting_bits(question, [other.candidate]):
        ways.append(f"weights of {less[0]:g} bits")
    if smaller := fitting_kv_format(question, [other.candidate]):
        ways.append(f"a KV cache in {smaller[0]}")
    if context := longest_context(question, other):
        ways.append(f"a context of {context:,} tokens")
    index, lacking = shortfall(question, other)
    needed = other.stages[index].device_bytes + lacking / question.memory_engine.utilization
    ways.append(f"devices of {of_bytes(needed)}")
    return ways


# --- nothing does ---


def nothing_fits(found: Found) -> str:
    """Where no candidate fits, or none keeps the limits: how near the nearest is, and each thing that would help, in
    one sentence; "" where one does."""
    best = found.best
    if best.served is None:
        return _too_large(found)
    return _too_slow(found) if best.misses else ""


def _too_large(found: Found) -> str:
    question, best = found.question, found.best
    everyone = [some.candidate for some in found.ranking]
    ways = []
    if larger := where_it_fits(question):
        ways.append(f"{len(larger[0].devices)} devices ({larger[1].name})")
    if less := fitting_bits(question, everyone):
        ways.append(f"weights of {less[0]:g} bits ({less[1].name})")
    if smaller := fitting_kv_format(question, everyone):
        ways.append(f"a KV cache in {smaller[0]} ({smaller[1].name})")
    contexts = [(longest_context(question, some), some.candidate.name) for some in found.ranking]
    if max(contexts)[0]:
        ways.append(f"a context of {max(contexts)[0]:,} tokens ({max(contexts)[1]})")
    index, lacking = shortfall(question, best)
    size = best.stages[index].device_bytes
    ways.append(f"devices of {of_bytes(size + lacking / question.memory_engine.utilization)}")
    return (
        f"{question.shape.name} does not fit: even in the nearest plan, {label(question, best.candidate)}, "
        f"{_lacks(question, best)}; it would fit with {' or '.join(ways)}"
    )


_ROUNDED = 1.005
"""What is proposed is still enough when it is told in three digits."""


def _too_slow(found: Found) -> str:
    question, best = found.question, found.best
    served, goal = best.served, question.goal
    assert served is not None
    ways = []
    if goal.concurrency and (fewer := fewer_requests(question, found.ranking)):
        ways.append(f"{requests(fewer.requests)} at once instead of {goal.concurrency:,} ({fewer.candidate.name})")
    if larger := where_it_is_fast(question):
        ways.append(f"{len(larger[0].devices)} devices ({larger[1].best.candidate.name})")
    if less := fast_with_fewer_bits(question):
        ways.append(f"weights of {less[0]:g} bits ({less[1]})")
    reach = " and ".join(
        f"a {name} of {of_seconds(value * _ROUNDED)}"
        for name, limit, value in (("TTFT", goal.ttft, served.ttft), ("TPOT", goal.tpot, served.tpot))
        if limit is not None and value > limit
    )
    ways.append(f"{reach} allowed")
    return (
        f"no plan keeps the limits: of the nearest, {label(question, best.candidate)} with "
        f"{requests(best.concurrency)} at once, {' and '.join(best.misses)}; they would be kept with "
        f"{' or '.join(ways)}"
    )
