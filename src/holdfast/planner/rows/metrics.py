"""What a row's metric asks, by the names that people give it, and how its unit counts.

`mean_ttft_ms`, `TTFT (ms)`, `time_to_first_token` are one question. Medians of gaps between tokens and of the time to
first token are questions of their own; of requests that are all alike, the others are the mean. Percentiles
beyond, extremes and deviations are not predicted: they tell of arrivals and lengths that no row gives.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from holdfast.core.errors import ConfigError

TIMES = MappingProxyType({"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9})
SIZES = MappingProxyType({"b": 1.0, "mb": 1e-6, "mib": 2.0**-20, "gb": 1e-9, "gib": 2.0**-30})
COUNTS = MappingProxyType({"tokens": 1.0, "blocks": 1 / 16})
Counted = Literal["output tokens", "prompt tokens", "all tokens", "requests"]

_SPELLINGS = MappingProxyType(
    {"sec": "s", "secs": "s", "second": "s", "seconds": "s", "msec": "ms", "millisecond": "ms", "milliseconds": "ms",
     "µs": "us", "μs": "us", "usec": "us", "microsecond": "us", "microseconds": "us", "nanoseconds": "ns",
     "byte": "b", "bytes": "b", "token": "tokens", "block": "blocks"}
)  # fmt: skip
_SAID_IN_NAME = frozenset({*TIMES, "sec", "seconds", "usec", "gib", "gb"})
_MIDDLES = frozenset({"mean", "avg", "average", "median", "p50", "online", "server"})

_NAMES = tuple(
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"^oom", "out_of_memory"),
        (r"^memory_used", "memory_used"),
        (r"^mem_weights", "weights"),
        (r"^kv_cache_(tokens|blocks|blocks16)$", "kv_tokens"),
        (r"prompt_time_per_layer|prefill_time_per_layer", "prompt_layer"),
        (r"decode_time_per_layer", "decode_layer"),
        (r"decode_throughput", "decode_throughput"),
        (r"throughput|^(output_)?tok(en)?s?(_per)?_s(ec|econd)?|^tps(_|$)|^mlperf_offline_samples$", "throughput"),
        (r"(^|_)ttft(_|$)|time_to_first|first_token_latency", "ttft"),
        (r"(^|_)(tpot|itl|tbt)(_|$)|inter_token|time_per_output|time_between_tokens", "tpot"),
        (r"prefill_latency", "static_prompt"),
        (r"latency_per_token", "static_token"),
        (r"e2e_latency(_ft|_megatron)?$", "static_batch"),
        (r"^(request_|e2e_request_)?latency$|^e2el?$|^(e2e|end_to_end)(_latency|_time)?$", "latency"),
    )
)
_PERCENTILE = re.compile(r"(^|_)p\d\d?(_?\d+)?(_|$)|percentile|(^|_)(tail|std|stddev|worst)(_|$)")
_EXTREME = re.compile(r"(^|_)(min|max)_(ttft|tpot|itl|e2el?|latency)|(ttft|tpot|itl|e2el?|latency)_(min|max)(_|$)")


@dataclass(frozen=True, slots=True)
class Metric:
    """`kind`: as in `answers.KINDS`. `unit`: of TIMES, SIZES or COUNTS; "" where the kind leaves no choice."""

    kind: str
    unit: str
    counted: Counted = "output tokens"
    """By a throughput."""
    shared_by: Literal["all", "device", "user"] = "all"
    """What a throughput is divided by."""


def kind_of(metric: str) -> str | None:
    """The kind of question, by any of the usual names; None: none, or a percentile."""
    words = _plain(metric).split("_")
    plain = [word for word in words if word not in _MIDDLES]
    name = "_".join(plain)
    if _PERCENTILE.search(name) or _EXTREME.search(name):
        return None
    without_unit = "_".join(plain[:-1]) if plain and plain[-1] in _SAID_IN_NAME else name
    found = next((kind for pattern, kind in _NAMES if pattern.search(name) or pattern.search(without_unit)), None)
    # A mean over requests that come and go, where a bare e2e_latency is one batch's.
    return "latency" if found == "static_batch" and len(plain) < len(words) else found


def _of_median(kind: str, name: str) -> str:
    """The question that a median asks, where that is another than the mean's."""
    if re.search(r"(^|_)(median|p50)(_|$)|p50$", name):
        if kind == "ttft":
            return "ttft_median"
        if kind == "tpot" and not re.search(r"tpot|time_per_output", name):
            return "itl_median"
    return kind


def metric_of(metric: str, unit: str) -> Metric:
    """What a metric in a unit asks. Raises `ConfigError` for those that are not predicted, and for a unit that is not
    one of the metric's."""
    name = _plain(metric)
    kind = kind_of(metric)
    if kind is None:
        if _PERCENTILE.search(name.replace("p50", "")) or _EXTREME.search(name):
            raise ConfigError(
                f"metric {metric!r}: means and medians are predicted, no percentiles or extremes: they come of "
                "arrivals and lengths, which a row does not tell"
            )
        raise ConfigError(f"metric {metric!r} is not one the planner predicts" if name else "the row names no metric")
    kind = _of_median(kind, name)
    given = re.sub(r"\s*per\s+", "/", unit.strip().lower()).replace(" ", "")
    if kind == "throughput" or (kind == "tpot" and given.startswith("tok")):
        return _rate(kind, name, unit, given)
    if kind in {"decode_throughput", "out_of_memory"}:
        return Metric(kind, "")
    given = _SPELLINGS.get(given, given)
    if not given:
        given = next((_SPELLINGS.get(word, word) for word in name.split("_")[:0:-1] if word in _SAID_IN_NAME), "")
    if kind == "kv_tokens":
        units, usual = COUNTS, "blocks" if "blocks" in name else "tokens"
    else:
        units, usual = (SIZES, "gb") if kind in {"weights", "memory_used"} else (TIMES, "ms")
    if (given or usual) not in units:
        raise ConfigError(f"unit {unit!r}: {metric} comes in {', '.join(units)}")
    return Metric(kind, given or usual)


def _rate(kind: str, name: str, unit: str, given: str) -> Metric:
    counted: Counted = "output tokens"
    if "request" in name or "sample" in name or re.match(r"(req|sample|quer|prompt)", given):
        counted = "requests"
    elif "total" in name:
        counted = "all tokens"
    elif re.search(r"input|prompt|prefill", name):
        counted = "prompt tokens"
    if given and not re.match(r"(output|total)?(tok|req|sample|quer|prompt)|1/s|tps$|rps$|qps$", given):
        raise ConfigError(f"unit {unit!r}: a throughput comes in tok/s or req/s, all together, /gpu or /user")
    if re.search(r"user", given + name):
        return Metric(kind, "", counted, "user")
    return Metric(kind, "", counted, "device" if re.search(r"/gpu|per_gpu|/device", given + name) else "all")


def factor(metric: Metric) -> float:
    """From seconds, bytes or tokens into the metric's unit."""
    if metric.kind == "memory_used" and metric.unit == "gb":
        return SIZES["gib"]  # what shows the memory in use counts in MiB, and who rounds it says GB
    return {**TIMES, **SIZES, **COUNTS}[metric.unit] if metric.unit else 1.0


def _plain(metric: str) -> str:
    """ "TTFT (ms)" → ttft_ms."""
    return re.sub(r"[^a-z0-9µμ]+", "_", metric.lower()).strip("_")
