"""The token log: no token twice, none lost, nothing after the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.errors import TokenLogGap
from holdfast.core.request import SamplingParams, TokenLogprobs
from holdfast.core.wire import TokenOutput
from holdfast.gateway.tokenlog import TokenLog

PARAMS = SamplingParams(seed=0, max_tokens=8)


def open_log() -> TokenLog:
    log = TokenLog()
    log.open("r", [1, 2], PARAMS)
    return log


def output(start: int, *token_ids: int, **fields: object) -> TokenOutput:
    return TokenOutput("r", start, list(token_ids), **fields)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_repeats_are_dropped_and_gaps_raise(windows: list[tuple[int, int]]) -> None:
    """Whatever stretches of 0, 1, 2 … arrive, the log and what it lets through are 0, 1, 2 … once each."""
    log, passed = open_log(), []
    for start, count in windows:
        end = len(log["r"].token_ids)
        if start > end:
            with pytest.raises(TokenLogGap, match=f"starts at token {start}, the log ends at {end}"):
                log.append(output(start, *range(start, start + count)))
        elif new := log.append(output(start, *range(start, start + count))):
            assert new.start == end
            passed += new.token_ids
    assert passed == log["r"].token_ids == list(range(len(passed)))


def test_logprobs_stay_with_their_tokens() -> None:
    log = open_log()
    entries = [TokenLogprobs(token_id, -1.0, 1, []) for token_id in (5, 6)]
    log.append(output(0, 5))
    new = log.append(output(0, 5, 6, logprobs=entries))
    assert new is not None
    assert new.token_ids == [6]
    assert new.logprobs == entries[1:]


def test_nothing_follows_the_end() -> None:
    log = open_log()
    end = log.append(output(0, 5, finish="stop"))
    assert end is not None
    assert log["r"].finish == "stop"
    assert log.append(output(1, 6)) is None
    assert log.append(output(0, 5, finish="stop")) is None
    assert log["r"].token_ids == [5]


def test_an_end_without_tokens_passes() -> None:
    log = open_log()
    assert log.append(output(0, finish="error", error="gone")) is not None


def test_unknown_requests_are_ignored_and_closed_ones_forgotten() -> None:
    log = open_log()
    log.close("r")
    log.close("r")
    assert len(log) == 0
    assert log.append(output(0, 5)) is None
