"""One request while the scheduler knows it: its tokens, its blocks, and what its worker has been told."""

from __future__ import annotations

from holdfast.cache.blocks import ROOT, chain
from holdfast.core.request import SamplingParams, TokenLogprobs
from holdfast.core.wire import ContinuedRequest, FinishReason, NewRequest, Submit


class Sequence:
    """`token_ids` is prompt then output; the first `num_computed` have their keys and values in `block_ids`, the
    first `num_scheduled` will have once the steps in flight are done.

    There is no prefill and no decode: a step computes some of the `num_missing` tokens, and when it computes the
    last one a new token is sampled. Until the step is done that token is pending: it counts, and a further step may
    compute it, but only the worker knows it.
    """

    def __init__(self, submit: Submit, rank: int, block_size: int) -> None:
        self.request_id = submit.request_id
        self.params: SamplingParams = submit.params
        self.token_ids = submit.prompt_token_ids + submit.output_token_ids
        self.num_prompt_tokens = len(submit.prompt_token_ids)
        self.rank = rank
        """Smaller runs first and is preempted last; fixed for life."""
        self.num_computed = self.num_scheduled = self.num_pending = 0
        self.life = 0
        """Counts up whenever work in flight is given up: what steps of an earlier life return is void."""
        self.num_cached_tokens = 0
        """Found in the prefix cache when it was let in, and not yet told."""
        self.is_retried = False
        """Its logits were no numbers once; what was computed before was forgotten."""
        self.held_back = False
        """Blocks of it may be on their way into the prefix cache: it is not to be let in yet."""
        self.block_ids: list[int] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.resident = False
        """Whether the worker holds this request."""
        self._block_size = block_size
        self._hashes: list[bytes] = []
        self._tokens_told = 0
        self._blocks_told = 0

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_missing(self) -> int:
        return len(self.token_ids) + self.num_pending - self.num_scheduled

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt logprobs are still owed: then every prompt token must be computed, cached or not."""
        return self.params.prompt_logprobs is not None and self.num_output_tokens == 0

    def hashes(self, num_blocks: int) -> list[bytes]:
        """Prefix hashes of the first `num_blocks` full blocks."""
        size = self._block_size
        while len(self._hashes) < num_blocks:
            start = len(self._hashes) * size
            parent = self._hashes[-1] if self._hashes else ROOT
            self._hashes.append(chain(parent, self.token_ids[start : start + size]))
        return self._hashes[:num_blocks]

    def take(self, count: int) -> NewRequest | ContinuedRequest:
        """Put the next `count` tokens into a step; returns what the worker must learn to compute them."""
        assert 0 < count <= self.num_missing
        start, self.num_scheduled = self.num_scheduled, self.num_scheduled + count
        self.num_pending += not self.num_missing
        told, blocks_told = self._tokens_told, self._blocks_told
        self._tokens_told, self._blocks_told = len(self.token_ids), len(self.block_ids)
        if self.resident:
            return ContinuedRequest(self.request_id, told, self.token_ids[told:], self.block_ids[blocks_told:], start)
        self.resident = True
        return NewRequest(
            self.request_id, self.token_ids[:], self.num_prompt_tokens, self.params, self.block_ids[:], start
        )

    def ends_by_itself(self, max_model_len: int) -> bool:
        """Whether the tokens that are pending are its last, whatever they are."""
        pending = self.num_pending
        return pending > 0 and (
            self.num_output_tokens + pending >= self.params.max_tokens or self.num_tokens + pending >= max_model_len
        )

    def finish_after(self, token_id: int, eos_token_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Whether it ends with this token, its last, and why."""
        params = self.params
        is_eos = token_id in eos_token_ids and not params.ignore_eos
        if (is_eos or token_id in params.stop_token_ids) and self.num_output_tokens >= params.min_tokens:
            return "stop"
        if self.num_output_tokens >= params.max_tokens or self.num_tokens >= max_model_len:
            return "length"
        return None

    def rewind(self) -> None:
        """Nothing of what is in flight will come; the worker has forgotten this request."""
        self.num_scheduled, self.num_pending = self.num_computed, 0
        self.life += 1
        self.resident = False

    def reset(self) -> list[int]:
        """Forget all computed state (preemption). Returns the blocks: the caller releases them."""
        blocks, self.block_ids = self.block_ids, []
        self.num_computed = 0
        self.rewind()
        self.prompt_logprobs = []
        return blocks
