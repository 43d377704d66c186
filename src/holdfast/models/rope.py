"""Tables for rotary positions (Su et al., arXiv:2104.09864) and slopes for ALiBi (Press et al., arXiv:2108.12409)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from holdfast.core.spec import RopeSpec


def rope_table(rope: RopeSpec, max_positions: int, device: torch.device) -> Tensor:
    """cos and sin of every angle: float32 [max_positions, 2, rotary_dim / 2]."""
    positions = torch.arange(max_positions, dtype=torch.float32)
    table = torch.empty(max_positions, 2, rope.rotary_dim // 2)
    cos, sin = table.unbind(1)
    torch.outer(positions, inverse_frequencies(rope), out=cos)  # in place: tables of long models are large
    torch.sin(cos, out=sin)
    cos.cos_()
    table *= rope.attention_factor
    return table.to(device)


def inverse_frequencies(rope: RopeSpec) -> Tensor:
    """Angle per position of each rotated pair: float32 [rotary_dim / 2]."""
    frequencies = 1.0 / rope.theta ** (torch.arange(0, rope.rotary_dim, 2).float() / rope.rotary_dim)
    if rope.frequency_divisors:
        frequencies = frequencies / torch.tensor(rope.frequency_divisors)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        return _llama3(rope, frequencies)
    if rope.scaling == "yarn":
        return _yarn(rope, frequencies)
    return frequencies


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Llama 3.1: waves longer than the trained context are stretched by `factor`, short ones kept, and those
    between blended by how many of them fit into it."""
    waves_in_context = rope.original_max_positions * frequencies / (2 * math.pi)
    keep = (waves_in_context - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / rope.factor


def _yarn(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """YaRN's "NTK-by-parts" (arXiv:2309.00071, section 3.2): a ramp over the dims, from the one that turns
    `beta_fast` times in the trained context (kept) to the one that turns `beta_slow` times (stretched)."""

    def dim_of(turns: float) -> float:
        wave = rope.original_max_positions / (turns * 2 * math.pi)
        return rope.rotary_dim * math.log(wave) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast), dim_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = high - low or 0.001
    stretch = ((torch.arange(rope.rotary_dim // 2).float() - low) / width).clamp(0.0, 1.0)
    return stretch * frequencies / rope.factor + (1 - stretch) * frequencies


def alibi_slopes(num_heads: int) -> Tensor:
    """One slope per head: a geometric sequence from 2^(-8/n) for n a power of two; further heads take every other
    slope of the sequence for 2n. float32 [H]."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 / power * (index + 1)) for index in range(power)]
    slopes += [2 ** (-4 / power * (2 * index + 1)) for index in range(num_heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
