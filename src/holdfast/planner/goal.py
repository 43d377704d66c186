"""What is asked of a service, and by what plans are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from holdfast.core.errors import ConfigError

Objective = Literal["throughput", "latency", "cost", "memory", "spare"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "latency", "cost", "memory", "spare")


@dataclass(frozen=True, slots=True)
class Goal:
    """Tokens per request, requests at once in the whole service, and limits in seconds (None: none).

    `concurrency` None: as many as serve the objective best within the limits. `context`: tokens of the longest
    sequence that must fit, None: input and output. `weight_bits` None: as the checkpoint has them.
    """

    objective: Objective = "throughput"
    input_len: int = 1024
    output_len: int = 256
    concurrency: int | None = None
    ttft: float | None = None
    tpot: float | None = None
    context: int | None = None
    weight_bits: float | None = None
    kv_format: str = "bfloat16"
    engine: str = "vllm"
    """Whose measured overheads the times are of."""

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "concurrency", "ttft", "tpot", "context"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name.replace('_', '-')} {value}: must be above 0")
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective {self.objective!r}: must be one of {', '.join(OBJECTIVES)}")

    @property
    def longest(self) -> int:
        return self.context or self.input_len + self.output_len
