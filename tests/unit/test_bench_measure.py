"""The arithmetic of `holdfast bench`, against numbers worked out by hand."""

from __future__ import annotations

import pytest

from holdfast.bench.measure import Outcome, distribution, summarize, throughput_over_time


def outcome(index: int = 0, **fields: object) -> Outcome:
    """100 ms to the first of 5 tokens, then 50 ms each: 300 ms in all."""
    values: dict[str, object] = {
        "arrival": 0.0,
        "asked_tokens": 5,
        "started": 0.0,
        "ttft": 0.1,
        "e2el": 0.3,
        "chunk_gaps": [0.05] * 4,
        "input_tokens": 7,
        "output_tokens": 5,
        "finish_reason": "length",
    }
    return Outcome(index=index, **(values | fields))  # type: ignore[arg-type]


def test_tpot_is_the_time_after_the_first_token_over_the_other_tokens() -> None:
    assert outcome().tpot == pytest.approx(0.05)


def test_tpot_counts_tokens_not_chunks() -> None:
    two_chunks = outcome(chunk_gaps=[0.2])
    assert two_chunks.num_chunks == 2
    assert two_chunks.tpot == pytest.approx(0.05)


@pytest.mark.parametrize("fields", [{"output_tokens": 1, "chunk_gaps": []}, {"ttft": None, "chunk_gaps": []}])
def test_no_tpot_without_a_second_token(fields: dict[str, object]) -> None:
    assert outcome(**fields).tpot is None


def test_percentiles_are_linear_between_the_closest_ranks() -> None:
    found = distribution([4.0, 1.0, 3.0, 2.0], [0, 50, 90, 99, 100])
    assert found is not None
    assert found.count == 4
    assert found.mean == 2.5
    assert found.percentiles == pytest.approx({0: 1.0, 50: 2.5, 90: 3.7, 99: 3.97, 100: 4.0})


def test_one_value_is_all_its_percentiles() -> None:
    found = distribution([0.25], [50, 99])
    assert found is not None
    assert found.percentiles == {50: 0.25, 99: 0.25}


def test_nothing_has_no_distribution() -> None:
    assert distribution([], [50]) is None


@pytest.mark.parametrize(
    ("limits", "within"),
    [
        ({"ttft": 0.1, "tpot": 0.051, "e2el": 0.3}, True),
        ({"ttft": 0.099}, False),
        ({"tpot": 0.049}, False),
        ({"e2el": 0.299}, False),
        ({}, True),
    ],
)
def test_limits(limits: dict[str, float], within: bool) -> None:
    assert outcome().within(limits) is within


def test_a_failed_request_keeps_no_limit() -> None:
    assert not outcome(error="HTTP 500").within({"e2el": 10.0})


def test_a_single_token_keeps_any_limit_on_tpot_and_no_text_none_on_ttft() -> None:
    assert outcome(output_tokens=1, chunk_gaps=[]).within({"tpot": 1e-9})
    assert not outcome(ttft=None, chunk_gaps=[]).within({"ttft": 10.0})


def test_summary() -> None:
    outcomes = [
        outcome(0),
        outcome(1, started=0.5, ttft=0.3, e2el=0.5, chunk_gaps=[0.2], output_tokens=3, asked_tokens=5),
        outcome(2, ttft=None, chunk_gaps=[], output_tokens=0, error="HTTP 500: no"),
        outcome(3, ttft=None, chunk_gaps=[], output_tokens=0, error="HTTP 500: no"),
        outcome(4, ttft=0.1, chunk_gaps=[], output_tokens=0, error="the stream ended early"),
    ]
    summary = summarize(outcomes, 2.0, planned=7, limits={"ttft": 0.2}, percentiles=[50, 99])
    assert (summary.ok, summary.failed, summary.unfinished, summary.short) == (2, 3, 2, 1)
    assert list(summary.errors.items()) == [("HTTP 500: no", 2), ("the stream ended early", 1)]
    assert (summary.input_tokens, summary.output_tokens) == (14, 8)
    assert (summary.request_rate, summary.input_rate, summary.output_rate) == (1.0, 7.0, 4.0)
    assert (summary.good, summary.goodput) == (1, 0.5)
    assert summary.tokens_per_chunk == pytest.approx(8 / 7)
    means = {name: found.mean for name, found in summary.latencies.items() if found is not None}
    assert means == pytest.approx({"ttft": 0.2, "tpot": 0.075, "itl": 0.08, "e2el": 0.4})
    assert summary.latencies["itl"].count == 5  # type: ignore[union-attr]
    assert summary.lateness is None, "all were to be sent at once"


def test_lateness_is_the_time_between_the_planned_and_the_real_sending() -> None:
    outcomes = [outcome(0), outcome(1, arrival=1.0, started=1.5)]
    found = summarize(outcomes, 2.0, planned=2, limits={}, percentiles=[50]).lateness
    assert found is not None
    assert found.mean == 0.25


def test_summary_of_nothing() -> None:
    summary = summarize([], 0.0, planned=3, limits={}, percentiles=[50])
    assert (summary.ok, summary.failed, summary.unfinished, summary.output_rate) == (0, 0, 3, 0.0)
    assert set(summary.latencies.values()) == {None}
    assert summary.goodput is None


def test_throughput_over_time_counts_tokens_when_they_came() -> None:
    one = outcome(started=0.0, ttft=0.5, chunk_gaps=[1.0, 1.0], output_tokens=6)  # 2 tokens at 0.5, 1.5, 2.5 s
    other = outcome(started=1.0, ttft=0.25, chunk_gaps=[], output_tokens=1)  # 1 token at 1.25 s
    assert throughput_over_time([one, other], 1.0) == pytest.approx([2.0, 3.0, 2.0])
    assert throughput_over_time([one, other], 0.5) == pytest.approx([0.0, 4.0, 2.0, 4.0, 0.0, 4.0])


def test_throughput_over_time_of_nothing() -> None:
    assert throughput_over_time([outcome(ttft=None, chunk_gaps=[])], 1.0) == []


def test_the_record_of_a_request_has_milliseconds() -> None:
    record = outcome(arrival=0.25, started=0.5).record()
    assert (record["arrival_s"], record["started_s"]) == (0.25, 0.5)
    assert (record["ttft_ms"], record["tpot_ms"], record["e2el_ms"]) == (100.0, 50.0, 300.0)
    assert record["itl_ms"] == [50.0] * 4
