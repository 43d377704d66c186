"""Which backend serves a device."""

from __future__ import annotations

from holdfast.kernels.interface import Kernels
from holdfast.kernels.reference import ReferenceKernels


def select_kernels(device: str) -> Kernels:
    """The backend for a torch device type ("cpu", "cuda"). Today: `reference`, which runs on every one."""
    return ReferenceKernels()
