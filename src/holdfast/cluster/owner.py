"""Whose the blocks on disk are: what their bits depend on, beside their tokens."""

from __future__ import annotations

import hashlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from holdfast import __version__, kernels
from holdfast.core.boot import Boot
from holdfast.hardware.detect import cpu_device, cpu_flags, this_machine
from holdfast.hardware.host import available_memory

_VARIABLES = ("HOLDFAST_CPU_ISA", "HOLDFAST_CPU_LIBRARY", "CUDA_VISIBLE_DEVICES")


def owner_of(boot: Boot) -> str:
    """The checkpoint, the format of keys and values, and the backend: as a digest, and the model's path to read.

    Which backend serves a device only the workers know, who load torch; what decides it is known here: the devices,
    and the builds of what runs on them. Raises `StartupError` when the driver of the GPUs fails.
    """
    model, device, cache = boot.config.model, boot.config.device, boot.config.cache
    gpus = [] if device.device == "cpu" else [(each.name, each.capability) for each in this_machine().devices]
    instructions = cpu_device(1, available_memory(), cpu_flags()).capability
    settings = (model.dtype, model.quantized_activations, device.device, device.exactness, device.attention_backend)
    formats = (cache.block_size, cache.kv_cache_dtype)
    matters = (boot.stamp, settings, formats, gpus, instructions, _builds())
    return f"{hashlib.blake2b(repr(matters).encode(), digest_size=16).hexdigest()} of {boot.model.path}"


def _builds() -> list[object]:
    """Versions of what computes, and the compiled kernels as they lie there."""
    found: list[object] = [__version__, *(os.environ.get(name) for name in _VARIABLES)]
    for name in ("torch", "triton", "flashinfer-python"):
        try:
            found.append(version(name))
        except PackageNotFoundError:
            found.append(None)
    for library in sorted(Path(kernels.__path__[0], "cpu").glob("_library*")):
        stat = library.stat()
        found.append((library.name, stat.st_size, stat.st_mtime_ns))
    return found
