"""What users see under a steady load: closed loops of few and many clients, against what holds whatever the fit."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import MappingProxyType

import pytest

from holdfast.hardware.catalogue import find_device, find_link
from holdfast.planner.coefficients import coefficients
from holdfast.planner.communication import Fabric
from holdfast.planner.serving import Replica, Served, Workload, serve
from holdfast.planner.shapes.presets import find_model
from holdfast.planner.timing import stage_of

ENGINES = ("vllm", "trtllm", "sglang")


def replica(engine: str = "vllm", kv_tokens: float = math.inf, *, waiting: float | None = None, **changes) -> Replica:
    """Llama-3.1-8B on one H100. `waiting`: how much of Little's law the measurement shows."""
    known = coefficients()
    if waiting is not None:
        known = replace(known, load=MappingProxyType({**known.load, "queue": waiting}))
    shape, device = find_model("Llama-3.1-8B"), find_device("H100")
    some = replace(known.engines[engine], **changes)
    fabric = Fabric(device.name, find_link("nvlink4"))
    stage = stage_of(shape, shape.kinds, some, device=device, tensor_parallel=1, fabric=fabric)
    return Replica((stage,), kv_tokens, some, known)


def loads(kv_tokens: float = math.inf, engine: str = "vllm") -> list[Served]:
    return [serve(replica(engine, kv_tokens), Workload(1000, 200, clients)) for clients in (1, 2, 4, 8, 32, 128, 512)]


@pytest.mark.parametrize("engine", ENGINES)
def test_one_client_waits_for_its_prompt_and_its_steps_alone(engine: str) -> None:
    """TTFT = first_token + prompt + 1.5 steps; TPOT = a step; nobody else is there to wait for."""
    some = replica(engine, front_request=0, front_token=0, front_prompt=0)
    served = serve(some, Workload(1000, 200, 1))
    through, _ = some.prompt(Workload(1000, 200, 1), 1)
    assert served.tpot == pytest.approx(served.step)
    assert served.ttft == pytest.approx(some.engine.first_token + through + 1.5 * served.step)
    assert (served.queue, served.prompt_wait, served.burst) == (0, 0, 0)
    assert served.front == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_throughput_is_little_s_law(engine: str) -> None:
    """Clients = throughput · (time of a request), in tokens."""
    for clients in (1, 16, 256):
        served = serve(replica(engine), Workload(1000, 200, clients))
        cycle = served.ttft + 199 * served.tpot
        assert served.throughput * cycle / 200 == pytest.approx(clients)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_clients_never_make_it_faster_for_one_of_them(engine: str) -> None:
    for before, after in itertools.pairwise(loads(engine=engine)):
        assert before.tpot <= after.tpot
        assert before.ttft <= after.ttft
        assert before.throughput <= after.throughput * 1.001


def test_those_without_room_wait_a_request_s_time_for_each_place() -> None:
    """Room for 10 requests and 30 clients: 20 wait, and every request there is waits for two others' time."""
    some = replica(kv_tokens=10 * (1000 + coefficients().engines["vllm"].reserve * 200), waiting=1)
    served = serve(some, Workload(1000, 200, 30))
    alone = serve(some, Workload(1000, 200, 10))
    assert served.running == pytest.approx(10)
    assert alone.queue == 0
    assert served.queue == pytest.approx(2 * (alone.ttft - alone.front + alone.tpot * 200), rel=0.01)
    assert served.tpot == pytest.approx(alone.tpot)


def test_more_room_for_keys_and_values_never_worsens_ttft() -> None:
    rooms = (2_000, 10_000, 30_000, 100_000, 300_000, 10**6, math.inf)
    times = [serve(replica(kv_tokens=room), Workload(1000, 200, 128)).ttft for room in rooms]
    assert times == sorted(times, reverse=True)


def test_throughput_is_bounded_by_what_runs_at_once() -> None:
    """Where ten have room, a hundred clients get no more tokens than ten, whatever is fitted of their wait."""
    for waiting in (1, 0.5, None):
        few, many = (
            serve(replica(kv_tokens=11_200, waiting=waiting), Workload(1000, 200, some)) for some in (10, 100)
        )
        assert many.throughput == pytest.approx(few.throughput, rel=0.02)


def test_the_process_in_front_limits_requests_by_their_tokens() -> None:
    """1000 · 100 µs + 200 · 500 µs + 50 ms a request: four a second, however quick the engine."""
    slow = replica(front_request=0.05, front_prompt=100e-6, front_token=500e-6)
    served = serve(slow, Workload(1000, 200, 256))
    assert served.throughput == pytest.approx(4 * 200, rel=0.02)
    assert served.front > 10 * served.tpot


def test_a_burst_waits_for_half_of_its_prompts() -> None:
    calm, burst = (serve(replica(burst=share), Workload(1000, 200, 33)) for share in (0, 1))
    assert burst.burst == pytest.approx(16 * burst.prompt)
    assert burst.ttft == pytest.approx(calm.ttft + burst.burst)


def test_a_prompt_that_is_cached_is_no_work() -> None:
    plain, cached = (serve(replica(), Workload(8000, 200, 8, cached=share)) for share in (0, 0.9))
    assert cached.ttft < plain.ttft / 2
    assert cached.tpot < plain.tpot


def test_tokens_sent_in_batches_come_later_and_closer() -> None:
    one, twenty = (serve(replica(), Workload(1000, 200, 8, stream_interval=tokens)) for tokens in (1, 20))
    assert twenty.ttft == pytest.approx(one.ttft + 19 * one.tpot)
    assert twenty.tpot == pytest.approx(one.tpot * (1 - 19 / 199))
    assert twenty.ttft + 199 * twenty.tpot == pytest.approx(one.ttft + 199 * one.tpot)


@pytest.mark.parametrize("output", [1, 2, 3])
def test_very_short_outputs_have_finite_times(output: int) -> None:
    served = serve(replica(), Workload(1000, output, 64))
    assert all(math.isfinite(number) and number > 0 for number in (served.ttft, served.tpot, served.throughput))


def test_a_pipeline_shares_out_the_requests_and_adds_up_the_stages() -> None:
    one = replica()
    two = replace(one, stages=one.stages * 2)
    served = serve(two, Workload(1000, 200, 1))
    assert len(served.decode) == 2
    assert served.step == pytest.approx(2 * serve(one, Workload(1000, 200, 1)).step)
