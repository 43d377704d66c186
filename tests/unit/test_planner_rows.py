"""Single rows of measurements: predicted as far as they go, and a note where they do not; never an exception."""

from __future__ import annotations

import itertools
import json
import math
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from holdfast.core.errors import ConfigError
from holdfast.planner.rows.metrics import kind_of
from holdfast.planner.rows.predict import Prediction, predict
from holdfast.planner.rows.questions import Row, collective_of, operation_of, plain_row, serving_of
from support.data import data

SERVING = {
    "source": "ours, vLLM 0.11",
    "model": "Llama-3.1-8B",
    "gpu": "H100",
    "n_gpus": "1",
    "tp": "1",
    "pp": "1",
    "dtype": "bf16",
    "batch": "8",
    "input_len": "1000",
    "output_len": "200",
    "metric": "tpot",
    "value": "8",
    "unit": "ms",
}
COLLECTIVE = {
    "source": "nccl-tests",
    "gpu": "H100",
    "n_gpus": "8",
    "n_nodes": "1",
    "op": "all_reduce",
    "dtype": "half",
    "message_bytes": "1048576",
    "latency_us": "40",
    "busbw_GBps": "45",
}


def serving(**changes: object) -> Prediction:
    return predict({**SERVING, "n_gpus": "", **changes})


def value(**changes: object) -> float:
    answer = serving(**changes)
    assert answer.value is not None, answer.note
    assert math.isfinite(answer.value)
    assert answer.low is not None
    assert answer.high is not None
    assert answer.low <= answer.value <= answer.high
    return answer.value


# -- anything at all -------------------------------------------------------------------------------------------------

_ODD = """nan inf -1 0 -0 1e308 1e999 99999999999999999999 1.5 8 3 64 1000000 TP8 8xH100 H100 MI300X x + / .. ~
config.json fp8 int3 awq ttft ttft_(ms) p99 tok/s/gpu req/s GB/s s GiB request_throughput nccl_all_reduce@1e9B nccl_x@
nccl_all_reduce@99999999999999999999GiB alltoall broadcast DeepSeek-V3 Falcon-7B gemma-3-4b kv_cache_tokens oom ８
Qwen2.5-72B-Instruct-GPTQ-Int4 memory_used sharegpt max"""
ODD = st.sampled_from(["", "\0", *_ODD.split()])
CELL = st.one_of(
    ODD, st.text(max_size=30), st.text(min_size=300, max_size=400), st.none(), st.integers(), st.floats()
)
COLUMNS = st.sampled_from([*SERVING, *COLLECTIVE, "ep"])


@settings(max_examples=250, deadline=None)
@given(
    st.sampled_from([SERVING, COLLECTIVE, {}]),
    st.dictionaries(COLUMNS, CELL, max_size=6),
    st.sets(COLUMNS, max_size=2),
)
@example(SERVING, {"model": "a" * 4000 + ".json"}, set())
@example(SERVING, {"model": "\0.json"}, set())
@example(SERVING, {"input_len": "1e308", "batch": "1e308"}, set())
@example(COLLECTIVE, {"message_bytes": "1e308"}, set())
def test_no_row_raises_and_every_row_has_a_value_or_a_note(whole, changed, missing) -> None:
    row = {name: cell for name, cell in {**whole, **changed}.items() if name not in missing}
    answer = predict(row)
    if answer.value is None:
        assert answer.note
        assert "\n" not in answer.note.strip()
    else:
        assert math.isfinite(answer.value)
        assert answer.value >= 0
        assert answer.kind


@pytest.mark.parametrize(
    "changed",
    [{}, {"model": "no such model"}, {"gpu": "Gaudi 2"}, {"model": "m" * 290}, {"gpu": "g" * 290}, {"batch": "97"}],
    ids=lambda changed: "-".join(changed) or "plain",
)
def test_a_row_takes_less_than_5_ms(changed) -> None:
    """Of this process's own time, the first row aside, which reads what is known."""
    row = {**SERVING, **changed}
    predict(row)
    began = time.process_time()
    for batch in range(20):
        predict({**row, "input_len": str(1000 + batch)})
    assert (time.process_time() - began) / 20 < 5e-3


# -- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": "ttft_p90"}, "metric 'ttft_p90': means and medians are predicted, no percentiles"),
        ({"metric": "e2e_p99"}, "no percentiles"),
        ({"metric": ""}, "the row names no metric"),
        ({"metric": "joules"}, "metric 'joules' is not one the planner predicts"),
        ({"unit": "parsec"}, "unit 'parsec': tpot comes in s, ms, us, ns"),
        ({"model": ""}, "the row names no model"),
        ({"model": "13B"}, "a size alone"),
        ({"model": "Lama-3.1-8B"}, "near: .*Llama-3.1-8B"),
        ({"gpu": ""}, "the row names no gpu"),
        ({"gpu": "Gaudi 2"}, "GPU 'Gaudi 2' is not known"),
        ({"gpu": "RTX5090+RTX3090Ti"}, "several types"),
        ({"gpu": "8xH100", "n_gpus": "4"}, "n_gpus 4: gpu '8xH100' says 8"),
        ({"batch": ""}, "gives no number for batch"),
        ({"input_len": "sharegpt", "output_len": "sharegpt"}, "gives no number for input_len, output_len"),
        (
            {"batch": "", "metric": "e2e_mean", "input_len": "general", "output_len": "general"},
            "batch, input_len, out",
        ),
        ({"batch": "1e12"}, r"batch 1e12: must be from 0 to 1e\+06"),
        ({"input_len": "-5"}, "input_len -5: must be from 0"),
        ({"tp": "64"}, "tp 64: the model has 32 heads"),
        ({"tp": "0"}, "tp 0"),
        ({"tp": "2.5"}, "tp 2.5: not a whole number"),
        ({"tp": "TP8"}, "tp 'TP8': not a number"),
        ({"pp": "33"}, "pp 33: the model has 32 layers"),
        ({"tp": "4", "n_gpus": "2"}, "n_gpus 2: no multiple of tp 4 × pp 1"),
        ({"tp": "4", "pp": "2", "n_gpus": "12"}, "n_gpus 12: no multiple of tp 4 × pp 2"),
        ({"ep": "8"}, "ep 8: the model has no experts"),
        ({"metric": "memory_used", "unit": "GB"}, "vllm uses depends on its settings"),
        ({"model": "m" * 400}, "has 400 characters"),
    ],
)
def test_what_is_missing_or_wrong_is_said(changed, said: str) -> None:
    answer = predict({**SERVING, **changed})
    assert answer.value is None
    with pytest.raises(ConfigError, match=said):
        raise ConfigError(answer.note)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"op": "broadcast"}, "op 'broadcast' is not known"),
        ({"n_gpus": ""}, "the row gives no n_gpus"),
        ({"n_gpus": "1"}, "n_gpus 1: at least 2"),
        ({"n_gpus": "8", "n_nodes": "3"}, "n_gpus 8: not the same number on each of n_nodes 3"),
        ({"message_bytes": ""}, "the row gives no message_bytes"),
        ({"message_bytes": "1MB"}, "message_bytes '1MB': not a number"),
    ],
)
def test_what_is_wrong_with_a_collective_is_said(changed, said: str) -> None:
    answer = predict({**COLLECTIVE, **changed})
    assert answer.value is None
    assert said in answer.note


def test_a_dtype_that_is_not_known_is_said_and_the_checkpoints_taken() -> None:
    answer = serving(dtype="posit12")
    assert answer.value == value(dtype="")
    assert "dtype 'posit12' is not known" in answer.note
    assert serving(dtype="auto").note == serving(dtype="nan").note == ""


def test_what_should_not_fit_is_predicted_and_said() -> None:
    answer = serving(model="Llama-3.1-70B", batch="1")
    assert answer.value is not None
    assert "should not fit: 141 GB of weights on a H100-80GB-SXM of 84.9 GB" in answer.note


# -- one thing in several spellings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"model": "meta-llama/Meta-Llama-3.1-8B-Instruct"},
        {"model": "llama3.1 8b"},
        {"gpu": "NVIDIA H100 80GB HBM3"},
        {"gpu": "1xH100"},
        {"dtype": "FP16"},
        {"dtype": "bfloat16"},
        {"dtype": ""},
        {"tp": "", "n_gpus": "1"},
        {"tp": "1.0", "pp": "nan", "batch": "8.0"},
        {"metric": "TPOT"},
        {"metric": "mean_tpot_ms", "unit": ""},
        {"params": "8e9", "comment": "hot day"},
    ],
    ids=str,
)
def test_spellings_make_no_difference(changed) -> None:
    assert value(**changed) == value()


def test_columns_may_be_written_in_capitals() -> None:
    assert predict({name.upper(): cell for name, cell in SERVING.items()}) == predict(SERVING)


def test_units_are_converted() -> None:
    assert value(unit="s") == pytest.approx(value() / 1e3)
    assert value(unit="us") == pytest.approx(value() * 1e3)
    assert value(unit="tok/s/user") == pytest.approx(1e3 / value())


def test_a_whole_request_takes_its_first_token_and_the_others() -> None:
    """e2e_mean = TTFT + (output - 1) · TPOT."""
    assert value(metric="e2e_mean") == pytest.approx(value(metric="ttft") + 199 * value())
    assert value(metric="latency_mean", output_len="1") == pytest.approx(value(metric="ttft", output_len="1"))


def test_throughputs_of_one_run_agree() -> None:
    """8 clients, 1000 tokens in, 200 out: requests · 200 = output tokens; all tokens are six times as many."""
    tokens = value(metric="output_throughput", unit="tok/s")
    assert value(metric="request_throughput", unit="req/s") == pytest.approx(tokens / 200)
    assert value(metric="total_token_throughput", unit="tok/s") == pytest.approx(tokens * 6)
    assert value(metric="prompt_throughput", unit="tok/s") == pytest.approx(tokens * 5)
    assert value(metric="output_throughput", unit="tok/s/user") == pytest.approx(tokens / 8)
    two = {"n_gpus": "4", "tp": "2", "batch": "16", "metric": "output_throughput"}
    assert value(**two, unit="tok/s/gpu") == pytest.approx(value(**two, unit="tok/s") / 4)


def test_devices_beyond_the_degrees_are_replicas() -> None:
    assert value(n_gpus="4", batch="32") == value(n_gpus="1", batch="8")
    assert value(n_gpus="4", tp="", batch="32") == value(tp="4", batch="32")


@pytest.mark.parametrize(
    ("model", "dtype", "bits", "kv_bits"),
    [
        ("Llama-3.1-70B", "fp8", 8, 8),
        ("Llama-3.1-70B", "bf16", 16, 16),
        ("nvidia/Llama-3.1-8B-Instruct-FP8", "", None, 8),
        ("Qwen2.5-72B-Instruct-AWQ", "", 4, 16),
        ("Qwen2.5-72B-Instruct-GPTQ-Int4", "float16", 4, 16),
        ("Qwen2.5-72B-Instruct-GPTQ-Int8", "", 8, 16),
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16", "bf16", 4, 16),
        ("nvidia/Llama-3.3-70B-Instruct-FP4", "", 4, 8),
        ("DeepSeek-V3", "", None, 16),
    ],
)
def test_formats_in_names_and_in_dtype(model: str, dtype: str, bits: float | None, kv_bits: float) -> None:
    asked = serving_of({**SERVING, "model": model, "dtype": dtype})
    assert (asked.weight_bits, asked.kv_bits) == (bits, kv_bits)


def test_the_cache_of_sglang_has_the_model_s_type() -> None:
    row = {"model": "Llama-3.1-8B", "gpu": "H200", "dtype": "fp8"}
    bits = [serving_of({**row, "source": engine}).kv_bits for engine in ("vLLM", "TensorRT-LLM", "SGLang")]
    assert bits == [8, 8, 16]


def test_a_model_may_be_a_path_of_its_config(tmp_path) -> None:
    config = {
        "model_type": "llama",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert value(model=str(path)) == value()
    path.write_text("{")
    assert serving(model=str(tmp_path / "other.json")).value is None


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("all_reduce", "all_reduce"),
        ("AllReduce", "all_reduce"),
        ("all-gather", "all_gather"),
        ("all_reduce NCCL_NVLS_ENABLE=0", "all_reduce"),
        ("all_reduce_custom", "all_reduce"),
        ("alltoall", "all_to_all"),
        ("P2P", "send_recv"),
    ],
)
def test_operations(name: str, operation: str) -> None:
    assert operation_of(name) == operation


def test_collectives_by_time_and_by_rate_agree() -> None:
    """nccl-tests: bus bandwidth of an all-reduce is 2(n-1)/n · bytes / time."""
    seconds = predict(COLLECTIVE).value
    rate = predict({**COLLECTIVE, "metric": "busbw", "unit": "GB/s"}).value
    in_metric = predict({**SERVING, "metric": "nccl_all_reduce@1MiB", "n_gpus": "8", "source": "nccl", "unit": "us"})
    assert seconds is not None
    assert rate == pytest.approx(2 * 7 / 8 * 1048576 / seconds / 1e3)
    assert in_metric.value == seconds
    assert collective_of(plain_row(COLLECTIVE)).key == ("nccl", "H100-80GB-SXM", 1, 8, "all_reduce")


def test_the_error_is_that_of_the_prediction() -> None:
    assert Prediction(12).error("10") == pytest.approx(0.2)
    assert Prediction(12).error("") is Prediction(None).error("10") is Prediction(12).error("nan") is None
    assert Prediction(1, kind="out_of_memory").error("0") == 1


# -- sane where nobody measured --------------------------------------------------------------------------------------

NVLINKED = ("A100", "H100", "H200", "B200")
MODELS = ("Llama-3.1-8B", "Llama-3.1-70B", "Mixtral-8x7B", "Qwen2.5-72B")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", NVLINKED)
def test_more_gpus_on_nvlink_do_not_make_tokens_slower(model: str, gpu: str) -> None:
    for batch in ("1", "16"):
        fitting = [serving(model=model, gpu=gpu, tp=tp, batch=batch) for tp in ("1", "2", "4", "8")]
        times = [answer.value or 0 for answer in fitting if not answer.note]
        assert all(more <= fewer * 1.02 for fewer, more in itertools.pairwise(times))


@pytest.mark.parametrize("gpu", [*NVLINKED, "L40S", "A10", "RTX 4090", "MI300X", "T4"])
@pytest.mark.parametrize("engine", ["vLLM", "TensorRT-LLM", "SGLang"])
def test_more_requests_and_longer_prompts_do_not_make_it_faster(gpu: str, engine: str) -> None:
    some = {"source": engine, "model": "Qwen2.5-7B", "gpu": gpu, "tp": "2"}
    for metric in ("tpot", "ttft"):
        by_batch = [value(**some, metric=metric, batch=batch) for batch in (1, 2, 4, 8, 16, 32)]
        assert by_batch == sorted(by_batch)
    # Short ones take as long as the host takes to launch a step.
    by_input = [value(**some, metric="ttft", input_len=tokens) for tokens in (16, 64, 256, 1024, 4096, 16384)]
    assert all(longer >= shorter * 0.999 for shorter, longer in itertools.pairwise(by_input))
    assert by_input[-1] > 1.2 * by_input[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gpu", ["H100", "B200", "L40S"])
def test_8_bits_are_faster_than_16(model: str, gpu: str) -> None:
    for metric, batch in itertools.product(("tpot", "ttft"), (1, 16)):
        some = {"model": model, "gpu": gpu, "tp": "8", "metric": metric, "batch": batch}
        launched = 1 if metric == "tpot" else 1.02  # a prompt may take as long as the host takes to launch its step
        assert value(**some, dtype="fp8") < value(**some, dtype="fp16") * launched


@pytest.mark.parametrize(
    ("changed", "milliseconds"),
    [
        ({"model": "Qwen2.5-72B", "gpu": "L40S", "tp": "4"}, 145.4e9 / 4 / 864e9 * 1e3),
        ({"gpu": "A10"}, 16.06e9 / 600e9 * 1e3),
        ({"gpu": "RTX 4090"}, 16.06e9 / 1008e9 * 1e3),
        ({"model": "Llama-3.1-70B", "gpu": "A100", "tp": "4"}, 141.1e9 / 4 / 2039e9 * 1e3),
        ({"gpu": "MI300X"}, 16.06e9 / 5300e9 * 1e3),
        ({"model": "Mistral-7B", "gpu": "L4"}, 14.5e9 / 300e9 * 1e3),
    ],
    ids=str,
)
def test_a_token_of_one_request_takes_what_reading_the_weights_takes_and_some_more(changed, milliseconds) -> None:
    """bytes / bandwidth is the limit; engines reach 45 to 95 % of it where a step is longer than 5 ms."""
    most = milliseconds / 0.45 if milliseconds > 5 else milliseconds + 5
    assert milliseconds < value(**changed, batch=1) < most


def test_deepseek_v3_on_8_h200_is_within_its_limits() -> None:
    """37e9 active weights of 8 bits on 8 ranks of 4.8 TB/s: 1 ms at least; a full batch reads all 671e9: 17.5 ms."""
    some = {"model": "deepseek-ai/DeepSeek-V3", "gpu": "8xH200", "tp": "8", "dtype": "fp8"}
    assert 1 < value(**some, batch=1) < 30
    assert 17.5 < value(**some, batch=256) < 200


def test_rows_of_the_data_folder_are_predicted_or_said_why_not() -> None:
    """Guards against a change that loses rows: as many are predicted as ever were."""
    import csv  # noqa: PLC0415

    with data("measured_serving.csv").open(newline="") as lines:
        rows: list[Row] = list(csv.DictReader(lines))
    answers = [(row, predict(row)) for row in rows]
    assert sum(answer.value is not None for _, answer in answers) >= 2089
    lost = [row for row, answer in answers if answer.value is None and kind_of(row["metric"] or "") is not None]
    assert all(not (row["batch"] and row["input_len"] and row["output_len"]) or row["model"] == "13B" for row in lost)


def served_row(metric: str, batch: int, output_len: int = 200) -> dict[str, str]:
    return {
        "source": "vLLM", "model": "Llama-3.1-8B", "gpu": "H100", "tp": "1", "batch": str(batch), "input_len": "1000",
        "output_len": str(output_len), "metric": metric, "unit": "ms",
    }  # fmt: skip


def test_half_of_the_gaps_are_plain_steps_while_few_steps_have_a_prompt() -> None:
    """At 16 requests of 200 tokens one step in 13 has a prompt, at 512 of 20 tokens all have."""
    few, mean = (predict(served_row(name, 16)) for name in ("median_itl_ms", "mean_itl_ms"))
    assert few.value is not None
    assert mean.value is not None
    assert few.value < mean.value
    alone, same = (predict(served_row(name, 1)) for name in ("itl_p50", "mean_itl_ms"))
    assert alone.value == pytest.approx(same.value)
    many, those = (predict(served_row(name, 512, 20)) for name in ("p50_itl_ms", "mean_itl_ms"))
    assert many.value == pytest.approx(those.value)
    assert few.low is not None
    assert mean.low is not None
    assert few.low / few.value < mean.low / mean.value, "its band is the wider"
    assert "closed loop" in few.note


def test_half_of_the_requests_do_not_come_with_the_burst() -> None:
    median, mean = (predict(served_row(name, 64)) for name in ("median_ttft_ms", "mean_ttft_ms"))
    assert median.value is not None
    assert mean.value is not None
    assert 0.3 * mean.value < median.value < mean.value
    assert predict(served_row("ttft_p50", 1)).value == pytest.approx(predict(served_row("ttft", 1)).value)
    for name in ("tpot", "e2el"):
        assert predict(served_row(f"median_{name}", 64)).value == predict(served_row(f"mean_{name}", 64)).value


def test_a_median_of_a_row_without_load_says_what_is_missing() -> None:
    assert "no number for batch" in predict({**served_row("median_itl_ms", 1), "batch": ""}).note
    assert "output_len" in predict({**served_row("median_ttft_ms", 1), "output_len": "sharegpt"}).note
