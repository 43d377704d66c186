"""Flags of the planner's commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from holdfast.core.errors import ConfigError
from holdfast.core.options import MOST, option


@dataclass(frozen=True, slots=True, kw_only=True)
class WhereConfig:
    """Hardware"""

    cluster: str | None = option(None, "Cluster file in YAML (docs/planning.md). Default: this machine.")
    gpus: str | None = option(None, "In a few words: 8xA100-80GB, 2x8xH100 (nodes x GPUs), 2xH100,4xL40S.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatConfig:
    """What is asked of the service"""

    objective: Literal["throughput", "latency", "cost", "memory", "spare"] = option(
        "throughput",
        "What plans are compared by. throughput: tokens per second; latency: of a whole request; cost: per token, by "
        "the cluster file's prices; memory: the fullest device; spare: tokens per second that are left when a rank "
        "is lost.",
    )
    ttft: float | None = option(None, "Limit of the time to first token, in milliseconds.")
    tpot: float | None = option(None, "Limit of the time per output token, in milliseconds.")
    input_len: int = option(1024, "Tokens of a prompt.")
    output_len: int = option(256, "Tokens of an answer.")
    context: int | None = option(None, "Tokens of the longest sequence that must fit. Default: input and output.")
    concurrency: int | None = option(None, "Requests at once. Default: as many as serve the objective best.")
    weight_bits: float | None = option(None, "Bits of a weight: 16, 8 or 4. Default: as the checkpoint has them.")
    kv_cache_dtype: Literal["auto", "bfloat16", "float32", "fp8", "int8", "int4"] = option(
        "auto", "Type of cached keys and values. auto: bfloat16. Holdfast itself serves auto only, so far."
    )
    engine: Literal["vllm", "trtllm", "sglang"] = option(
        "vllm", "Whose measured overheads the times are reckoned with."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputConfig:
    """Output"""

    output: str | None = option(None, "Write the plan to this file, for holdfast serve --plan.", short="-o")
    json: bool = option(False, "Print everything as JSON.")
    explain: bool = option(False, "Print the formulas, with the numbers filled in.")
    html: str | None = option(None, "Write a page with pictures of the placement to this file.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """Everything `holdfast plan` can be told."""

    where: WhereConfig = WhereConfig()
    what: WhatConfig = WhatConfig()
    out: OutputConfig = OutputConfig()

    def check(self) -> None:
        """Raise `ConfigError` for flags that contradict each other or are out of range."""
        if self.where.cluster is not None and self.where.gpus is not None:
            raise ConfigError(f"--gpus {self.where.gpus}: contradicts --cluster {self.where.cluster}; give one")
        for name in ("ttft", "tpot", "input_len", "output_len", "context", "concurrency"):
            value = getattr(self.what, name)
            if value is not None and not 0 < value <= MOST:
                raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be above 0 and at most {MOST:.0e}")
        if self.what.weight_bits not in {None, 4, 8, 16}:  # embeddings and activations are reckoned in 16
            raise ConfigError(f"--weight-bits {self.what.weight_bits:g}: must be 4, 8 or 16")
        lengths = self.what.input_len + self.what.output_len
        if self.what.context is not None and self.what.context < lengths:
            raise ConfigError(
                f"--context {self.what.context}: must be at least {lengths}, a whole request by --input-len and "
                "--output-len"
            )
        if self.what.objective == "cost" and self.where.cluster is None:
            raise ConfigError("--objective cost: prices are told in a cluster file (--cluster)")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Measurements"""

    rows: str | None = option(
        None,
        "CSV file of measurements, one a row: of serving (columns model, gpu, tp, pp, dtype, batch, input_len, "
        "output_len, metric, value, unit) or of collectives (gpu, n_gpus, n_nodes, op, message_bytes, latency_us); "
        "- reads stdin.",
    )
    output: str | None = option(None, "Where the rows go, each with its prediction. Default: stdout.")
    json: bool = option(False, "Write JSON, rows and summary, instead of CSV.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictConfig:
    """Everything `holdfast predict` can be told."""

    rows: RowsConfig = RowsConfig()

    def check(self) -> None:
        """Raise `ConfigError` where there is nothing to predict."""
        if self.rows.rows is None:
            raise ConfigError("--rows: which measurements? Name a CSV file, or - for stdin")
