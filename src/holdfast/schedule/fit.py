"""How long a request may be."""

from __future__ import annotations

from holdfast.core.errors import ConfigError


def fit_model_len(wanted: int | None, max_positions: int, num_blocks: int, block_size: int) -> int:
    """The tokens one request may hold: `--max-model-len`, or all that model and cache allow.

    Raises `ConfigError` if `wanted` exceeds either.
    """
    capacity = num_blocks * block_size
    if wanted is None:
        if capacity < 2:
            raise ConfigError("--kv-cache-memory-bytes: the KV cache has no room for a single block")
        return min(max_positions, capacity)
    if wanted > max_positions:
        raise ConfigError(f"--max-model-len {wanted}: the model knows {max_positions} positions")
    if wanted > capacity:
        raise ConfigError(
            f"--max-model-len {wanted}: the KV cache holds {capacity} tokens "
            f"({num_blocks} blocks of {block_size}); lower it or raise --kv-cache-memory-bytes"
        )
    return wanted
