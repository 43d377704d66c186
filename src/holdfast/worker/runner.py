"""One device: runs steps. Knows no policy; what runs, and where its blocks are, a `Step` says."""

from __future__ import annotations

from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from holdfast.cache.pages import KVPages
from holdfast.core.wire import PromptLogprobs, SampledToken, Step, StepResult
from holdfast.models.decoder import Decoder
from holdfast.worker.batch import Requests, Work, layout
from holdfast.worker.sampler import Sampler, token_logprobs

LOGIT_ROWS = 64
"""Prompt positions whose logits are held at once for prompt logprobs: 64 · 150k vocabulary · 4 bytes = 38 MB."""


class Runner:
    """A decoder, its KV pages, and the requests it holds. Steps have up to `max_tokens` tokens."""

    def __init__(
        self, decoder: Decoder, pages: KVPages, sampler: Sampler, device: torch.device, max_tokens: int
    ) -> None:
        self.decoder = decoder
        self.sampler = sampler
        self.device = device
        self.max_tokens = max_tokens
        self.requests = Requests()
        self.use_pages(pages)

    def use_pages(self, pages: KVPages) -> None:
        """Keep keys and values in `pages` from now on; what was in the ones before is forgotten."""
        self.pages = pages
        forward = partial(self.decoder.forward, kv=pages)
        self.forward = self.decoder.kernels.record(forward, self.max_tokens)

    @torch.inference_mode()
    def run(self, step: Step) -> StepResult:
        """Compute the step's tokens; sample every request whose last token is among them."""
        work = self.requests.apply(step)
        token_ids, batch = layout(work, self.pages.block_size, self.device)
        hidden = self.forward(token_ids, batch)
        ends = list(accumulate(batch.query_lens))
        return StepResult(step.step_id, self._sample(hidden, work, ends), self._score_prompts(hidden, work, ends))

    def _sample(self, hidden: Tensor, work: list[Work], ends: list[int]) -> list[SampledToken]:
        last = [(end - 1, part.request) for end, part in zip(ends, work, strict=True) if part.samples]
        if not last:
            return []
        rows, requests = [row for row, _ in last], [request for _, request in last]
        logits = self.decoder.logits(hidden[torch.tensor(rows, device=self.device)])
        chosen = self.sampler.sample(logits, requests)
        return [
            SampledToken(request.request_id, token_id, logprobs)
            for request, (token_id, logprobs) in zip(requests, chosen, strict=True)
        ]

    def _score_prompts(self, hidden: Tensor, work: list[Work], ends: list[int]) -> list[PromptLogprobs]:
        """The state at position p predicts token p + 1, so a chunk scores the tokens after its own."""
        scores = []
        for end, part in zip(ends, work, strict=True):
            if not part.wants_prompt_logprobs:
                continue
            targets = part.request.token_ids[part.start + 1 : part.stop + 1]
            first, entries = end - (part.stop - part.start), []
            for offset in range(0, len(targets), LOGIT_ROWS):
                some = targets[offset : offset + LOGIT_ROWS]
                states = hidden[first + offset : first + offset + len(some)]
                rows = self.decoder.logits(states).log_softmax(-1)
                num_top = part.request.params.prompt_logprobs or 0
                entries += [token_logprobs(row, token, num_top) for row, token in zip(rows, some, strict=True)]
            scores.append(PromptLogprobs(part.request.request_id, entries))
        return scores

    def forget(self, step: Step) -> None:
        """Drop the requests of a step that raised."""
        self.requests.forget(step)
