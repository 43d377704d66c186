"""A request as the engine sees it: tokens in, tokens out. Text belongs to the gateway."""

from __future__ import annotations

import msgspec


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Validated at the door (`gateway.openai`); trusted behind it.

    Order, as in vLLM: logprobs come from the raw logits; then min_tokens mask, logit_bias, penalties,
    temperature, min_p, top_k, top_p, and last argmax(logits + Gumbel noise(seed, position, token id)).
    """

    seed: int
    """64-bit key of the noise. Every request has one; the gateway draws it when the client gives none."""
    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    """Below 1e-5 the choice is greedy; ties go to the lowest token id."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    """Taken from the logit of each token already in the output, once."""
    frequency_penalty: float = 0.0
    """Taken from the logit of each token already in the output, times its count."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output (CTRL, arXiv:1909.05858)."""
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    """End the request when sampled; the token itself is part of the output."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none. n: the chosen token's logprob and the n most likely alternatives."""
    prompt_logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on tokens already seen."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log probability of one token and of the most likely tokens at its position (natural log, raw logits)."""

    token_id: int
    logprob: float
    rank: int
    """1: the token was the most likely one."""
    top: list[tuple[int, float]]
    """(token id, logprob), most likely first."""
