"""Which builds of the CPU kernels run here."""

from __future__ import annotations

from holdfast.core.errors import ConfigError
from holdfast.kernels.cpu.library import Library

NAMES = ("avx512bf16", "avx512", "avx2", "portable")


def builds() -> list[str]:
    """Those of `NAMES` that this processor runs, best first; none when Holdfast was installed without a compiler."""
    return [name for name in NAMES if _runs(name)]


def _runs(name: str) -> bool:
    try:
        Library(name)
    except (ConfigError, OSError):
        return False
    return True
