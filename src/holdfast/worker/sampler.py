"""From logits to the next token. The order of the steps is `SamplingParams`' docstring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from holdfast.core.request import TokenLogprobs
from holdfast.core.wire import NO_NUMBERS, NewRequest
from holdfast.kernels.interface import Kernels
from holdfast.worker.transfer import Download, upload


@dataclass(frozen=True, slots=True)
class Sampler:
    """Chooses one token per row. A row's choice depends on its own logits, history, parameters and seed only."""

    kernels: Kernels[Any]
    eos_token_ids: tuple[int, ...]

    def sample(self, logits: Tensor, requests: list[NewRequest]) -> Choice:
        """logits float32 [R, V] (changed in place), the request of each row → its token, and logprobs if asked."""
        finite = _are_finite(logits)
        if logits.is_cuda or not finite.all():  # a GPU is not waited for
            logits.masked_fill_(~finite[:, None], 0.0)  # so that whatever is chosen is a token
        raw = _raw_logprobs(logits, requests)
        for row, request in zip(logits, requests, strict=True):
            self._adjust(row, request)
        drawn = [index for index, request in enumerate(requests) if not request.params.greedy]
        if len(drawn) == len(requests):
            self._perturb(logits, requests)
        elif drawn:
            rows = upload(np.array(drawn, dtype=np.int64), logits.device)
            logits[rows] = self._perturb(logits[rows], [requests[index] for index in drawn])
        chosen = self.kernels.argmax(logits)
        if raw is None:
            return Choice(chosen, finite)
        wanted = [index for index, request in enumerate(requests) if request.params.logprobs is not None]
        scores = score(
            raw,
            chosen[upload(np.array(wanted, dtype=np.int64), chosen.device)],
            [requests[index].params.logprobs or 0 for index in wanted],
        )
        return Choice(chosen, finite, wanted, scores)

    def _adjust(self, row: Tensor, request: NewRequest) -> None:
        """min_tokens mask, logit_bias and penalties on one row [V], in place."""
        params = request.params

        def there(values: list[int] | np.ndarray) -> Tensor:
            return upload(np.asarray(values, dtype=np.int64), row.device)

        if len(request.token_ids) - request.num_prompt_tokens < params.min_tokens:
            ends = set(params.stop_token_ids) | (set() if params.ignore_eos else set(self.eos_token_ids))
            row.index_fill_(0, there(sorted(ends)), -torch.inf)
        if params.logit_bias:
            biases = np.array(list(params.logit_bias.values()), dtype=np.float32)
            row[there(list(params.logit_bias))] += upload(biases, row.device)
        if not params.needs_history:
            return
        if params.repetition_penalty != 1.0:  # sorted out on the host: how many they are, a device would have to tell
            seen = there(np.unique(request.token_ids))
            values = row[seen]
            row[seen] = torch.where(
                values > 0, values / params.repetition_penalty, values * params.repetition_penalty
            )
        output = request.token_ids[request.num_prompt_tokens :]
        if output:
            ids, counts = np.unique(output, return_counts=True)
            row[there(ids)] -= params.presence_penalty + params.frequency_penalty * there(counts)

    def _perturb(self, logits: Tensor, requests: list[NewRequest]) -> Tensor:
        """Temperature, filters and noise on rows [R, V], in place: the argmax is then the sample (Gumbel-max)."""
        params = [request.params for request in requests]

        def column(values: list[float] | list[int], dtype: type) -> Tensor:
            return upload(np.array(values, dtype=dtype), logits.device)

        logits /= column([p.temperature for p in params], np.float32)[:, None]
        if any(p.top_k or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
            self.kernels.filter_logits(
                logits,
                column([p.top_k for p in params], np.int64),
                column([p.top_p for p in params], np.float32),
                column([p.min_p for p in params], np.float32),
            )
        seeds = column([p.seed for p in params], np.int64)
        positions = column([len(request.token_ids) for request in requests], np.int64)
        return self.kernels.add_gumbel_noise(logits, seeds, positions)


_PROBES = 8
"""Logits of a row that are looked at: one number that is none, in the state before the head, makes all so."""


def _are_finite(logits: Tensor) -> Tensor:
    """bool [R]: whether a row of float32 [R, V] is of numbers."""
    return logits[:, :: max(logits.shape[1] // _PROBES, 1)].isfinite().all(1)


def _raw_logprobs(logits: Tensor, requests: list[NewRequest]) -> Tensor | None:
    """Log-softmax [·, V] of the rows whose request asks for logprobs."""
    wanted = [index for index, request in enumerate(requests) if request.params.logprobs is not None]
    return logits[upload(np.array(wanted, dtype=np.int64), logits.device)].log_softmax(-1) if wanted else None


class Choice:
    """The tokens chosen for the rows of a step, and the logprobs of the `scored` ones among them."""

    def __init__(
        self, chosen: Tensor, finite: Tensor, scored: list[int] | None = None, scores: Scores | None = None
    ) -> None:
        self.on_device = chosen
        self._tokens, self._finite = Download(chosen), Download(finite)
        self._scored, self._scores = scored or [], scores

    @property
    def is_there(self) -> bool:
        """Whether nobody needs to wait for the tokens."""
        return self._tokens.is_there

    def token_ids(self) -> list[int]:
        """Waits for the device."""
        token_ids: list[int] = self._tokens.wait().tolist()
        return token_ids

    def read(self) -> list[tuple[int, TokenLogprobs | None]]:
        """The same with logprobs; `NO_NUMBERS` where there was nothing to choose from."""
        entries = dict(zip(self._scored, self._scores.read(), strict=True)) if self._scores else {}
        tokens = zip(self.token_ids(), self._finite.wait().tolist(), strict=True)
        return [(token if good else NO_NUMBERS, entries.get(row)) for row, (token, good) in enumerate(tokens)]


class Scores:
    """Logprobs of tokens, and of the likeliest ones in their place, as many as `num_top` says for each row."""

    def __init__(self, columns: list[Tensor], num_top: list[int]) -> None:
        self._columns, self._num_top = [Download(column) for column in columns], num_top

    def read(self) -> list[TokenLogprobs]:
        """Waits for the device."""
        columns = [column.wait().tolist() for column in self._columns]
        return [
            TokenLogprobs(token, value, rank, list(zip(ids[:count], values[:count], strict=True)))
            for token, value, rank, ids, values, count in zip(*columns, self._num_top, strict=True)
        ]


def score(logprobs: Tensor, token_ids: Tensor, num_top: list[int]) -> Scores:
    """logprobs [R, V], int64 [R], how many of the likeliest tokens each row wants."""
    values = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs > values).sum(1) + 1
    top, ids = logprobs.topk(min(max(num_top), logprobs.shape[1]), dim=1)
    return Scores([token_ids, values[:, 0], ranks, ids, top], num_top)
