"""The predicted time of a step of our own runtime: its arithmetic, on profiles made by hand, where the answer can be
said in advance. How well it meets measured steps, `make bench-planner-runtime` tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from holdfast.core.errors import ConfigError
from holdfast.core.spec import DecoderSpec, LayerSpec, MoeSpec
from holdfast.hardware.profile import Attention, Exchange, Product, Profile, Reading, RowWork, Turn
from holdfast.parallel.cuts import make_plan
from holdfast.planner.measured import Measured, Request, on_line, turn_seconds
from holdfast.planner.memory.runtime_format import RuntimeFormat
from holdfast.planner.runtime_time import PARTS, RuntimeStep, runtime_step

SHARES = ((1, 2), (1, 1), (2, 1))
"""Ranks and threads of a machine with two cores."""
BANDWIDTH = 10e9
"""Of the machine below, in numbers of a matrix per second and thread, up to 16 rows; beyond, its arithmetic."""
TURN, ROW = 1e-3, 1e-5

SPEC = DecoderSpec(
    family="llama",
    vocab_size=4096,
    hidden_size=512,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    mlp_size=1024,
    max_positions=2048,
    layers=(LayerSpec(),) * 4,
    attention_scale=0.125,
)
NUMBERS = 4 * (512 * (512 + 2 * 256) + 512 * 512 + 3 * 512 * 1024) + 512 * 4096


def machine(**changed: Any) -> Profile:
    """Two cores of the same rates whoever else works; nothing costs anything but products and turns."""
    products, attentions, works = [], [], []
    for ranks, threads in SHARES:
        share = {"ranks": ranks, "threads": threads}
        for rows in (1, 16, 64):
            for size in (64, 512, 4096):
                seconds = size * size / BANDWIDTH / threads * max(1, rows / 16)
                how = {"format": "bfloat16", "rows": rows, "inputs": size, "outputs": size}
                products.append(Product(**share, **how, cached=size == 64, seconds=seconds))
        for operation in ("norm", "store_kv", "argmax"):
            works += [RowWork(**share, operation=operation, rows=r, width=512, seconds=1e-12) for r in (1, 64)]
        for heads in (4, 1):
            for requests, queries, context in ((8, 1, 64), (8, 1, 1024), (1, 256, 256), (1, 256, 2048)):
                units = (
                    requests * 4
                    if queries == 1
                    else 4 * sum(-(-(context - 256 + q) // 64) for q in range(16, 257, 16))
                )
                seconds = units * (context / 64 if queries == 1 else 16) * heads * ROW / threads
                shape = {"requests": requests, "queries": queries, "context": context}
                sizes = {"num_heads": 4 * heads, "num_kv_heads": 4, "head_dim": 64}
                attentions.append(Attention(**share, dtype="bfloat16", **shape, **sizes, seconds=seconds))
    exchanges = [
        Exchange(ranks=2, threads=1, operation=operation, num_bytes=size, seconds=1e-12)
        for operation in ("all_reduce", "all_gather", "send")
        for size in (1000, 1000000)
    ]
    turns = [
        Turn(ranks=ranks, threads=2 // ranks, stages=stages, requests=requests, tokens=tokens, seconds=TURN)
        for ranks, stages in ((1, 1), (2, 1), (2, 2))
        for requests, tokens in ((1, 1), (64, 1), (1, 512))
    ]
    profile = Profile(
        machine="made up",
        processor="none",
        kernels="cpu-none",
        cores=2,
        memory_bytes=10**10,
        holdfast="0",
        measured_at="2026-01-01T00:00:00+00:00",
        load=0.0,
        readings=(Reading(ranks=1, threads=2, seconds=1.0, num_bytes=10**10),),
        products=tuple(products),
        attentions=tuple(attentions),
        exchanges=tuple(exchanges),
        row_works=tuple(works),
        turns=tuple(turns),
    )
    return msgspec.structs.replace(profile, **changed)


def step(
    requests: Sequence[Request], profile: Profile | None = None, spec: DecoderSpec = SPEC, **cut: Any
) -> RuntimeStep:
    return runtime_step(profile or machine(), spec, make_plan(spec, **cut), RuntimeFormat(), requests)


def free_attention() -> Profile:
    points = machine().attentions
    return machine(attentions=tuple(msgspec.structs.replace(point, seconds=1e-12) for point in points))


def test_lines_go_through_points_and_beyond():
    points = [(1.0, 10.0), (3.0, 20.0), (5.0, 40.0)]
    assert [on_line(points, x) for x in (1, 2, 4, 6)] == [10, 15, 30, 50]
    assert on_line(points, -100) == 0
    assert on_line([(7.0, 3.0)], 1) == 3


def test_a_decode_reads_every_weight_once():
    found = step([Request(1, 64)], free_attention())
    assert found.products == pytest.approx(NUMBERS / BANDWIDTH / 2, rel=1e-6)
    assert found.total == pytest.approx(found.products + TURN, rel=1e-5)
    assert found.total == pytest.approx(sum(getattr(found, part) for part in PARTS))


def test_many_rows_are_a_matter_of_arithmetic_but_for_the_head():
    found = step([Request(64, 64)], free_attention())
    layers = NUMBERS - 512 * 4096
    assert found.products == pytest.approx((4 * layers + 512 * 4096) / BANDWIDTH / 2, rel=1e-6)


def test_two_ranks_with_a_thread_each_share_out_the_products():
    assert step([Request(1, 64)], free_attention(), tensor=2).products == pytest.approx(
        NUMBERS / BANDWIDTH / 2, rel=1e-6
    )


def test_a_lone_request_passes_through_all_stages_and_many_keep_them_busy():
    one = step([Request(1, 64)], free_attention(), pipeline=2)
    assert one.products == pytest.approx(NUMBERS / BANDWIDTH, rel=1e-6)  # a thread at a time
    assert one.waiting == 0
    eight = step([Request(1, 64)] * 8, free_attention(), pipeline=2)
    slowest = (NUMBERS - 512 * 4096) / 2 + 512 * 4096
    assert eight.products + eight.waiting == pytest.approx(2 * slowest / BANDWIDTH, rel=1e-6)


def test_more_ranks_than_cores_share_them():
    found = step([Request(1, 64)] * 8, free_attention(), tensor=2, pipeline=2)
    assert found.products + found.waiting == pytest.approx(2 * NUMBERS / BANDWIDTH / 2, rel=1e-6)


def test_attention_grows_with_keys_and_with_the_heads_that_share_them():
    """Two query heads of each KV head: a thread has two of the four, for each tile of keys."""
    short, long = (step([Request(1, context)]).attention for context in (256, 1024))
    assert short == pytest.approx(4 * 4 * 4 * 2 * ROW / 2, rel=1e-3)
    assert long == pytest.approx(4 * short, rel=1e-3)
    assert step([Request(1, 256)], tensor=2).attention == pytest.approx(short, rel=1e-3)


def test_a_prompt_walks_the_keys_that_each_tile_of_tokens_sees():
    tiles = sum(-(-end // 64) for end in range(16, 513, 16))
    assert step([Request(512, 512)]).attention == pytest.approx(4 * 4 * tiles * 16 * 2 * ROW / 2, rel=1e-3)


def test_experts_that_nobody_chose_are_not_read():
    moe = MoeSpec(num_experts=8, experts_per_token=2, expert_mlp_size=1024)
    spec = msgspec.structs.replace(SPEC, moe=moe, layers=(LayerSpec(moe=True),) * 4)
    one, many = (step([Request(1, 64)] * count, free_attention(), spec).products for count in (1, 64))
    dense = NUMBERS + 4 * 512 * 8 - 4 * 3 * 512 * 1024
    assert one == pytest.approx((dense + 4 * 2 * 3 * 512 * 1024) / BANDWIDTH / 2, rel=1e-6)
    assert many == pytest.approx((4 * dense + 4 * 8 * 3 * 512 * 1024) / BANDWIDTH / 2, rel=1e-6)


def test_exchanges_are_two_a_layer_one_of_the_embeddings_and_the_logits():
    exchanges = [msgspec.structs.replace(point, seconds=2e-6) for point in machine().exchanges]
    found = step([Request(1, 64)], machine(exchanges=tuple(exchanges)), tensor=2)
    assert found.exchanges == pytest.approx((2 * 4 + 1 + 1) * 2e-6)
    assert step([Request(1, 64)], machine(exchanges=tuple(exchanges)), pipeline=2).exchanges == pytest.approx(2e-6)


def test_turns_are_looked_up_by_requests_and_by_tokens_of_prompts():
    turns = [
        Turn(ranks=1, threads=2, stages=1, requests=requests, tokens=tokens, seconds=seconds)
        for requests, tokens, seconds in ((1, 1, 1.0), (5, 1, 2.0), (1, 101, 3.0))
    ]
    profile = machine(turns=tuple(turns))

    def of(*requests: Request) -> float:
        return turn_seconds(profile, 1, 1, requests)

    assert of(*[Request(1, 9)] * 3) == pytest.approx(1.5)
    assert of(Request(51, 51)) == pytest.approx(2.0)
    assert of(Request(1, 9), Request(51, 51)) == pytest.approx(2.0)


def test_a_turn_costs_more_when_weights_have_filled_the_caches():
    """As much as the cold model's step took beyond its arithmetic and the turn of an empty model."""
    plain = free_attention()
    arithmetic = step([Request(1, 64)], plain).products
    cold = Turn(ranks=1, threads=2, stages=1, requests=1, tokens=1, cold=True, seconds=arithmetic + TURN + 5e-4)
    profile = msgspec.structs.replace(plain, turns=(*plain.turns, cold), cold_model=SPEC)
    assert step([Request(1, 64)] * 8, profile).turn == pytest.approx(TURN + 5e-4, rel=1e-4)
    assert step([Request(1, 64)], profile, tensor=2).turn == pytest.approx(TURN)  # nothing is known of two ranks
    early = msgspec.structs.replace(cold, seconds=arithmetic)
    profile = msgspec.structs.replace(profile, turns=(*plain.turns, early))
    assert step([Request(1, 64)], profile).turn == pytest.approx(TURN)  # noise saves nobody time


def test_row_work_is_of_the_busiest_thread():
    works = [
        RowWork(ranks=1, threads=2, operation="norm", rows=rows, width=100, seconds=seconds)
        for rows, seconds in ((1, 3e-6), (64, 34e-6))
    ]
    measured = Measured(machine(row_works=tuple(works)), 1, 2)
    assert measured.row_work("norm", 8, 100) == pytest.approx(2e-6 + 4e-6)
    assert measured.row_work("norm", 8, 200) == pytest.approx(2e-6 + 8e-6)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"products": ()}, "no products of bfloat16 of 1 ranks with 2 threads each"),
        ({"attentions": ()}, "no attention"),
        ({"row_works": ()}, "no work on rows"),
        ({"turns": ()}, "no steps"),
    ],
)
def test_what_was_not_measured_is_said(changed: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        step([Request(1, 64)], machine(**changed))


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no requests"):
        step([])
    with pytest.raises(ConfigError, match="2 replicas"):
        step([Request(1, 64)], data=2)
    for how in (RuntimeFormat(itemsize=4), RuntimeFormat(activation_bits=8)):
        with pytest.raises(ConfigError, match="bfloat16 and with 16-bit"):
            runtime_step(machine(), SPEC, make_plan(SPEC), how, [Request(1, 64)])
    alone = [point for point in machine().exchanges if point.operation == "send"]
    with pytest.raises(ConfigError, match="no all_reduce of 2 ranks"):
        step([Request(1, 64)], machine(exchanges=tuple(alone)), tensor=2)


def test_what_lies_outside_a_window_is_not_read():
    spec = msgspec.structs.replace(SPEC, layers=(LayerSpec(window=255),) * 4)
    assert step([Request(1, 1024)], spec=spec).attention == pytest.approx(step([Request(1, 256)]).attention)
