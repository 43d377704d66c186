"""Fields that become flags."""

from __future__ import annotations

from dataclasses import field
from typing import Any

MOST = 10**15
"""No flag takes a larger number; as seconds, it still fits into the milliseconds of every poll."""


def option(default: Any, help: str, **extra: Any) -> Any:
    """A field that becomes a flag. `help` states meaning and unit."""
    return field(default=default, metadata={"help": help, **extra})
