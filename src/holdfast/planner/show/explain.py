"""Why a candidate was not chosen, and what it would take: one sentence with numbers."""

from __future__ import annotations

from collections.abc import Mapping

from holdfast.planner.estimate import MARGIN, Estimate, Question, StageMemory, estimate, rank_key
from holdfast.planner.quantities import bytes_per_second, count, of_bytes, of_seconds, percent, requests
from holdfast.planner.search import ALIKE, Found, alike
from holdfast.planner.show.alternatives import most_requests
from holdfast.planner.show.breakdown import (
    Part,
    at_concurrency,
    decode_parts,
    decode_rows,
    exchanges,
    first_token_parts,
    replica_of,
    token_parts,
    workload_of,
)
from holdfast.planner.show.levers import request_time, what_it_takes
from holdfast.planner.show.shortfall import does_not_fit
from holdfast.planner.timing import expert_work, read_rate


def why(found: Found, other: Estimate) -> str:
    """Why `other` is not the plan chosen, in one sentence: the constraint that binds, with numbers, and what it would
    take; "" for the chosen one itself."""
    question, best = found.question, found.best
    if other is best:
        return ""
    specific = found.runtime is not None and not found.runtime.refuses_all(question.goal)
    refused = found.refuses(other) if specific and other.fits else ""
    if refused and best.served is not None and rank_key(question.goal, other) < rank_key(question.goal, best):
        return f"{_against(question, best, other)}, but Holdfast does not run it yet: {refused}"
    reason = _why(found, other)
    return f"{reason}; Holdfast does not run it yet: {refused}" if refused else reason


def _why(found: Found, other: Estimate) -> str:
    question, best = found.question, found.best
    if not other.fits:
        return does_not_fit(question, other)
    if other.misses:
        return _breaks_limits(question, other)
    if best.served is None or best.misses:
        return ""
    if other.tight and not best.tight:
        return f"it keeps its limits with less than {MARGIN - 1:.0%} to spare, which predictions may be off by"
    if alike(question.goal, other, best):
        return _as_good(question, best, other)
    if question.goal.objective == "memory":
        return _more_memory(question, best, other)
    if question.goal.objective == "spare":
        return _against(question, best, other)
    return _slower(question, best, other)


# --- it breaks a limit ---


def _breaks_limits(question: Question, other: Estimate) -> str:
    """Which limit, what takes most of the time, and with how many requests at once it would keep it."""
    miss = " and ".join(other.misses)
    if any(some.startswith("TPOT") for some in other.misses):
        part, taken = _largest(token_parts(question, other))
        binds = f"{_subject(question, other, part)} {of_seconds(taken)} of it"
    else:
        name, taken = max(first_token_parts(question, other), key=lambda named: named[1])
        binds = f"{of_seconds(taken)} of it for {name}"
    return f"{miss}: {binds}; {_requests_that_keep(question, other)}"


def _requests_that_keep(question: Question, other: Estimate) -> str:
    if most := most_requests(question, other):
        return f"it would be kept with {requests(most)} at once"
    alone = estimate(at_concurrency(question, len(other.candidate.replicas)), other.candidate).served
    assert alone is not None
    return f"a request alone has TTFT {of_seconds(alone.ttft)} and TPOT {of_seconds(alone.tpot)}"


def _largest(times: Mapping[Part, float]) -> tuple[Part, float]:
    part = max(times, key=lambda name: times[name])
    return part, times[part]


# --- it is as good, or worse ---


def _as_good(question: Question, best: Estimate, other: Estimate) -> str:
    mine, chosen = other.candidate, best.candidate
    if mine.shared_experts and not chosen.shared_experts:
        but = "but its experts lie in other replicas too, which are sent rows in every layer"
    elif mine.shard_weights and not chosen.shard_weights:
        but = "but its weights are gathered from other replicas in every step"
    elif chosen.is_even and not mine.is_even:
        but = f"but its stages are unequal ({'+'.join(map(str, mine.layers))} layers)"
    elif len(mine.layers) > len(chosen.layers):
        but = f"but it has {len(mine.layers)} stages, not {len(chosen.layers)}"
    elif max(mine.degrees) > max(chosen.degrees):
        but = f"but {max(mine.degrees)} ranks share a layer, not {max(chosen.degrees)}"
    else:
        but = "and it is no simpler"
    within = f"as good within {percent(ALIKE)}, as far as the model can tell"
    return f"{within}, {but}: {_against(question, best, other)}"


def _against(question: Question, best: Estimate, other: Estimate) -> str:
    """The objective's figures of both."""
    goal = question.goal
    assert best.served is not None
    assert other.served is not None
    if goal.objective == "latency":
        mine, chosen = (of_seconds(request_time(some, goal.output_len)) for some in (other.served, best.served))
        return f"{mine} for a request against {chosen}"
    if goal.objective == "memory":
        mine, chosen = (of_bytes(_tightest(some).memory.without_kv) for some in (other, best))
        return f"{mine} on the fullest rank before any KV cache against {chosen}"
    if goal.objective == "spare":
        mine, chosen = (f"{count(some.throughput_left)} ({percent(some.spare)})" for some in (other, best))
        return f"{mine} tokens/s left when a rank is lost against {chosen}"
    if goal.objective == "cost" and other.cost is not None and best.cost is not None:
        return f"{other.cost:.3g} for a million tokens against {best.cost:.3g}"
    if goal.objective == "cost":
        mine, chosen = (count(some.throughput_per_device) for some in (other, best))
        return f"{mine} tokens/s of a device against {chosen}"
    return f"{count(other.throughput)} tokens/s against {count(best.throughput)}"


def _tightest(some: Estimate) -> StageMemory:
    return max(some.stages, key=lambda stage: stage.memory.without_kv / stage.device_bytes)


def _more_memory(question: Question, best: Estimate, other: Estimate) -> str:
    mine, chosen = _tightest(other).memory, _tightest(best).memory
    sizes = [
        (mine.weights - chosen.weights, "weights"),
        (mine.activations + mine.logits - chosen.activations - chosen.logits, "activations"),
        (mine.communication - chosen.communication, "buffers for communication"),
    ]
    more, what = max(sizes)
    return f"{_against(question, best, other)}: {of_bytes(more)} more of {what}"


def _slower(question: Question, best: Estimate, other: Estimate) -> str:
    """Both with the requests at once that the best has: what the other loses most by."""
    against = _against(question, best, other)
    idle = best.candidate.num_devices - other.candidate.num_devices
    if idle > 0:
        total = len(question.cluster.devices)
        return f"{against}: leaves {idle} of {total} devices idle that the best uses"
    together = question.goal.concurrency or best.concurrency
    same = estimate(at_concurrency(question, together), other.candidate)
    if same.misses:
        part, taken = _largest(token_parts(question, same))
        return (
            f"{against}: keeps the limits with {requests(other.concurrency)} at once only; with {together:,} "
            f"{same.misses[0]}, {_subject(question, same, part)} {of_seconds(taken)} of it"
        )
    return f"{against}: {_loss(question, best, same)}"


def _loss(question: Question, best: Estimate, same: Estimate) -> str:
    """What takes longer, by the seconds of a whole request."""
    assert same.served is not None
    assert best.served is not None
    mine, chosen = token_parts(question, same), token_parts(question, best)
    gaps = max(question.goal.output_len - 1, 1)
    part, _ = _largest({name: mine[name] - chosen.get(name, 0.0) for name in mine})
    by_part = (mine[part] - chosen[part]) * gaps
    by_room = same.served.queue - best.served.queue
    by_start = same.served.ttft - best.served.ttft - by_room
    if by_room > max(by_part, by_start):
        return _too_little_room(question, best, same)
    if by_start > by_part:
        name, taken = max(first_token_parts(question, same), key=lambda named: named[1])
        return (
            f"TTFT is {of_seconds(same.served.ttft)}, {of_seconds(taken)} of it for {name} "
            f"(the best: {of_seconds(best.served.ttft)})"
        )
    if by_part <= 0:
        return "the differences are small and everywhere"
    target = request_time(best.served, question.goal.output_len)
    takes = what_it_takes(question, same, part, target, reading=reads(question, same, part))
    theirs = f"{of_seconds(chosen[part])} of {of_seconds(best.served.tpot)}" if chosen[part] else "none"
    return (
        f"{_subject(question, same, part)} {of_seconds(mine[part])} of a token's {of_seconds(same.served.tpot)} "
        f"(the best: {theirs}); {takes}"
    )


def _too_little_room(question: Question, best: Estimate, same: Estimate) -> str:
    """Weights leave room for fewer requests: how many, and what would bring as many as are wanted."""
    assert same.served is not None
    copies = len(same.candidate.replicas)
    tokens = workload_of(question, same).concurrency / same.served.running * same.kv_tokens
    tightest = _tightest(same)
    more = tightest.kv_room * (tokens / same.kv_tokens - 1) / question.memory_engine.utilization
    return (
        f"its KV cache has room for {requests(same.served.running * copies)} at once, not for {best.concurrency:,} "
        f"as in the best: weights take {of_bytes(tightest.memory.weights)} of a device's "
        f"{of_bytes(tightest.device_bytes)}; devices of {of_bytes(tightest.device_bytes + more)} would hold them"
    )


def reads(question: Question, some: Estimate, part: Part) -> bool:
    """Whether a part of a token's time is bound by memory, not by arithmetic: others' prompts are the latter."""
    if part not in ("weights", "experts", "attention"):
        return True
    if decode_parts(question, some)[part] < token_parts(question, some)[part] / 2:
        return False
    assert some.served is not None
    if part == "attention":
        return True
    return sum(time.linear_memory for time in some.served.decode) >= sum(
        time.linear_compute for time in some.served.decode
    )


def _subject(question: Question, some: Estimate, part: Part) -> str:
    """The part, with its verb."""
    reading = reads(question, some, part)
    if part == "weights":
        if not reading:
            return "products with weights take"
        how = "a rank" if len(some.stages) == 1 else "stage after stage"
        return f"reading weights ({of_bytes(weights_read(question, some))} {how}) takes"
    if part == "experts":
        return "reading experts' weights takes" if reading else "products with experts' weights take"
    if part == "attention":
        return "reading the KV cache takes" if reading else "attention over prompts takes"
    if part == "scheduler":
        return f"the scheduler's part of each of {len(some.stages)} stages takes"
    crossed = [exchange.link for exchange in exchanges(question, some) if exchange.what == part]
    if crossed:
        link = min(crossed, key=lambda link: link.bandwidth)
        names = {
            "all-to-alls": "sending rows to other replicas' experts and back",
            "gathered weights": "gathering other replicas' weights",
            "pipeline hops": "passing rows on to next stages",
        }
        verb = "take" if part == "all-reduces" else "takes"
        return f"{names.get(part, part)} over {link.name} ({bytes_per_second(link.bandwidth)} per direction) {verb}"
    return f"{part} take" if part.endswith("s") else f"{part} takes"


def weights_read(question: Question, some: Estimate) -> float:
    """Bytes of weights that one rank of each stage reads in a decoding step, all stages together."""
    assert some.served is not None
    efficiency = question.known.efficiency
    rows, total = decode_rows(question, some).rows, 0.0
    for time, stage in zip(some.served.decode, replica_of(question, some).stages, strict=True):
        routed = sum(
            count * expert_work(stage, layer, rows, efficiency)[0] for layer, count in stage.kinds if layer.experts
        )
        total += (time.linear_memory - routed) * read_rate(stage.device, stage.weight_bits, efficiency)
        total += routed * read_rate(stage.device, stage.expert_bits, efficiency)
    return total
