"""Metrics by the names that people give them."""

from __future__ import annotations

import pytest

from holdfast.core.errors import ConfigError
from holdfast.planner.rows.answers import KINDS
from holdfast.planner.rows.metrics import factor, kind_of, metric_of


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ("tpot|TPOT|mean_tpot_ms|TPOT (ms)|itl_mean|median_itl_ms|inter-token latency|time_per_output_token", "tpot"),
        ("ttft|TTFT|mean_ttft_ms|ttft_median|time_to_first_token|Time to First Token (s)|ttft_p50", "ttft"),
        ("e2e_mean|latency_mean|mean_e2el_ms|e2e|avg_latency|end_to_end_latency|e2e_latency_mean", "latency"),
        (
            "output_throughput|max_load_output_throughput|request_throughput|Throughput|tokens/s|tok_per_s",
            "throughput",
        ),
        ("e2e_latency|e2e_latency_FT|e2e_latency_Megatron", "static_batch"),
        ("prompt_time_per_layer", "prompt_layer"),
        ("decode_time_per_layer", "decode_layer"),
        ("decode_throughput", "decode_throughput"),
        ("latency_per_token_avg|decode_latency_per_token", "static_token"),
        ("memory_used", "memory_used"),
        ("mem_weights", "weights"),
        ("kv_cache_tokens|kv_cache_blocks16", "kv_tokens"),
        ("oom_FT", "out_of_memory"),
    ],
)
def test_names(names: str, kind: str) -> None:
    assert kind in KINDS
    assert {name: kind_of(name) for name in names.split("|")} == dict.fromkeys(names.split("|"), kind)


@pytest.mark.parametrize(
    "name",
    ["ttft_p90", "p99_ttft_ms", "e2e_p99", "tpot_p99.9", "P95 TPOT", "itl_percentile", "max_ttft", "std_tpot_ms"],
)
def test_percentiles_and_extremes_are_refused_as_such(name: str) -> None:
    assert kind_of(name) is None
    with pytest.raises(ConfigError, match=r"means and medians are predicted|is not one the planner predicts"):
        metric_of(name, "ms")


@pytest.mark.parametrize("name", ["", "accuracy", "train_iter_full_recompute", "8", "p", "_"])
def test_what_nobody_can_predict_from_a_row_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"is not one the planner predicts|names no metric"):
        metric_of(name, "ms")


@pytest.mark.parametrize(
    ("metric", "unit", "times"),
    [
        ("ttft", "ms", 1e3),
        ("ttft", "", 1e3),
        ("ttft", "s", 1),
        ("ttft", "Seconds", 1),
        ("ttft_s", "", 1),
        ("mean_ttft_us", "", 1e6),
        ("ttft_s", "ms", 1e3),
        ("tpot", "µs", 1e6),
        ("mem_weights", "GiB", 2**-30),
        ("mem_weights", "GB", 1e-9),
        ("memory_used", "GB", 2**-30),
        ("kv_cache_tokens", "", 1),
        ("kv_cache_blocks16", "", 1 / 16),
        ("output_throughput", "tok/s", 1),
    ],
)
def test_units(metric: str, unit: str, times: float) -> None:
    assert factor(metric_of(metric, unit)) == times


@pytest.mark.parametrize(
    ("metric", "unit", "counted", "shared_by"),
    [
        ("output_throughput", "tok/s", "output tokens", "all"),
        ("request_throughput", "req/s", "requests", "all"),
        ("throughput", "requests per second", "requests", "all"),
        ("total_token_throughput", "tokens/s", "all tokens", "all"),
        ("prompt_throughput", "tok/s", "prompt tokens", "all"),
        ("throughput", "tok/s/GPU", "output tokens", "device"),
        ("tokens_per_second_per_gpu", "", "output tokens", "device"),
        ("throughput", "tokens/s/user", "output tokens", "user"),
    ],
)
def test_what_a_throughput_counts(metric: str, unit: str, counted: str, shared_by: str) -> None:
    asked = metric_of(metric, unit)
    assert (asked.kind, asked.counted, asked.shared_by) == ("throughput", counted, shared_by)


@pytest.mark.parametrize(
    ("metric", "unit"), [("ttft", "furlongs"), ("ttft", "GB"), ("throughput", "ms"), ("memory_used", "ms")]
)
def test_a_unit_that_is_none_of_the_metrics_is_refused_by_name(metric: str, unit: str) -> None:
    with pytest.raises(ConfigError, match=f"unit '{unit}'"):
        metric_of(metric, unit)
