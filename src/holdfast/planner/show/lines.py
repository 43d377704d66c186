"""A formula with its numbers filled in, as a line of a report."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.planner import quantities

DIGITS = 4
"""Of a number in a formula: so a result can be checked by hand to three."""


@dataclass(frozen=True, slots=True)
class Line:
    """`formula`, in words, and the same in `numbers`, make `value`; `result` is that with its unit."""

    section: str
    name: str
    formula: str
    numbers: str
    value: float
    """In bytes, seconds, tokens or tokens per second."""
    result: str

    def __str__(self) -> str:
        return f"{self.name} = {self.formula} = {self.numbers} = {self.result}"


def bytes_of(value: float) -> str:
    return quantities.of_bytes(value, DIGITS)


def rate_of(value: float) -> str:
    """Bytes per second."""
    return quantities.bytes_per_second(value, DIGITS)


def flops_of(value: float) -> str:
    return quantities.flops(value, DIGITS)


def seconds_of(value: float) -> str:
    return quantities.of_seconds(value, DIGITS)


def number(value: float) -> str:
    """Without thousands' separators: for arithmetic."""
    if value >= 1e6:
        return f"{value:.{DIGITS}e}".replace("e+0", "e").replace("e+", "e")
    return f"{value:.0f}" if value == round(value) else f"{value:.{DIGITS}g}"
