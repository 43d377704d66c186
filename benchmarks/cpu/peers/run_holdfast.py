"""Holdfast as a peer: its real scheduler, cache and runner in this process, as `holdfast serve` sets them up.

python run_holdfast.py MODEL THREADS QUANTIZED_ACTIVATIONS
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import torch
from conversation import Work, converse

from holdfast import __version__
from holdfast.cache.blocks import BlockPool
from holdfast.core.config import CacheConfig, DeviceConfig, ModelConfig, ServeConfig
from holdfast.core.request import SamplingParams
from holdfast.core.wire import Submit
from holdfast.models.inspect import inspect_model
from holdfast.schedule.fit import fit_model_len
from holdfast.schedule.scheduler import Scheduler
from holdfast.worker.start import start_runner

CACHE_BYTES = 512_000_000


def start() -> tuple[Work, dict[str, str], str]:
    path, threads, activations = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    info = inspect_model(path)
    config = replace(
        ServeConfig(),
        model=ModelConfig(quantized_activations=activations),
        device=DeviceConfig(device="cpu", cpu_threads=threads),
        cache=CacheConfig(kv_cache_memory_bytes=CACHE_BYTES),
    )
    runner = start_runner(config, info, lambda text, fraction: None)
    num_blocks, block_size = runner.pages.num_blocks, config.cache.block_size
    scheduler = Scheduler(
        config.scheduler,
        BlockPool(num_blocks, block_size),
        max_model_len=fit_model_len(None, info.spec.max_positions, num_blocks, block_size),
        eos_token_ids=frozenset(info.eos_token_ids),
        prefix_caching=config.cache.enable_prefix_caching,
    )
    submitted = 0

    def work(prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        nonlocal submitted
        outputs: dict[str, list[int]] = {}
        prefill_seconds, at_prefill = 0.0, 0
        begin = time.perf_counter()
        for prompt in prompts:
            submitted += 1
            outputs[str(submitted)] = []
            params = SamplingParams(seed=0, max_tokens=output_len, temperature=0.0, ignore_eos=True)
            scheduler.add(Submit(str(submitted), prompt, params))
        while scheduler.has_work:
            step = scheduler.schedule()
            assert step is not None
            for output in scheduler.update(runner.run(step)):
                outputs[output.request_id] += output.token_ids
            if not at_prefill and all(outputs.values()):
                prefill_seconds, at_prefill = time.perf_counter() - begin, sum(map(len, outputs.values()))
        seconds = time.perf_counter() - begin
        assert all(len(tokens) == output_len for tokens in outputs.values())
        return {
            "seconds": seconds,
            "prefill_seconds": prefill_seconds,
            "decode_tokens": sum(map(len, outputs.values())) - at_prefill,
            "tokens": next(iter(outputs.values())),
        }

    tokens = config.scheduler.max_num_batched_tokens
    how = f"in-process engine, {tokens} tokens a step, quantized weights × {activations}"
    return work, {"holdfast": __version__, "torch": torch.__version__}, how


if __name__ == "__main__":
    converse(start)
