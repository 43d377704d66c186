"""How sizes, rates and times are written for people: three digits, SI units."""

from __future__ import annotations

BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (1, "B"))
PLAIN = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
SECONDS = ((1, "s"), (1e-3, "ms"), (1e-6, "µs"))


def of_bytes(value: float) -> str:
    """17.6 GB."""
    return _in_units(value, BYTES)


def bytes_per_second(value: float) -> str:
    """2.04 TB/s."""
    return f"{_in_units(value, BYTES)}/s"


def flops(value: float) -> str:
    """312 TFLOP/s."""
    return f"{_in_units(value, PLAIN)}FLOP/s"


def of_seconds(value: float) -> str:
    """4.1 ms, 2.3 s."""
    return _in_units(value, SECONDS)


def count(value: float) -> str:
    """1,234; 0.57 where it is small."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def requests(number: float) -> str:
    """1 request, 1,234 requests."""
    return "1 request" if round(number) == 1 else f"{number:,.0f} requests"


def billions(value: float) -> str:
    """70.6 B, as parameters are counted."""
    return f"{value / 1e9:.3g} B" if value >= 1e9 else f"{value / 1e6:.3g} M"


def percent(value: float) -> str:
    """24 %; 0.4 %."""
    return f"{value * 100:.0f} %" if abs(value) >= 0.01 or value == 0 else f"{value * 100:.1g} %"


def _in_units(value: float, units: tuple[tuple[float, str], ...]) -> str:
    # From 999.5 MB on it is 1 GB.
    size, name = next((unit for unit in units if abs(value) >= unit[0] * 0.9995), units[-1])
    scaled = value / size
    return f"{scaled:.0f} {name}" if abs(scaled) >= 999.5 else f"{scaled:.3g} {name}"
