"""From logits to the next token. The order of the steps is `SamplingParams`' docstring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from holdfast.core.request import TokenLogprobs
from holdfast.core.wire import NewRequest
from holdfast.kernels.interface import Kernels


@dataclass(frozen=True, slots=True)
class Sampler:
    """Chooses one token per row. A row's choice depends on its own logits, history, parameters and seed only."""

    kernels: Kernels[Any]
    eos_token_ids: tuple[int, ...]

    def sample(self, logits: Tensor, requests: list[NewRequest]) -> list[tuple[int, TokenLogprobs | None]]:
        """logits float32 [R, V] (changed in place), the request of each row → (token id, logprobs if asked)."""
        raw = _raw_logprobs(logits, requests)
        for row, request in zip(logits, requests, strict=True):
            self._adjust(row, request)
        drawn = [index for index, request in enumerate(requests) if not request.params.greedy]
        if len(drawn) == len(requests):
            self._perturb(logits, requests)
        elif drawn:
            logits[drawn] = self._perturb(logits[drawn], [requests[index] for index in drawn])
        chosen = self.kernels.argmax(logits)
        return [
            (token, token_logprobs(raw[index], token, request.params.logprobs or 0) if index in raw else None)
            for index, (token, request) in enumerate(zip(chosen.tolist(), requests, strict=True))
        ]

    def _adjust(self, row: Tensor, request: NewRequest) -> None:
        """min_tokens mask, logit_bias and penalties on one row [V], in place."""
        params = request.params
        if len(request.token_ids) - request.num_prompt_tokens < params.min_tokens:
            ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos_token_ids))
            row[sorted(ends)] = -torch.inf
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), device=row.device)
            row[ids] += torch.tensor(list(params.logit_bias.values()), dtype=row.dtype, device=row.device)
        if not params.needs_history:
            return
        if params.repetition_penalty != 1.0:
            seen = torch.unique(torch.tensor(request.token_ids, device=row.device))
            values = row[seen]
            row[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        output = request.token_ids[request.num_prompt_tokens :]
        if output:
            seen, counts = torch.unique(torch.tensor(output, device=row.device), return_counts=True)
            row[seen] -= params.presence_penalty + params.frequency_penalty * counts

    def _perturb(self, logits: Tensor, requests: list[NewRequest]) -> Tensor:
        """Temperature, filters and noise on rows [R, V], in place: the argmax is then the sample (Gumbel-max)."""
        params = [request.params for request in requests]

        def column(values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=logits.device)

        logits /= column([p.temperature for p in params], torch.float32)[:, None]
        if any(p.top_k or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
            self.kernels.filter_logits(
                logits,
                column([p.top_k for p in params], torch.int64),
                column([p.top_p for p in params], torch.float32),
                column([p.min_p for p in params], torch.float32),
            )
        seeds = column([p.seed for p in params], torch.int64)
        positions = column([len(request.token_ids) for request in requests], torch.int64)
        return self.kernels.add_gumbel_noise(logits, seeds, positions)


def _raw_logprobs(logits: Tensor, requests: list[NewRequest]) -> dict[int, Tensor]:
    """Log-softmax [V] of the rows whose request asks for logprobs, by row."""
    wanted = [index for index, request in enumerate(requests) if request.params.logprobs is not None]
    return dict(zip(wanted, logits[wanted].log_softmax(-1), strict=True)) if wanted else {}


def token_logprobs(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Logprobs [V] of one position → those of `token_id` and of the `num_top` most likely tokens."""
    value = logprobs[token_id]
    rank = int((logprobs > value).sum()) + 1
    values, ids = logprobs.topk(min(num_top, logprobs.shape[-1]))
    return TokenLogprobs(token_id, value.item(), rank, list(zip(ids.tolist(), values.tolist(), strict=True)))
