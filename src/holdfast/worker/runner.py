"""One device: runs steps. Knows no policy; what runs, and where its blocks are, a `Step` says."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from holdfast.cache.pages import KVPages
from holdfast.core.config import LOGIT_ROWS
from holdfast.core.wire import NewRequest, PromptLogprobs, SampledToken, Step, StepResult
from holdfast.kernels.interface import Capturing
from holdfast.models.decoder import Decoder
from holdfast.models.layers import Weights
from holdfast.worker.batch import UNKNOWN, Drawn, Requests, Work, layout
from holdfast.worker.sampler import Choice, Sampler, Scores, score
from holdfast.worker.transfer import upload


@dataclass(frozen=True, slots=True)
class Launched:
    """A step whose numbers are being made. `sampled`: request, and the index of its new token; as in `choice`."""

    step_id: int
    sampled: list[tuple[NewRequest, int]]
    choice: Choice | None
    prompt_scores: list[tuple[str, list[Scores]]]

    @property
    def done(self) -> bool:
        """Whether `finish` need not wait."""
        return self.choice is None or self.choice.is_there


class Runner:
    """A decoder, its KV pages, and the requests it holds. Steps have up to `max_tokens` tokens.

    A step is launched, then finished; with `runs_ahead` the next one can be launched in between. The tokens it is
    missing, since they are just being sampled, it takes from the device's memory. `moved` is called whenever a step
    gets further.
    """

    def __init__(
        self,
        decoder: Decoder,
        pages: KVPages,
        sampler: Sampler,
        device: torch.device,
        max_tokens: int,
        *,
        runs_ahead: bool = False,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.decoder = decoder
        self.sampler = sampler
        self.device = device
        self.max_tokens = max_tokens
        self.runs_ahead = runs_ahead
        self.moved = moved
        self.requests = Requests()
        self._unfinished: Launched | None = None
        self.use_pages(pages)

    def use_pages(self, pages: KVPages) -> None:
        """Keep keys and values in `pages` from now on; what was in other ones is forgotten."""
        self.pages = pages
        forward = partial(self.decoder.forward, kv=pages)
        self.forward = self.decoder.kernels.record(forward, self.max_tokens)

    def use_experts(self, weights: Weights) -> None:
        """Those of `weights`, from the next step on."""
        self.decoder.use_experts(weights)
        self.use_pages(self.pages)

    def run(self, step: Step) -> StepResult:
        """Compute the step's tokens; sample every request whose last token is among them."""
        return self.finish(self.launch(step))

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Begin a step. At most one other may be unfinished."""
        begun = time.perf_counter()
        self.moved()
        launched = self._launch(step)
        if self.decoder.collectives is not None:
            self.decoder.collectives.count_step(time.perf_counter() - begun)
        return launched

    def _launch(self, step: Step) -> Launched:
        work = self.requests.apply(step)
        if self._unfinished and any(part.request.params.needs_history for part in work):
            self._settle(self._unfinished)  # penalties count tokens on the host
        if not work:
            return Launched(step.step_id, [], None, [])
        token_ids, batch = layout(work, self.pages.block_size, self.device, self._drawn())
        hidden = self.forward(token_ids, batch)
        if not self.decoder.place.is_last:
            return Launched(step.step_id, [], None, [])
        ends = list(accumulate(batch.query_lens))
        scores = self._score_prompts(hidden, work, ends)
        launched = Launched(step.step_id, *self._sample(hidden, work, ends), scores)
        for request, _ in launched.sampled:
            request.token_ids.append(UNKNOWN)
        self._unfinished = launched
        if not self.runs_ahead:
            self._settle(launched)
        return launched

    def finish(self, launched: Launched) -> StepResult:
        """Wait for a step; what came of it."""
        self._settle(launched)
        self.moved()
        chosen = launched.choice.read() if launched.choice else []
        sampled = [
            SampledToken(request.request_id, token_id, logprobs)
            for (request, _), (token_id, logprobs) in zip(launched.sampled, chosen, strict=True)
        ]
        scores = [
            PromptLogprobs(request_id, [entry for part in parts for entry in part.read()])
            for request_id, parts in launched.prompt_scores
        ]
        return StepResult(launched.step_id, sampled, scores)

    def abort(self) -> None:
        """Let no other rank wait for this one any longer."""
        if self.decoder.collectives is None:
            return
        if isinstance(self.forward, Capturing):
            self.forward.drop()  # NCCL's abort waits until no graph holds its kernels any more
        self.decoder.collectives.abort()

    def forget(self, step: Step) -> None:
        """Drop the requests of a step that raised."""
        self.requests.forget(step)

    def _settle(self, launched: Launched) -> None:
        """Wait until the tokens of a step are known, and note them."""
        if self._unfinished is launched:
            self._unfinished = None
        if launched.choice:
            for (request, index), token_id in zip(launched.sampled, launched.choice.token_ids(), strict=True):
                request.token_ids[index] = token_id

    def _drawn(self) -> Drawn | None:
        """The tokens that are not known yet, where they lie on the device."""
        if self._unfinished is None or self._unfinished.choice is None:
            return None
        rows = {request.request_id: row for row, (request, _) in enumerate(self._unfinished.sampled)}
        return Drawn(self._unfinished.choice.on_device, rows)

    def _sample(
        self, hidden: Tensor, work: list[Work], ends: list[int]
    ) -> tuple[list[tuple[NewRequest, int]], Choice | None]:
        last = [(end - 1, part.request) for end, part in zip(ends, work, strict=True) if part.samples]
        if not last:
            return [], None
        rows, requests = [row for row, _ in last], [request for _, request in last]
        logits = self.decoder.logits(hidden[upload(np.array(rows, dtype=np.int64), self.device)])
        return [(request, len(request.token_ids)) for request in requests], self.sampler.sample(logits, requests)

    def _score_prompts(self, hidden: Tensor, work: list[Work], ends: list[int]) -> list[tuple[str, list[Scores]]]:
        """The state at position p predicts token p + 1, so a chunk scores the tokens after its own."""
        scores = []
        for end, part in zip(ends, work, strict=True):
            if not part.wants_prompt_logprobs:
                continue
            targets = part.request.token_ids[part.start + 1 : part.stop + 1]
            first, parts = end - (part.stop - part.start), []
            num_top = part.request.params.prompt_logprobs or 0
            for offset in range(0, len(targets), LOGIT_ROWS):
                some = targets[offset : offset + LOGIT_ROWS]
                states = hidden[first + offset : first + offset + len(some)]
                rows = self.decoder.logits(states).log_softmax(-1)
                tokens = upload(np.array(some, dtype=np.int64), self.device)
                parts.append(score(rows, tokens, [num_top] * len(some)))
            scores.append((part.request.request_id, parts))
        return scores
