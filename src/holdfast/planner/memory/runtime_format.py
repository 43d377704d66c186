"""How a service of ours holds its numbers on CPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from holdfast.models.parameters import Packing

GROUP = 32
GROUP_BYTES: Mapping[str, int] = MappingProxyType({"Q8_0": 34, "Q4_0": 18, "Q4_1": 20})
"""Of 32 numbers that share a scale: the formats that stay quantized (kernels.interface.GROUP_BYTES)."""


@dataclass(frozen=True, slots=True)
class RuntimeFormat:
    """How a service holds its numbers."""

    itemsize: int = 2
    """Bytes of a number in the model's dtype: 2 (bfloat16) or 4 (float32)."""
    stored: Mapping[str, str] = field(default_factory=dict)
    """Of matrices by the names of `models.parameters`, "layers.0.attn.q.weight": Q8_0, Q4_0 or Q4_1, where the
    checkpoint has them so."""
    repeated_head: bool = False
    """The checkpoint stores the embeddings again as the head, which is then not held twice."""
    block_size: int = 16
    max_tokens: int = 512
    """Of a step (`--max-num-batched-tokens`)."""
    logit_rows: int = 128
    """Scored at once: `--max-num-seqs`, or core.config.LOGIT_ROWS if that is more."""
    activation_bits: int = 16
    """Of rows that meet quantized weights (`--quantized-activations`)."""
    multiplies_bfloat16: bool = True
    """Whether the instruction set has products of bfloat16; without, rows are converted to float32 for them."""


def format_of(packing: Packing, how: RuntimeFormat) -> str:
    """In which the matrices are packed: as stored, if they are quantized alike, are to stay so, and no virtual shard
    ends within a group; else "dense"."""
    kinds = {how.stored.get(f"{module}.weight", "dense") for module in packing.modules}
    if len(kinds) > 1 or how.itemsize == 4 or any(end % GROUP for end in packing.shards):
        return "dense"
    kind = kinds.pop()
    return kind if kind in GROUP_BYTES else "dense"
