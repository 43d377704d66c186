"""The storage of the KV cache on one device: pages, and how many bytes they take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def bytes_per_block(num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes over all layers: 2 (K and V) · L · G · D · S · element size."""
    return 2 * num_layers * num_kv_heads * head_dim * block_size * dtype.itemsize


@dataclass(frozen=True, slots=True)
class KVPages:
    """K and V pages of every layer: [K and V, L layers, P blocks, G heads, S tokens, D] in one piece of memory.

    A (block, layer, head) cell of K, and of V, lies in one piece of S · D numbers, in the backend's own order, so
    that checkpoints can be keyed by it. Which request a block belongs to is not known here: `cache.blocks` owns that.
    """

    data: Tensor
    k: tuple[Tensor, ...]
    """Views, per layer [P, G, S, D]."""
    v: tuple[Tensor, ...]

    @property
    def num_blocks(self) -> int:
        return self.data.shape[2]

    @property
    def block_size(self) -> int:
        return self.data.shape[4]

    @torch.inference_mode()
    def clear(self, blocks: list[int]) -> None:
        """All zero again."""
        self.data[:, :, blocks] = 0

    @classmethod
    def allocate(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> KVPages:
        """All zero: padded block tables may read a page before it is written, and 0 · NaN is NaN."""
        data = _zeros((2, num_layers, num_blocks, num_kv_heads, block_size, head_dim), dtype, device)
        return cls(data, tuple(data[0]), tuple(data[1]))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # numpy's zeros come from the kernel page by page as they are used; torch's are all written at once, which
    # takes seconds for a cache of gigabytes
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)
