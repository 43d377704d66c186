"""The configuration of `holdfast bench serve`; the flags are generated from it, as those of `holdfast serve`."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.core.errors import ConfigError
from holdfast.core.options import MOST, option

Metric = Literal["ttft", "tpot", "itl", "e2el"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetConfig:
    """Server"""

    base_url: str = option("http://127.0.0.1:8000", "Address of the server, without /v1.")
    endpoint: Literal["completions", "chat"] = option(
        "completions", "POST to /v1/completions or to /v1/chat/completions."
    )
    model: str | None = option(None, "Name of the model. Default: the first of /v1/models.")
    api_key: str | None = option(None, "Sent as a bearer token.")
    request_timeout: float = option(600.0, "Seconds without a byte from the server after which a request failed.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsConfig:
    """Requests"""

    dataset_name: Literal["random", "prompts", "azure", "mooncake"] = option(
        "random",
        "random: prompts of one length. prompts: a file, one prompt per line, as text or as JSON with prompt, "
        "messages or turns, and perhaps output_len. azure, mooncake: a trace (CSV; JSONL).",
    )
    dataset_path: str | None = option(None, "The file of prompts or the trace.", metavar="FILE")
    num_prompts: int = option(100, "Requests to send (random).")
    limit: int | None = option(None, "Requests to send at most (files). Default: all of the file.")
    random_input_len: int = option(256, "Tokens per prompt (random).")
    random_output_len: int = option(128, "Tokens to ask for (random; prompts that do not say).")
    max_request_len: int | None = option(
        None, "Leave out requests of a trace with more tokens, prompt and output together."
    )
    prompt_format: Literal["auto", "tokens", "text"] = option(
        "auto",
        "How made prompts are sent. tokens: as token ids, of exactly the length asked for. text: as words, about "
        "one token each. auto: tokens for completions, text for chat.",
    )
    vocab_size: int | None = option(
        None, "Draw token ids from the inner part of this vocabulary. Default: ids that the server's /tokenize gives."
    )
    ignore_eos: bool = option(False, "Ask the server to go on past the end of the text, to the full length.")
    temperature: float = option(0.0, "Sampling temperature; 0: greedy.")
    seed: int = option(0, "Seed of prompts and arrivals. Equal seeds send equal requests.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Load"""

    max_concurrency: int | None = option(None, "Requests in flight at most. Default: no limit.")
    request_rate: float | None = option(
        None, "Requests per second; inf: all at once. Default: inf, or a trace's own arrivals."
    )
    burstiness: float = option(
        1.0, "Shape of the gamma distribution of the time between requests: 1 is Poisson, less is burstier."
    )
    trace_speedup: float = option(1.0, "Replay a trace's arrivals so many times as fast.")
    num_warmups: int = option(1, "Requests sent before the measurement and left out of it.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportConfig:
    """Report"""

    percentile_metrics: str = option(
        "ttft,tpot,itl,e2el",
        "Latencies to show: time to first token, time per output token after it, time between chunks of the "
        "stream, end to end.",
    )
    metric_percentiles: str = option("50,90,99", "Percentiles to show.")
    goodput: tuple[str, ...] = option(
        (),
        'Limits in ms like "ttft:500 tpot:50 e2el:10000"; requests within all of them count as goodput. May be '
        "repeated.",
        metavar="METRIC:MS",
    )
    json: str | None = option(None, "Write everything measured, per request too, to this file.", metavar="FILE")
    plot: str | None = option(None, "Draw the latencies and the throughput into this file.", metavar="FILE.png")

    def metrics(self) -> list[Metric]:
        """The latencies to show; raises `ConfigError`."""
        names = list(dict.fromkeys(self.percentile_metrics.split(",")))
        for name in names:
            if name not in get_args(Metric):
                raise ConfigError(f"--percentile-metrics {name}: must be some of {','.join(get_args(Metric))}")
        return names  # type: ignore[return-value]

    def percentiles(self) -> list[float]:
        """The percentiles to show, each in [0, 100]; raises `ConfigError`."""
        try:
            values = list(dict.fromkeys(float(text) for text in self.metric_percentiles.split(",")))
        except ValueError:
            values = [-1.0]
        if not all(0 <= value <= 100 for value in values):
            raise ConfigError(f"--metric-percentiles {self.metric_percentiles}: must be numbers from 0 to 100")
        return values

    def limits(self) -> dict[str, float]:
        """Metric → limit in seconds; raises `ConfigError`."""
        limits = {}
        for item in " ".join(self.goodput).split():
            name, _, value = item.partition(":")
            try:
                milliseconds = float(value)
            except ValueError:
                milliseconds = 0.0
            if name not in ("ttft", "tpot", "e2el") or not milliseconds > 0:
                raise ConfigError(f"--goodput {item}: must be ttft, tpot or e2el, a colon and milliseconds above 0")
            limits[name] = milliseconds / 1000
        return limits


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """Everything `holdfast bench serve` can be told."""

    target: TargetConfig = TargetConfig()
    requests: RequestsConfig = RequestsConfig()
    load: LoadConfig = LoadConfig()
    report: ReportConfig = ReportConfig()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range, naming the flag, the value and the range."""
        for flag, value, least in (
            ("--num-prompts", self.requests.num_prompts, 1),
            ("--limit", self.requests.limit, 1),
            ("--random-input-len", self.requests.random_input_len, 1),
            ("--random-output-len", self.requests.random_output_len, 1),
            ("--max-request-len", self.requests.max_request_len, 2),
            ("--vocab-size", self.requests.vocab_size, 8),
            ("--temperature", self.requests.temperature, 0),
            ("--seed", self.requests.seed, 0),
            ("--max-concurrency", self.load.max_concurrency, 1),
            ("--num-warmups", self.load.num_warmups, 0),
        ):
            if value is not None and not least <= value <= MOST:
                raise ConfigError(f"{flag} {value}: must be at least {least} and at most {MOST:.0e}")
        for flag, value in (
            ("--request-timeout", self.target.request_timeout),
            ("--request-rate", self.load.request_rate),
            ("--burstiness", self.load.burstiness),
            ("--trace-speedup", self.load.trace_speedup),
        ):
            no_limit = flag == "--request-rate" and value == math.inf
            if value is not None and not no_limit and not 0 < value <= MOST:
                raise ConfigError(f"{flag} {value}: must be above 0 and at most {MOST:.0e}")
        self._check_combinations()
        self.report.metrics()
        self.report.percentiles()
        self.report.limits()
        for flag, path in (("--json", self.report.json), ("--plot", self.report.plot)):
            if path is not None and not Path(path).absolute().parent.is_dir():
                raise ConfigError(f"{flag} {path}: there is no such folder")
            if path is not None and Path(path).is_dir():
                raise ConfigError(f"{flag} {path}: is a folder")

    def _check_combinations(self) -> None:
        requests = self.requests
        if not self.target.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"--base-url {self.target.base_url}: must start with http:// or https://")
        key = self.target.api_key or ""
        if not (key.isascii() and key.isprintable()):
            raise ConfigError("--api-key: must be printable ASCII, which is all that a header can carry")
        if requests.dataset_name == "random" and requests.dataset_path is not None:
            raise ConfigError("--dataset-path: needs a --dataset-name other than random")
        if requests.dataset_name != "random" and requests.dataset_path is None:
            raise ConfigError(f"--dataset-name {requests.dataset_name}: needs --dataset-path")
        if self.target.endpoint == "chat" and requests.prompt_format == "tokens":
            raise ConfigError("--prompt-format tokens: the chat endpoint takes text only")
        is_trace = requests.dataset_name in ("azure", "mooncake")
        if self.load.trace_speedup != 1 and (not is_trace or self.load.request_rate is not None):
            raise ConfigError("--trace-speedup: needs a trace (azure, mooncake) and no --request-rate")

    @property
    def sends_tokens(self) -> bool:
        """Whether generated prompts go out as token ids."""
        if self.requests.prompt_format == "auto":
            return self.target.endpoint == "completions"
        return self.requests.prompt_format == "tokens"

    def as_dict(self) -> dict[str, Any]:
        """For the record; without the API key."""
        record = asdict(self)
        if record["target"]["api_key"] is not None:
            record["target"]["api_key"] = "(given)"
        return record
