"""A whole engine in this process: the real scheduler, cache and runner over random weights."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import torch

from holdfast.cache.blocks import BlockPool
from holdfast.cache.pages import KVPages, bytes_per_block
from holdfast.core.config import SchedulerConfig
from holdfast.core.request import SamplingParams
from holdfast.core.wire import Submit, TokenOutput
from holdfast.kernels.interface import Capturing, Kernels
from holdfast.schedule.scheduler import Scheduler
from holdfast.worker.runner import Launched, Runner
from holdfast.worker.sampler import Sampler

from .limits import Job
from .models import make_decoder

BLOCK = 16


class Engine:
    """`requests` at once, each of up to `length` tokens, as many as there is memory for."""

    def __init__(
        self,
        config: dict[str, Any],
        kernels: Kernels[Any],
        device: torch.device,
        requests: int,
        length: int,
        *,
        fp8: bool = False,
    ) -> None:
        decoder = make_decoder(config, kernels, device, fp8=fp8)
        spec, self.device = decoder.spec, device
        self.num_blocks = requests * -(-length // BLOCK)
        if device.type == "cuda":
            per_block = bytes_per_block(spec.num_layers, spec.num_kv_heads, spec.head_dim, BLOCK, torch.bfloat16)
            torch.cuda.empty_cache()  # of what was drawn and then packed
            self.num_blocks = min(self.num_blocks, int(0.85 * torch.cuda.mem_get_info()[0]) // per_block)
        pages = KVPages.allocate(
            num_layers=spec.num_layers,
            num_blocks=self.num_blocks,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            block_size=BLOCK,
            dtype=torch.bfloat16,
            device=device,
        )
        self.ahead = device.type == "cuda"
        self.runner = Runner(decoder, pages, Sampler(kernels, ()), device, 2048, runs_ahead=self.ahead)
        self.requests, self.length, self.vocabulary = requests, length, spec.vocab_size
        self.graph_seconds = 0.0
        if isinstance(self.runner.forward, Capturing) and device.type == "cuda":
            begin = time.perf_counter()
            self.runner.forward.capture(requests, length, BLOCK, lambda done: None)
            self.graph_seconds = time.perf_counter() - begin

    def at_once(self, job: Job) -> int:
        """Requests that run together, so that none is preempted."""
        return min(job.count, self.requests, max(1, self.num_blocks // -(-(job.prompt + job.output) // BLOCK)))

    def run(self, job: Job) -> tuple[float, float, int]:
        """Seconds until each request had its first token, seconds to the end, and tokens made in between."""
        count, prompt, output = job.count, job.prompt, job.output
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=self.at_once(job), max_num_batched_tokens=2048),
            BlockPool(self.num_blocks, BLOCK),
            max_model_len=self.length,
            eos_token_ids=frozenset(),
            prefix_caching=False,
        )
        params = SamplingParams(seed=0, max_tokens=output, temperature=0.0, ignore_eos=True)
        for index in range(count):
            tokens = [(7 * index + 13 * i) % self.vocabulary for i in range(prompt)]
            scheduler.add(Submit(f"r{index}", tokens, params))
        waiting, in_flight, made = {f"r{i}" for i in range(count)}, deque[Launched](), 0
        begin, first = time.perf_counter(), 0.0
        while scheduler.has_work:
            while len(in_flight) < 1 + self.ahead and (step := scheduler.schedule()):
                in_flight.append(self.runner.launch(step))
            outputs: list[TokenOutput] = scheduler.update(self.runner.finish(in_flight.popleft()))
            if waiting:
                waiting -= {output.request_id for output in outputs}
                first = time.perf_counter() - begin
            else:
                made += sum(len(output.token_ids) for output in outputs)
        return first, time.perf_counter() - begin, made
