"""The token log: no token twice, none lost, nothing after the end, and nothing forgotten by its file."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import ConfigError
from holdfast.core.request import SamplingParams, TokenLogprobs
from holdfast.core.wire import Submit, TokenOutput
from holdfast.gateway.logfile import LogFile
from holdfast.gateway.tokenlog import Accepted, TokenLog

PARAMS = SamplingParams(seed=0, max_tokens=8)


def accepted(*names: str) -> Accepted:
    return Accepted("cmpl-x", "completions", b"{}", 0, [Submit(name, [1, 2], PARAMS) for name in names])


def add(log: TokenLog, output: TokenOutput) -> TokenOutput | None:
    """What is new in it."""
    return next(iter(log.append([output])), None)


def open_log() -> TokenLog:
    log = TokenLog()
    log.open(accepted("r"))
    return log


def output(start: int, *token_ids: int, **fields: object) -> TokenOutput:
    return TokenOutput("r", start, list(token_ids), **fields)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_repeats_are_dropped_and_gaps_end_the_request(windows: list[tuple[int, int]]) -> None:
    """Whatever stretches of 0, 1, 2 … arrive, the log and what it lets through are 0, 1, 2 … once each."""
    log, passed = open_log(), []
    for start, count in windows:
        end = len(log["r"].token_ids)
        if start > end:
            gap = add(log, output(start, *range(start, start + count)))
            assert gap is not None
            assert gap.finish == "error"
            assert f"starts at token {start}, the log ends at {end}" in str(gap.error)
            break
        elif new := add(log, output(start, *range(start, start + count))):
            assert new.start == end
            passed += new.token_ids
    assert passed == log["r"].token_ids == list(range(len(passed)))


def test_logprobs_stay_with_their_tokens() -> None:
    log = open_log()
    entries = [TokenLogprobs(token_id, -1.0, 1, []) for token_id in (5, 6)]
    add(log, output(0, 5))
    new = add(log, output(0, 5, 6, logprobs=entries))
    assert new is not None
    assert new.token_ids == [6]
    assert new.logprobs == entries[1:]


def test_nothing_follows_the_end() -> None:
    log = open_log()
    end = add(log, output(0, 5, finish="stop"))
    assert end is not None
    assert log["r"].finish == "stop"
    assert add(log, output(1, 6)) is None
    assert add(log, output(0, 5, finish="stop")) is None
    assert log["r"].token_ids == [5]


def test_an_end_without_tokens_passes() -> None:
    log = open_log()
    assert add(log, output(0, finish="error", error="gone")) is not None


def test_unknown_requests_are_ignored_and_closed_ones_forgotten() -> None:
    log = open_log()
    log.forget("r")
    log.forget("r")
    assert len(log) == 0
    assert add(log, output(0, 5)) is None


# --- its file ---

Act = tuple[str, int, int]


def reopened(path: Path, model: str = "m") -> TokenLog:
    return TokenLog(LogFile(path), model)


def state(log: TokenLog) -> dict[str, tuple[object, ...]]:
    """Everything that a log knows of its requests."""
    return {
        entry.submit.request_id: (call, entry.token_ids[:], entry.logprobs, entry.finish, entry.error, entry.is_cut)
        for call in log.calls.values()
        for entry in log.entries_of(call)
    }


@settings(max_examples=60, deadline=None)
@given(
    acts=st.lists(
        st.tuples(st.sampled_from(["open", "add", "end", "cut", "forget"]), st.integers(0, 3), st.integers(0, 3))
    ),
    least=st.sampled_from([0, 200, TokenLog.LEAST_BYTES]),
    lost=st.integers(0, 60),
)
def test_the_next_one_knows_what_the_file_says(
    tmp_path_factory: pytest.TempPathFactory, acts: list[Act], least: int, lost: int
) -> None:
    """However often the file was begun anew; and with its tail torn off, what it said at some time before."""
    path = tmp_path_factory.mktemp("log") / "tokens.log"
    log = reopened(path)
    log.LEAST_BYTES = least
    states = [state(log)]
    for act, number, choice in acts:
        name, key = f"r{number}.{choice % 2}", f"r{number}.0"
        if act == "open" and key not in log.calls:
            log.open(accepted(key, f"r{number}.1"))
        elif act in {"add", "end"} and key in log.calls:
            fields = {"finish": "length"} if act == "end" else {"logprobs": [TokenLogprobs(7, -0.5, 1, [])]}
            log.append([TokenOutput(name, len(log[name].token_ids), [7], **fields)])
        elif act == "cut":
            log.cut([name])
        elif act == "forget":
            log.forget(key)
        states.append(state(log))
    log.close()
    again = reopened(path)
    assert state(again) == states[-1]
    again.close()
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - lost))
    torn = reopened(path, "m")
    assert set(state(torn)) <= {name for each in states for name in each}
    for name, (_, token_ids, *_rest) in state(torn).items():
        assert any(name in each and each[name][1] == token_ids for each in states)
    torn.close()


def test_a_file_belongs_to_one_service_and_one_model(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tokens.log"
    log = reopened(path, "this")
    with pytest.raises(ConfigError, match="another service writes it"):
        reopened(path)
    log.open(accepted("a"))
    log.close()
    with pytest.raises(ConfigError, match=r"1 unfinished requests of another model or other settings \(this\)"):
        reopened(path, "that")
    again = reopened(path, "this")
    again.forget("a")
    again.close()
    reopened(path, "that").close()


def test_a_file_without_room_does_not_stop_the_log_and_is_made_good(tmp_path: Path) -> None:
    path = tmp_path / "tokens.log"
    log = reopened(path)
    log.RETRY_SECONDS = 0.0
    log.open(accepted("a"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        log.append([TokenOutput("a", 0, list(range(50)))])
        log.open(accepted("b"))
        assert log.failure is not None
        assert "File too large" in log.failure
        assert len(log["a"].token_ids) == 50, "it serves on"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.append([TokenOutput("a", 50, [1])])
    assert log.failure is None
    known = state(log)
    log.close()
    again = reopened(path)
    assert state(again) == known
    assert len(again["a"].token_ids) == 51
    again.close()


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.log"
    file = LogFile(path)
    file.append(b"\x93\xa5Other\x01\x02")
    file.close()
    for _ in range(2):  # and it is let go
        with pytest.raises(ConfigError, match="not a token log that this version can read"):
            reopened(path)
