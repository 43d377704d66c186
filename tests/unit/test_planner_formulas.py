"""Formulas with numbers filled in: they say what the estimate says, and each line's numbers make its result."""

from __future__ import annotations

import math
import re

import pytest

from holdfast.hardware.cluster import cluster_of
from holdfast.planner.goal import Goal
from holdfast.planner.search import Found, search
from holdfast.planner.shapes.load import load_shape
from holdfast.planner.show.breakdown import (
    decode_parts,
    exchanges,
    first_token_parts,
    parts,
    prompt_parts,
    token_parts,
)
from holdfast.planner.show.formulas import formulas

CASES = {
    "dense": ("Llama-3.1-70B", "8xA100-80GB", Goal(concurrency=32)),
    "latent and experts": ("DeepSeek-V3", "2x8xH100", Goal(input_len=2048, output_len=128, concurrency=1024)),
    "mixed": ("Llama-3.1-70B", "2xA100-40GB-SXM,4xA100-80GB-SXM", Goal(concurrency=64)),
    "one device": ("Llama-3.1-8B", "1xL4", Goal(weight_bits=8, kv_format="int8")),
    "windows and tied": ("Gemma-3-27B", "2xH100", Goal(tpot=0.03)),
    "waiting for room": ("Llama-3.1-70B", "4xH100", Goal(concurrency=4000, input_len=2000)),
    "uneven": ("Llama-3.1-70B", "7xH100", Goal(objective="latency", concurrency=4, weight_bits=8)),
    "4 bits": ("Qwen3-235B-A22B", "8xH100", Goal(weight_bits=4, objective="latency")),
}
UNITS = {
    "TB/s": 1e12, "GB/s": 1e9, "MB/s": 1e6, "TFLOP/s": 1e12, "GFLOP/s": 1e9, "TB": 1e12, "GB": 1e9, "MB": 1e6,
    "KB": 1e3, "B": 1, "ms": 1e-3, "µs": 1e-6, "s": 1,
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def found(request: pytest.FixtureRequest) -> Found:
    model, cluster, goal = CASES[request.param]
    return search(load_shape(model), cluster_of(cluster), goal)


def evaluated(numbers: str) -> float:
    """What a person would work out from a line."""
    units = "|".join(map(re.escape, UNITS))
    text = re.sub(rf"([\d.]+) ({units})(?![\w/])", lambda match: f"({match[1]} * {UNITS[match[2]]})", numbers)
    for written, meant in (("·", "*"), ("−", "-"), ("^", "**")):
        text = text.replace(written, meant)
    return float(eval(text, {"__builtins__": {}}, {"min": min}))


def test_every_line_can_be_checked_by_hand(found: Found) -> None:
    for line in formulas(found):
        assert line.formula
        if "the corner rounded" in line.formula:  # the norm makes it faster than either line by 6 % at most
            assert 0.94 <= line.value / evaluated(line.numbers) <= 1.001, line
        else:
            assert evaluated(line.numbers) == pytest.approx(line.value, rel=0.01, abs=1e-9), line


def test_formulas_say_what_the_estimate_says(found: Found) -> None:
    best = found.best
    served = best.served
    assert served is not None
    by_name = {(line.section, line.name): line.value for line in formulas(found)}
    users = {name: value for (section, name), value in by_name.items() if section == "What users see"}
    assert users["TPOT"] == pytest.approx(served.tpot, rel=1e-6)
    assert users["TTFT"] == pytest.approx(served.ttft, rel=1e-3)
    assert users["tokens/s"] == pytest.approx(best.throughput, rel=1e-3)
    named = {name: value for (section, name), value in by_name.items() if section.startswith("Memory")}
    weights = [stage.memory.weights for stage in best.stages]
    assert min(abs(named["weights"] / some - 1) for some in weights) < 1e-3
    assert named["tokens"] == pytest.approx(best.kv_tokens, rel=2e-3, abs=16)


def test_steps_add_up_to_what_the_stage_takes(found: Found) -> None:
    served = found.best.served
    assert served is not None
    steps = [line for line in formulas(found) if line.name == "step"]
    assert any(steps[0].value == pytest.approx(time.total, rel=1e-6) for time in served.decode)
    added = next(line for line in formulas(found) if line.name == "what a prompt adds")
    assert added.value == pytest.approx(sum(prompt_parts(found.question, found.best).values()), rel=1e-6)


def test_parts_add_up_to_tpot_and_ttft(found: Found) -> None:
    question = found.question
    judged = [some for some in found.ranking if some.served is not None]
    assert judged
    for some in judged[:6]:
        assert some.served is not None
        assert sum(time for _, time in parts(question, some)) == pytest.approx(some.served.tpot)
        assert sum(token_parts(question, some).values()) == pytest.approx(some.served.tpot)
        assert sum(time for _, time in first_token_parts(question, some)) == pytest.approx(some.served.ttft, rel=1e-5)


def test_exchanges_are_the_communication_of_the_step(found: Found) -> None:
    question = found.question
    for some in [some for some in found.ranking if some.served is not None][:6]:
        decode, served = decode_parts(question, some), some.served
        assert served is not None
        if served.step > sum(time.total for time in served.decode):
            continue  # parts are the slowest stage's, for which the others wait; exchanges are all stages'
        sent = exchanges(question, some)
        for part in ("all-reduces", "gathered weights", "pipeline hops"):
            seconds = sum(exchange.seconds for exchange in sent if exchange.what == part)
            assert seconds == pytest.approx(decode[part], rel=1e-9, abs=1e-15), (some.candidate.name, part)
        assert all(0 < exchange.latency <= exchange.seconds for exchange in sent)
        assert all(math.isfinite(exchange.sent) and exchange.sent > 0 for exchange in sent)
