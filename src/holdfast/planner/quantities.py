"""How sizes, rates and times are written for people: SI units, three digits unless more are asked for."""

from __future__ import annotations

BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "B"))
PLAIN = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def of_bytes(value: float, digits: int = 3) -> str:
    """17.6 GB."""
    return _in_units(value, BYTES, digits)


def bytes_per_second(value: float, digits: int = 3) -> str:
    """2.04 TB/s."""
    return f"{_in_units(value, BYTES, digits)}/s"


def flops(value: float, digits: int = 3) -> str:
    """312 TFLOP/s."""
    return f"{_in_units(value, PLAIN, digits)}FLOP/s"


def of_seconds(value: float, digits: int = 3) -> str:
    """4.1 ms, 2.3 s."""
    return _in_units(value, SECONDS, digits)


def count(value: float, digits: int = 3) -> str:
    """1,234; 0.57 where it is small."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def requests(number: float) -> str:
    """1 request, 1,234 requests."""
    return "1 request" if round(number) == 1 else f"{number:,.0f} requests"


def billions(value: float) -> str:
    """70.6 B, as parameters are counted."""
    return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"


def percent(value: float) -> str:
    """24 %; 0.4 %."""
    return f"{value * 100:.0f} %" if abs(value) >= 0.01 or value == 0 else f"{value * 100:.1g} %"


def _in_units(value: float, units: tuple[tuple[float, str], ...], digits: int) -> str:
    most = 1000 - 0.5 * 10 ** (3 - digits)  # what is written as 1000 MB is 1 GB
    size, name = next((unit for unit in units if abs(value) >= unit[0] * most / 1000), units[-1])
    scaled = value / size
    return f"{scaled:.0f} {name}" if abs(scaled) >= most else f"{scaled:.{digits}g} {name}"
