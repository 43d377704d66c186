"""Steps that are worthless as text: what they take of a device, its start finds out."""

from __future__ import annotations

from collections.abc import Iterator

from holdfast.core.config import ServeConfig
from holdfast.core.request import SamplingParams
from holdfast.core.wire import NewRequest, Step


def trial_steps(config: ServeConfig, longest: int) -> Iterator[Step]:
    """Those that take the most memory: the most tokens, and the longest context (its splits leave their states for
    as many requests as there are). Then some of every number of rows that kernels are compiled for, as one prompt and
    as decodes: now, not when a request waits, whose replica would seem to hang."""
    scheduler = config.scheduler
    yield largest_step(config, longest)
    yield longest_decode(config, longest)
    for tokens in (1, *(1 + (1 << i) for i in range((scheduler.max_num_batched_tokens - 1).bit_length()))):
        yield largest_step(config, min(longest, tokens), tokens, 1)
        if tokens <= scheduler.max_num_seqs:
            yield largest_step(config, min(longest, tokens), tokens, tokens)


def largest_step(
    config: ServeConfig, max_positions: int, num_tokens: int | None = None, max_num_seqs: int | None = None
) -> Step:
    """As many tokens, and as many requests that sample, as a step can have (or as said); each prompt at most
    `max_positions` long, all of them written into block 0: right for memory, worthless as text."""
    num_tokens = num_tokens or config.scheduler.max_num_batched_tokens
    lengths: list[int] = []
    for left in range(max_num_seqs or config.scheduler.max_num_seqs, 0, -1):
        length = min(num_tokens - sum(lengths) - (left - 1), max_positions)  # the others take one token at least
        lengths.append(length)
    return _trial(config, lengths, [0] * len(lengths))


def longest_decode(config: ServeConfig, max_positions: int) -> Step:
    """A decode that ends a context of `max_positions`, in the company of as many short ones as there can be."""
    count = min(config.scheduler.max_num_seqs, config.scheduler.max_num_batched_tokens)
    return _trial(config, [1] * count, [max_positions - 1] + [0] * (count - 1))


def _trial(config: ServeConfig, lengths: list[int], computed: list[int]) -> Step:
    """Requests of so many tokens after those computed, in block 0, that sample by all that there is."""
    params = SamplingParams(seed=0, max_tokens=1, top_p=0.5)
    requests = []
    for index, (length, before) in enumerate(zip(lengths, computed, strict=True)):
        total = before + length
        blocks = [0] * -(-total // config.cache.block_size)
        requests.append(NewRequest(str(index), [0] * total, total, params, blocks, before))
    return Step(0, requests, [], lengths, [])
