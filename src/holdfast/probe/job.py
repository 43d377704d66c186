"""What a process of the probe is told on its command line, and what it says on its standard output."""

from __future__ import annotations

import msgspec

from holdfast.hardware.profile import Attention, Exchange, Format, Product, Reading, RowWork


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """Rank `rank` of `ranks`, which share the memory at `descriptor` (one rank: nothing). `staged`: they are two
    stages of a pipeline and measure what passes between them; else one stage, and measure everything else."""

    rank: int
    ranks: int
    threads: int
    cores: tuple[int, ...]
    descriptor: int | None
    staged: bool
    sizes: tuple[int, ...]
    """Inputs, and outputs, of the matrices,"""
    formats: tuple[Format, ...]
    """and their formats."""
    pool_bytes: int
    rounds: int


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank has measured, in an order that is the same for all."""

    kernels: str
    readings: tuple[Reading, ...] = ()
    products: tuple[Product, ...] = ()
    attentions: tuple[Attention, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    row_works: tuple[RowWork, ...] = ()
