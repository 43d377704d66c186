"""transformers as a peer: `generate` on one batch, in bf16.

python run_transformers.py MODEL THREADS
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from conversation import Work, converse


class Clock(transformers.StoppingCriteria):
    """Notes when the first step was over; stops nothing."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def start() -> tuple[Work, dict[str, str], str]:
    path, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None  # to the full length, whatever comes

    @torch.inference_mode()
    def work(prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        clock = Clock()
        begin = time.perf_counter()
        ids = torch.tensor(prompts)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=output_len,
            stopping_criteria=[clock],
            pad_token_id=0,
        )
        end = time.perf_counter()
        assert found.shape[1] == ids.shape[1] + output_len
        assert clock.first is not None
        return {
            "seconds": end - begin,
            "prefill_seconds": clock.first - begin,
            "decode_tokens": len(prompts) * (output_len - 1),
            "tokens": found[0, ids.shape[1] :].tolist(),
        }

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    return work, versions, "generate(), bf16, sdpa, dynamic cache"


if __name__ == "__main__":
    converse(start)
