"""The least time a job can take on this machine: each step reads the weights once and multiplies them."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.models.gguf_file import read_gguf

from ..limits import Limits, measure_limits
from .work import Job, Model


@dataclass(frozen=True)
class Weights:
    """What a step of a model must move and multiply."""

    num_bytes: int
    """Of all weights, as this format holds them; tied embeddings count once, as the head."""
    body: int
    """Elements of the matrices every token is multiplied with."""
    head: int
    """Elements of the matrix that only tokens which sample are multiplied with."""
    kv_bytes: int
    """Per token of context, in 16 bit."""

    @staticmethod
    def of(model: Model) -> Weights:
        """From the header of the model's GGUF."""
        header = read_gguf(str(model.gguf))
        sizes = {t.name: t.shape[0] * t.shape[1] for t in header.tensors.values() if len(t.shape) == 2}
        head = sizes.pop("token_embd.weight")
        value = {name.partition(".")[2]: entry for name, entry in header.metadata.items()}
        head_dim = value["embedding_length"] // value["attention.head_count"]
        return Weights(
            num_bytes=sum(tensor.num_bytes for tensor in header.tensors.values()),
            body=sum(sizes.values()),
            head=head,
            kv_bytes=2 * 2 * value["block_count"] * value["attention.head_count_kv"] * head_dim,
        )

    def prefill_seconds(self, job: Job, limits: Limits) -> float:
        """One step with all prompts in it."""
        flop = 2 * job.num_requests * (job.input_len * self.body + self.head)
        return max(self.num_bytes / limits.read_bytes_per_second, flop / limits.bf16_flop_per_second)

    def decode_seconds(self, job: Job, limits: Limits) -> float:
        """The steps after the first token, each over a context one token longer."""
        flop = 2 * job.num_requests * (self.body + self.head)
        total = 0.0
        for context in range(job.input_len + 1, job.input_len + job.output_len):
            read = self.num_bytes + job.num_requests * context * self.kv_bytes
            total += max(read / limits.read_bytes_per_second, flop / limits.bf16_flop_per_second)
        return total

    def job_seconds(self, job: Job, limits: Limits) -> float:
        return self.prefill_seconds(job, limits) + self.decode_seconds(job, limits)


class Gauge:
    """Measures the machine again and again during a run, and keeps the best: it can do at least that."""

    def __init__(self) -> None:
        self.readings: list[Limits] = []

    def read(self) -> Limits:
        """Measure once more; returns the better of this and the time before, for what was done in between."""
        self.readings.append(measure_limits())
        return _best(self.readings[-2:])

    @property
    def best(self) -> Limits:
        return _best(self.readings)


def _best(readings: list[Limits]) -> Limits:
    return Limits(
        max(reading.read_bytes_per_second for reading in readings),
        max(reading.bf16_flop_per_second for reading in readings),
    )
