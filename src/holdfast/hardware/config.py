"""Flags of `holdfast topo`."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.core.errors import ConfigError
from holdfast.core.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineConfig:
    """Machine"""

    file: str | None = option(
        None,
        "What `nvidia-smi topo -m` printed, or a cluster file in YAML; - reads it from stdin. Default: this machine.",
    )
    gpu: str | None = option(None, "Type of the GPUs, as H100 or A100-40GB, when FILE does not say it.")
    json: bool = option(False, "Print all facts as JSON.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TopoConfig:
    """Everything `holdfast topo` can be told."""

    machine: MachineConfig = MachineConfig()

    def check(self) -> None:
        """Raise `ConfigError` for flags that contradict each other."""
        if self.machine.gpu is not None and self.machine.file is None:
            raise ConfigError(f"--gpu {self.machine.gpu}: only together with --file; this machine knows its GPUs")
