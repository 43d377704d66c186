"""Flags of `holdfast probe`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.errors import ConfigError
from holdfast.core.options import option

MOST_RANKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureConfig:
    """Measurements"""

    output: str | None = option(None, "File for the profile. Default: ~/.cache/holdfast/profile.json.")
    max_ranks: int | None = option(
        None, "Ranks that share the machine at most: 1, 2, 4, … are measured. Default: as many as there are cores."
    )
    pool_bytes: int = option(
        128_000_000, "Weights and keys that are read by turns; more than the caches hold.", bytes=True
    )
    rounds: int = option(5, "Times that everything is measured.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """Everything `holdfast probe` can be told."""

    measure: MeasureConfig = MeasureConfig()

    def check(self) -> None:
        """Raise `ConfigError` for a value out of range, naming the flag, the value and the range."""
        ranks, rounds, pool = self.measure.max_ranks, self.measure.rounds, self.measure.pool_bytes
        if ranks is not None and not 1 <= ranks <= MOST_RANKS:
            raise ConfigError(f"--max-ranks {ranks}: must be at least 1 and at most {MOST_RANKS}")
        if not 1 <= rounds <= 1000:
            raise ConfigError(f"--rounds {rounds}: must be at least 1 and at most 1000")
        if not 10**6 <= pool <= 10**11:
            raise ConfigError(f"--pool-bytes {pool}: must be at least 1M and at most 100G")
