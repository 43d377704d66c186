"""A whole engine in this process: the real scheduler, cache and runner, without sockets."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

from holdfast.cache.blocks import BlockPool
from holdfast.cluster.engine import settle
from holdfast.cluster.rank import attempt
from holdfast.core.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, ServeConfig
from holdfast.core.request import SamplingParams, TokenLogprobs
from holdfast.core.wire import Step, StepError, StepResult, Submit, TokenOutput
from holdfast.models.inspect import inspect_model
from holdfast.schedule.scheduler import Scheduler
from holdfast.worker.runner import Launched
from holdfast.worker.start import start_runner

SERVED = ModelConfig()
"""What `holdfast serve` takes when it is not told."""


class Answer:
    """What a request produced."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.finish: str | None = None
        self.num_cached_tokens = 0

    @property
    def content(self) -> tuple[object, ...]:
        """What the client asked for, without how it was come by."""
        return self.token_ids, self.logprobs, self.prompt_logprobs, self.finish


class LocalEngine:
    """`path` is a model folder or .gguf. `num_blocks` of device memory; `schedule` may use fewer."""

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        num_blocks: int = 512,
        block_size: int = 16,
        max_num_batched_tokens: int = 512,
        cpu_threads: int | None = None,
        quantized_activations: str = SERVED.quantized_activations,
    ) -> None:
        self.info = inspect_model(path)
        spec = self.info.spec
        itemsize = 4 if dtype == "float32" else 2
        per_block = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * block_size * itemsize
        config = ServeConfig(
            model=ModelConfig(
                dtype=dtype, max_model_len=spec.max_positions, quantized_activations=quantized_activations
            ),
            device=DeviceConfig(device=device, cpu_threads=cpu_threads),
            cache=CacheConfig(block_size=block_size, kv_cache_memory_bytes=num_blocks * per_block),
            scheduler=SchedulerConfig(max_num_batched_tokens=max_num_batched_tokens),
        )
        self.runner = start_runner(config, self.info, lambda text, fraction: None)
        self.block_size = block_size
        self.pages = self.runner.pages.num_blocks
        self.schedule()

    def schedule(self, *, num_blocks: int | None = None, prefix_caching: bool = True, **config: int) -> None:
        """A fresh scheduler (and an empty prefix cache) over the same device."""
        num_blocks = num_blocks or self.pages
        assert num_blocks <= self.pages
        self.scheduler = Scheduler(
            replace(SchedulerConfig(max_num_seqs=64), **config),
            BlockPool(num_blocks, self.block_size),
            max_model_len=min(self.info.spec.max_positions, num_blocks * self.block_size),
            eos_token_ids=frozenset(self.info.eos_token_ids),
            prefix_caching=prefix_caching,
        )

    def run(self, requests: Iterable[tuple[list[int], dict[str, object]]], depth: int = 1) -> list[Answer]:
        """(prompt, sampling parameters) each, all at once → what each produced, with up to `depth` steps in flight.
        Accounting is audited per step."""
        answers = {}
        for index, (prompt, params) in enumerate(requests):
            asked = {"seed": 0, "max_tokens": 16, "temperature": 0.0} | params
            self.scheduler.add(Submit(f"r{index}", prompt, SamplingParams(**asked)))
            answers[f"r{index}"] = Answer()
        launched: deque[tuple[Step, Launched | StepError]] = deque()
        while self.scheduler.has_work:
            while len(launched) < depth and (step := self.scheduler.schedule()):
                launched.append((step, attempt(self.runner, step, "0.0.0", partial(self.runner.launch, step))))
            for output in self._settle(*launched.popleft()):
                answer = answers[output.request_id]
                assert answer.finish is None
                answer.token_ids += output.token_ids
                answer.logprobs += output.logprobs or []
                answer.prompt_logprobs += output.prompt_logprobs or []
                answer.num_cached_tokens += output.num_cached_tokens
                answer.finish = output.finish
            self.scheduler.check_integrity()
        return list(answers.values())

    def _settle(self, step: Step, state: Launched | StepResult | StepError) -> list[TokenOutput]:
        if isinstance(state, Launched):
            state = attempt(self.runner, step, "0.0.0", partial(self.runner.finish, state))
        return settle(self.scheduler, state)
