"""What the bits of tokens and blocks depend on, beside the tokens before: whose the blocks on disk are, and which
machines can serve together."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from holdfast import __version__, kernels
from holdfast.core.boot import Boot
from holdfast.core.config import ServeConfig
from holdfast.core.spec import ModelInfo
from holdfast.hardware.detect import cpu_device, cpu_flags, this_machine
from holdfast.hardware.host import available_memory
from holdfast.models.inspect import fingerprint_of

_LIBRARIES = ("torch", "triton", "flashinfer-python")
_VARIABLES = ("HOLDFAST_CPU_ISA", "HOLDFAST_CPU_LIBRARY", "CUDA_VISIBLE_DEVICES")


def owner_of(boot: Boot) -> str:
    """The checkpoint, the format of keys and values, and the backend: as a digest, and the model's path to read.

    Which backend serves a device only the workers know, who load torch; what decides it is known here: the devices,
    and the builds of what runs on them. Raises `StartupError` when the driver of the GPUs fails.
    """
    model, device, cache = boot.config.model, boot.config.device, boot.config.cache
    gpus = [] if device.device == "cpu" else [(each.name, each.capability) for each in this_machine().devices]
    settings = (model.dtype, model.quantized_activations, device.device, device.exactness, device.attention_backend)
    formats = (cache.block_size, cache.kv_cache_dtype)
    matters = (boot.stamp, settings, formats, gpus, _instructions(), _builds())
    return f"{hashlib.blake2b(repr(matters).encode(), digest_size=16).hexdigest()} of {boot.model.path}"


def identity_of(config: ServeConfig, model: ModelInfo) -> dict[str, str]:
    """What tokens depend on here, and the service's own flags do not say: by names for the user. Raises
    `StartupError` when the driver of the GPUs fails."""
    gpus = [] if config.device.device == "cpu" else this_machine().devices
    return {
        "Holdfast": __version__,
        **{name: _version(name) or "none" for name in _LIBRARIES},
        "checkpoint": fingerprint_of(model),
        "GPUs": ", ".join(sorted({each.name for each in gpus if each.name != "cpu"})) or "none",
        "CPU instructions": f"{_instructions()} {os.environ.get(_VARIABLES[0], '')}".strip(),
    }


def difference(one: Mapping[str, str], other: Mapping[str, str], device: str) -> str:
    """Where two identities are not the same: `torch: 2.11 there, 2.13 here`; without what does not matter on this
    device."""
    names = [name for name in {**one, **other} if (name, device) != ("GPUs", "cpu")]
    found = [name for name in names if one.get(name) != other.get(name)]
    return "; ".join(f"{name}: {other.get(name)} there, {one.get(name)} here" for name in found)


def _instructions() -> str:
    return cpu_device(1, available_memory(), cpu_flags()).capability


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _builds() -> list[object]:
    """Versions of what computes, and the compiled kernels as they lie there."""
    found: list[object] = [__version__, *(os.environ.get(name) for name in _VARIABLES)]
    found += [_version(name) for name in _LIBRARIES]
    for library in sorted(Path(kernels.__path__[0], "cpu").glob("_library*")):
        stat = library.stat()
        found.append((library.name, stat.st_size, stat.st_mtime_ns))
    return found
