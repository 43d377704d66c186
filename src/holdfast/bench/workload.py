"""What is sent and when: made prompts, files of prompts, traces. Pure: a seed gives the same requests anywhere."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from holdfast.bench.config import BenchConfig
from holdfast.core.errors import ConfigError

Prompt = str | list[int] | list[dict[str, Any]]
"""A text, token ids, or chat messages."""

TRACE_BLOCK = 512
"""Tokens that one hash id of a Mooncake trace stands for (Qin et al., FAST'25, section 3)."""


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request before it is sent. Prompts that are made (`given` is None) are made when it is their turn: a
    trace can ask for more tokens than fit in memory at once."""

    index: int
    input_len: int | None
    """Tokens of the prompt; None for a given prompt, whose length only the server knows."""
    output_len: int
    arrival: float = 0.0
    """Seconds after the start."""
    given: Prompt | None = None
    block_ids: tuple[int, ...] = ()
    """Equal ids stand for equal blocks of `TRACE_BLOCK` tokens; empty: the prompt shares nothing."""


def plan_requests(config: BenchConfig) -> list[PlannedRequest]:
    """The requests in order of arrival. Raises `ConfigError` for a file that cannot be read, naming the line."""
    wanted = config.requests
    if wanted.dataset_name == "random":
        planned = [
            PlannedRequest(index, wanted.random_input_len, wanted.random_output_len)
            for index in range(wanted.num_prompts)
        ]
    else:
        assert wanted.dataset_path is not None
        planned = _read_file(config, Path(wanted.dataset_path))
    rate = config.load.request_rate
    if rate is None and wanted.dataset_name in ("azure", "mooncake"):
        first = planned[0].arrival
        arrivals = [(request.arrival - first) / config.load.trace_speedup for request in planned]
    else:
        arrivals = gamma_arrivals(len(planned), rate or math.inf, config.load.burstiness, wanted.seed)
    return [replace(request, arrival=arrival) for request, arrival in zip(planned, arrivals, strict=True)]


def gamma_arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which `count` requests are sent, the first at 0; gaps are gamma with mean 1 / rate and shape
    `burstiness` (1: exponential gaps, a Poisson process)."""
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng([seed, 0]).gamma(burstiness, 1 / (rate * burstiness), count)
    return [0.0, *np.cumsum(gaps[:-1]).tolist()] if count else []


class PromptMaker:
    """Makes prompts of a given length from a pool of units: token ids, or words."""

    def __init__(self, pool: Sequence[int] | Sequence[str], seed: int) -> None:
        assert pool
        self._pool = pool
        self._seed = seed

    def make(self, request: PlannedRequest) -> str | list[int]:
        """`input_len` units: token ids as a list, words as one text. Requests that name a block id share its
        units; everything else is drawn by index and shares nothing."""
        assert request.input_len is not None
        if request.block_ids:
            units = [unit for block in request.block_ids for unit in self._draw(2, block, TRACE_BLOCK)]
            units = units[: request.input_len]
        else:
            units = self._draw(1, request.index, request.input_len)
        return " ".join(units) if isinstance(self._pool[0], str) else units

    def _draw(self, kind: int, number: int, count: int) -> list[Any]:
        rng = np.random.default_rng([self._seed, kind, number])
        return [self._pool[i] for i in rng.integers(len(self._pool), size=count).tolist()]


def _read_file(config: BenchConfig, path: Path) -> list[PlannedRequest]:
    wanted = config.requests
    readers: dict[str, Callable[[Path, BenchConfig], Iterator[PlannedRequest]]] = {
        "prompts": _read_prompts,
        "azure": _read_azure,
        "mooncake": _read_mooncake,
    }
    planned: list[PlannedRequest] = []
    try:
        for request in readers[wanted.dataset_name](path, config):
            tokens = (request.input_len or 0) + request.output_len
            if wanted.max_request_len is None or tokens <= wanted.max_request_len:
                planned.append(request)
            if len(planned) == wanted.limit:
                break
    except OSError as error:
        raise ConfigError(f"--dataset-path {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--dataset-path {path}: not UTF-8 text") from error
    except csv.Error as error:
        raise ConfigError(f"--dataset-path {path}: not CSV: {error}") from error
    if not planned:
        raise ConfigError(f"--dataset-path {path}: no request in it (or none within --max-request-len)")
    return sorted(planned, key=lambda request: request.arrival)


def _read_azure(path: Path, config: BenchConfig) -> Iterator[PlannedRequest]:
    """Azure LLM inference traces: TIMESTAMP,ContextTokens,GeneratedTokens."""
    with path.open(newline="", encoding="utf-8") as file:
        for index, row in enumerate(csv.DictReader(file)):
            try:
                arrival = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
                input_len, output_len = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, ValueError, TypeError, OverflowError) as error:
                raise _bad_line(path, index + 2, "TIMESTAMP,ContextTokens,GeneratedTokens") from error
            yield PlannedRequest(index, max(1, input_len), max(1, output_len), arrival)


def _read_mooncake(path: Path, config: BenchConfig) -> Iterator[PlannedRequest]:
    """Mooncake traces: one JSON object per line, timestamp in ms, one hash id per started block of 512 tokens."""
    row_type = msgspec.defstruct(
        "Row", [("timestamp", float), ("input_length", int), ("output_length", int), ("hash_ids", tuple[int, ...])]
    )
    for index, line in _lines(path):
        try:
            row: Any = msgspec.json.decode(line, type=row_type)
        except (msgspec.DecodeError, RecursionError) as error:
            wanted = "JSON with timestamp, input_length, output_length, hash_ids"
            raise _bad_line(path, index + 1, wanted) from error
        if len(row.hash_ids) * TRACE_BLOCK < row.input_length or min(row.hash_ids, default=0) < 0:
            raise _bad_line(path, index + 1, f"a hash id, at least 0, per {TRACE_BLOCK} tokens of input_length")
        yield PlannedRequest(
            index,
            max(1, row.input_length),
            max(1, row.output_length),
            arrival=row.timestamp / 1000,
            block_ids=row.hash_ids,
        )


def _read_prompts(path: Path, config: BenchConfig) -> Iterator[PlannedRequest]:
    """A prompt per line: plain text, or JSON with `prompt`, `messages` or `turns` (the first is taken)."""
    chat = config.target.endpoint == "chat"
    for index, line in _lines(path):
        prompt: Any = line
        output_len: Any = config.requests.random_output_len
        if line.startswith("{"):
            try:
                row: dict[str, Any] = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, RecursionError) as error:
                raise _bad_line(path, index + 1, "text or JSON") from error
            output_len = row.get("output_len", output_len)
            turns = row.get("turns")
            first = turns[0] if isinstance(turns, list) and turns else None
            prompt = row.get("prompt") or row.get("messages") or first
        if isinstance(prompt, str) and chat:
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, list if chat else str) or not isinstance(output_len, int) or output_len < 1:
            raise _bad_line(path, index + 1, "text or JSON with prompt, turns or (for chat) messages, and output_len")
        yield PlannedRequest(index, None, output_len, given=prompt)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their index."""
    with path.open(encoding="utf-8") as file:
        for index, line in enumerate(file):
            if stripped := line.strip():
                yield index, stripped


def _bad_line(path: Path, number: int, wanted: str) -> ConfigError:
    return ConfigError(f"--dataset-path {path}, line {number}: must be {wanted}")
