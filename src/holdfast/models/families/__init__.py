"""Model families: each a short mapping from its config to a `DecoderSpec` and from our parameter names to its own."""

from holdfast.models.families.family import Family
from holdfast.models.families.registry import FAMILIES, GGUF_ARCHITECTURES

__all__ = ["FAMILIES", "GGUF_ARCHITECTURES", "Family"]
