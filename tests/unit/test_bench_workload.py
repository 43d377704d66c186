"""What `holdfast bench` sends and when."""

from __future__ import annotations

import json
import math
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from holdfast.bench.config import BenchConfig, LoadConfig, ReportConfig, RequestsConfig, TargetConfig
from holdfast.bench.workload import PlannedRequest, PromptMaker, gamma_arrivals, plan_requests
from holdfast.core.errors import ConfigError

TRACES = Path(__file__).parents[2].parent / "shared" / "data" / "traces"
needs_traces = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not on this machine")


def config(
    path: Path | None = None, chat: bool = False, load: LoadConfig | None = None, **fields: object
) -> BenchConfig:
    if path is not None:
        fields["dataset_path"] = str(path)
    return BenchConfig(
        target=TargetConfig(endpoint="chat" if chat else "completions"),
        requests=RequestsConfig(**fields),  # type: ignore[arg-type]
        load=load or LoadConfig(),
    )


def write(folder: Path, *lines: str) -> Path:
    path = folder / "file"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_random_requests_all_at_once() -> None:
    planned = plan_requests(config(num_prompts=3, random_input_len=5, random_output_len=6))
    assert planned == [PlannedRequest(index, 5, 6) for index in range(3)]


def test_poisson_arrivals() -> None:
    arrivals = gamma_arrivals(20_000, rate=4.0, burstiness=1.0, seed=1)
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert arrivals[0] == 0
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.25, rel=0.03), "exponential gaps deviate by their mean"


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    gaps = [after - before for before, after in pairwise(gamma_arrivals(20_000, 4.0, 4.0, 1))]
    assert statistics.fmean(gaps) == pytest.approx(0.25, rel=0.03)
    assert statistics.pstdev(gaps) == pytest.approx(0.125, rel=0.03), "shape 4 halves the deviation"


def test_arrivals_depend_on_the_seed_alone() -> None:
    assert gamma_arrivals(50, 1.0, 1.0, seed=3) == gamma_arrivals(50, 1.0, 1.0, seed=3)
    assert gamma_arrivals(50, 1.0, 1.0, seed=3) != gamma_arrivals(50, 1.0, 1.0, seed=4)
    assert gamma_arrivals(3, math.inf, 1.0, seed=3) == [0.0, 0.0, 0.0]


def test_made_prompts_have_exactly_the_length_asked_for() -> None:
    maker = PromptMaker(range(1000, 2000), seed=0)
    for length in (1, 511, 512, 513, 2000):
        prompt = maker.make(PlannedRequest(0, length, 1))
        assert len(prompt) == length
        assert all(isinstance(token, int) and 1000 <= token < 2000 for token in prompt)
    assert len(str(PromptMaker(["a", "bc"], seed=0).make(PlannedRequest(0, 9, 1))).split()) == 9


def test_made_prompts_differ_and_repeat_by_seed() -> None:
    request, other = PlannedRequest(0, 64, 1), PlannedRequest(1, 64, 1)
    assert PromptMaker(range(5000), 1).make(request) == PromptMaker(range(5000), 1).make(request)
    assert PromptMaker(range(5000), 1).make(request) != PromptMaker(range(5000), 2).make(request)
    assert PromptMaker(range(5000), 1).make(request) != PromptMaker(range(5000), 1).make(other)


def test_equal_hash_ids_become_equal_blocks_of_512_tokens() -> None:
    maker = PromptMaker(range(1000, 40_000), seed=0)
    one = maker.make(PlannedRequest(0, 1500, 1, block_ids=(0, 7, 8)))
    two = maker.make(PlannedRequest(1, 1100, 1, block_ids=(0, 7, 9)))
    assert (len(one), len(two)) == (1500, 1100)
    assert one[:1024] == two[:1024]
    assert one[1024:1100] != two[1024:1100]
    assert one[:512] != one[512:1024]
    assert one[:64] != maker.make(PlannedRequest(0, 64, 1)), "an index and a block id of one number differ"


def test_an_azure_trace_keeps_its_arrivals(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.5000000,4808,10",
        "2023-11-16 18:17:05.0000000,3180,8",
        "2024-05-10 00:00:00.009930+00:00,110,0",
    )
    planned = plan_requests(config(path, dataset_name="azure", limit=2))
    assert [(p.arrival, p.input_len, p.output_len) for p in planned] == [(0.0, 4808, 10), (1.5, 3180, 8)]
    faster = config(path, load=LoadConfig(trace_speedup=3), dataset_name="azure", limit=2)
    assert [p.arrival for p in plan_requests(faster)] == [0.0, 0.5]
    assert plan_requests(config(path, dataset_name="azure"))[2].output_len == 1


def test_a_mooncake_trace(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]},
        {"timestamp": 1000, "input_length": 512, "output_length": 6, "hash_ids": [0]},
        {"timestamp": 1000, "input_length": 9000, "output_length": 6, "hash_ids": list(range(18))},
    ]
    path = write(tmp_path, *map(json.dumps, rows))
    planned = plan_requests(config(path, dataset_name="mooncake", max_request_len=8192))
    assert [(p.arrival, p.input_len, p.block_ids) for p in planned] == [(0.0, 512, (0,)), (2.0, 600, (0, 1))]


def test_a_rate_replaces_the_arrivals_of_a_trace(tmp_path: Path) -> None:
    row = {"timestamp": 5, "input_length": 1, "output_length": 5, "hash_ids": [0]}
    path = write(tmp_path, *[json.dumps(row | {"timestamp": i}) for i in range(10)])
    load = LoadConfig(request_rate=2.0)
    planned = plan_requests(config(path, load=load, dataset_name="mooncake", seed=5))
    assert [p.arrival for p in planned] == gamma_arrivals(10, 2.0, 1.0, 5)


def test_a_file_of_prompts(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "Plain text, {braces} and all",
        "",
        '{"prompt": "As JSON", "output_len": 3}',
        '{"question_id": 81, "turns": ["First turn", "Second turn"]}',
    )
    planned = plan_requests(config(path, dataset_name="prompts", random_output_len=9))
    assert [(p.given, p.output_len, p.input_len) for p in planned] == [
        ("Plain text, {braces} and all", 9, None),
        ("As JSON", 3, None),
        ("First turn", 9, None),
    ]
    chat = plan_requests(config(path, chat=True, dataset_name="prompts"))
    assert chat[2].given == [{"role": "user", "content": "First turn"}]


def test_messages_are_for_chat(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    path = write(tmp_path, json.dumps({"messages": messages}))
    assert plan_requests(config(path, chat=True, dataset_name="prompts"))[0].given == messages
    with pytest.raises(ConfigError, match="line 1"):
        plan_requests(config(path, dataset_name="prompts"))


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("azure", ["TIMESTAMP,ContextTokens,GeneratedTokens", "yesterday,1,2"]),
        ("azure", ["TIMESTAMP,ContextTokens,GeneratedTokens", "2023-11-16 18:17:03,1"]),
        ("azure", ["a,b", "1,2"]),
        ("mooncake", ["{}", "{}"]),
        ("mooncake", ['{"timestamp": 1, "input_length": 513, "output_length": 5, "hash_ids": [0]}', "{}"]),
        ("mooncake", ["nonsense"]),
        ("prompts", ['{"prompt": 3}']),
        ("prompts", ['{"prompt": "x", "output_len": "many"}']),
        ("azure", ["TIMESTAMP,ContextTokens,GeneratedTokens", "0001-01-01 00:00:00,1,2"]),
        ("mooncake", ['{"x": ' + "[" * 100_000]),
        ("prompts", ['{"turns": []}']),
        ("prompts", ['{"turns": {"a": 1}}']),
        ("prompts", ['{"turns": 5}']),
        ("prompts", ['{"x": ' + "[" * 100_000]),
        ("prompts", ["{broken"]),
    ],
    ids=lambda value: None if isinstance(value, str) else value[-1][:30],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, lines: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"--dataset-path .*file, line [12]: must be"):
        plan_requests(config(write(tmp_path, *lines), dataset_name=name))


@pytest.mark.parametrize("name", ["azure", "mooncake", "prompts"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        plan_requests(config(tmp_path / "none", dataset_name=name))
    with pytest.raises(ConfigError, match="no request in it"):
        plan_requests(config(write(tmp_path, ""), dataset_name=name))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        plan_requests(config(tmp_path / "binary", dataset_name=name))


def test_a_field_longer_than_csv_takes(tmp_path: Path) -> None:
    path = write(tmp_path, "TIMESTAMP,ContextTokens,GeneratedTokens", f"2023-11-16,{'1' * 200_000},1")
    with pytest.raises(ConfigError, match=r"--dataset-path .*: not CSV"):
        plan_requests(config(path, dataset_name="azure"))


@needs_traces
@pytest.mark.parametrize("name", ["AzureLLMInferenceTrace_conv.csv", "AzureLLMInferenceTrace_code.csv"])
def test_the_public_azure_traces(name: str) -> None:
    planned = plan_requests(config(TRACES / name, dataset_name="azure"))
    assert len(planned) > 8000
    assert planned[0].arrival == 0
    assert 3000 < planned[-1].arrival < 3700, "the traces last an hour"


@needs_traces
def test_the_public_mooncake_trace() -> None:
    planned = plan_requests(config(TRACES / "mooncake_conversation.jsonl", dataset_name="mooncake"))
    assert len(planned) == 12_031
    first, second = (PromptMaker(range(1000, 2000), 0).make(request) for request in planned[:2])
    assert (len(first), len(second)) == (6758, 7322)
    assert first[:512] == second[:512]
    assert first[512:1024] != second[512:1024]


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        (BenchConfig(target=TargetConfig(base_url="localhost:8000")), "--base-url"),
        (BenchConfig(target=TargetConfig(request_timeout=0)), "--request-timeout"),
        (config(num_prompts=0), "--num-prompts"),
        (config(dataset_name="azure"), "--dataset-path"),
        (config(Path("x")), "--dataset-path"),
        (config(chat=True, prompt_format="tokens"), "--prompt-format"),
        (config(load=LoadConfig(request_rate=math.nan)), "--request-rate"),
        (BenchConfig(target=TargetConfig(api_key="schlüssel")), "--api-key"),
        (config(temperature=math.inf), "--temperature"),
        (config(load=LoadConfig(burstiness=math.inf)), "--burstiness"),
        (config(load=LoadConfig(max_concurrency=0)), "--max-concurrency"),
        (config(load=LoadConfig(trace_speedup=2)), "--trace-speedup"),
        (BenchConfig(report=ReportConfig(goodput=("ttft:fast",))), "--goodput"),
        (BenchConfig(report=ReportConfig(goodput=("itl:5",))), "--goodput"),
        (BenchConfig(report=ReportConfig(percentile_metrics="ttft,speed")), "--percentile-metrics"),
        (BenchConfig(report=ReportConfig(metric_percentiles="50,101")), "--metric-percentiles"),
        (BenchConfig(report=ReportConfig(json="/no/such/folder/out.json")), "--json"),
        (BenchConfig(report=ReportConfig(json="/")), "--json /: is a folder"),
        (BenchConfig(report=ReportConfig(plot="/")), "--plot /: is a folder"),
    ],
)
def test_what_cannot_work_is_refused_by_flag(wrong: BenchConfig, flag: str) -> None:
    with pytest.raises(ConfigError, match=flag):
        wrong.check()


def test_what_is_named_twice_is_shown_once() -> None:
    report = ReportConfig(metric_percentiles="50,90,50.0", percentile_metrics="ttft,itl,ttft")
    assert (report.percentiles(), report.metrics()) == ([50.0, 90.0], ["ttft", "itl"])


def test_a_rate_without_limit_is_allowed() -> None:
    config(load=LoadConfig(request_rate=math.inf)).check()


def test_limits_of_goodput_in_one_flag_or_several() -> None:
    report = ReportConfig(goodput=("ttft:500 tpot:50", "e2el:10000"))
    assert report.limits() == {"ttft": 0.5, "tpot": 0.05, "e2el": 10.0}


def test_the_api_key_is_not_recorded() -> None:
    assert "secret" not in str(BenchConfig(target=TargetConfig(api_key="secret")).as_dict())
