"""vLLM over the same shape with dummy weights: run by `python -m benchmarks.gpu.vllm_peer FOLDER JOBS` where vLLM is
installed; prints one JSON line per job (count, prompt, output)."""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - a peer, in an environment of its own

    folder, jobs = sys.argv[1], json.loads(sys.argv[2])
    longest = max(prompt + output for _, prompt, output in jobs)
    model = LLM(
        folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=longest, enable_prefix_caching=False
    )
    for count, prompt, output in jobs:
        prompts = [{"prompt_token_ids": [(7 * i + 13 * j) % 1000 for j in range(prompt)]} for i in range(count)]
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
        warm = SamplingParams(temperature=0.0, max_tokens=min(output, 8), ignore_eos=True, detokenize=False)
        model.generate(prompts[:256], warm, use_tqdm=False)
        begin = time.perf_counter()
        model.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        print(json.dumps({"job": [count, prompt, output], "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
