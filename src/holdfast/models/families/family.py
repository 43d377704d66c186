"""What a family is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from holdfast.core.spec import Activation, DecoderSpec
from holdfast.models.config import Config
from holdfast.models.parameters import Names, Part, Source


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: how its config reads and what its tensors are called."""

    spec: Callable[[Config], DecoderSpec]
    hf_names: Callable[[DecoderSpec], Names]
    gguf_names: Callable[[DecoderSpec], Names] | None = None
    """None: no GGUF files of this family."""
    base_prefix: str = "model."
    """Checkpoints saved without a head leave this prefix off."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that hold nothing to load: buffers that a formula gives too."""


ACTIVATIONS: Mapping[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
"""transformers' names of activations → ours."""


def fused_qkv(name: str, spec: DecoderSpec, *, groups: int, transpose: bool = False) -> dict[str, Source]:
    """q, k and v as parts of one tensor, whose rows come in `groups` of [query heads, key heads, value heads].

    One group: all of q, then k, then v. As many groups as KV heads: each with the query heads that read it.
    """
    queries, keys = spec.num_heads // groups, spec.num_kv_heads // groups
    slots = queries + 2 * keys
    cuts = {"q": (0, queries), "k": (queries, queries + keys), "v": (queries + keys, slots)}
    return {
        f"layers.*.attn.{part}": Source(name, Part(groups, slots, start, stop), transpose)
        for part, (start, stop) in cuts.items()
    }
