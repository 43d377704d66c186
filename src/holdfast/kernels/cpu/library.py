"""The compiled kernels: finding the library, choosing the build for this processor, calling it."""

from __future__ import annotations

import ctypes
import os
import sysconfig
from collections.abc import Sequence
from ctypes import POINTER, Array, byref, c_char_p, c_int64, c_void_p
from pathlib import Path

from holdfast.core.errors import ConfigError
from holdfast.kernels.cpu.structs import CONSTANTS, OPERATIONS, Batch, Counter, Endpoint, Op, Slots, Tally, Weight

ISA_VARIABLE = "HOLDFAST_CPU_ISA"
"""Names the build to use instead of the best: avx512bf16, avx512, avx2 or portable. For tests."""
LIBRARY_VARIABLE = "HOLDFAST_CPU_LIBRARY"
"""Path of another build of the library. For tests: one with sanitizers."""


class Library:
    """The shared library and one of its builds. Raises `OSError` if it was not compiled when Holdfast was installed
    or cannot be loaded, `ConfigError` if `isa` (or $HOLDFAST_CPU_ISA) names no build that runs here."""

    def __init__(self, isa: str | None = None) -> None:
        path = _path()
        self._c = ctypes.CDLL(str(path))
        try:
            self._declare()
        except AttributeError as error:
            raise OSError(f"{path} is not Holdfast's library of kernels: {error}") from error
        self._check_mirrors()
        wanted = isa or os.environ.get(ISA_VARIABLE) or None
        builds = self._builds()
        if wanted is not None and wanted not in builds:
            raise ConfigError(f"{ISA_VARIABLE}={wanted}: must be one of {', '.join(builds)} on this processor")
        self.isa = wanted or next(iter(builds))
        self._isa = builds[self.isa]
        self.dots_bf16 = bool(self._c.holdfast_isa_dots_bf16(self._isa))
        """Whether linear takes bfloat16 rows; elsewhere they are converted to float32 before."""

    def _declare(self) -> None:
        signatures: dict[str, tuple[type | None, list[object]]] = {
            "isa": (c_void_p, [c_int64]),
            "isa_name": (c_char_p, [c_void_p]),
            "isa_supported": (c_int64, [c_void_p]),
            "isa_dots_bf16": (c_int64, [c_void_p]),
            "struct_bytes": (c_int64, [c_int64]),
            "constant": (c_int64, [c_int64]),
            "team_start": (c_void_p, [c_int64, c_void_p]),
            "team_stop": (None, [c_void_p]),
            "run": (None, [c_void_p, c_void_p, c_void_p, c_int64, c_void_p]),
            "give_up": (None, [c_void_p, c_void_p, c_int64]),
            "pack_dense": (None, [POINTER(Weight), c_void_p, c_int64, c_int64]),
            "pack_groups": (None, [POINTER(Weight), c_void_p, c_int64, c_int64]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(self._c, f"holdfast_{name}")
            function.restype, function.argtypes = result, arguments

    def _check_mirrors(self) -> None:
        """That C and Python mean the same: a library from another version of Holdfast would compute nonsense."""
        structs: tuple[type[ctypes.Structure], ...] = (
            Batch,
            Weight,
            Op,
            Counter,
            Tally,
            Endpoint,
            Slots,
            *OPERATIONS,
        )
        for index, struct in enumerate(structs):
            found = self._c.holdfast_struct_bytes(index)
            assert found == ctypes.sizeof(struct), f"{struct.__name__}: C has {found} bytes"
        assert self._c.holdfast_struct_bytes(len(structs)) == -1
        assert tuple(self._c.holdfast_constant(i) for i in range(len(CONSTANTS))) == CONSTANTS
        assert self._c.holdfast_constant(len(CONSTANTS)) == -1

    def _builds(self) -> dict[str, int]:
        """Those this processor runs, best first."""
        builds = {}
        index = 0
        while isa := self._c.holdfast_isa(index):
            if self._c.holdfast_isa_supported(isa):
                builds[self._c.holdfast_isa_name(isa).decode()] = isa
            index += 1
        return builds

    def start_team(self, threads: int, cpus: Sequence[int] | None) -> int:
        """See csrc/team.h; `threads` >= 1. Raises `ConfigError` when they cannot be had."""
        assert threads >= 1, threads
        pinned = (c_int64 * threads)(*cpus) if cpus else None
        team = self._c.holdfast_team_start(threads, pinned)
        if not team:
            raise ConfigError(f"cannot start {threads} CPU threads: the system has no more of them, or no memory")
        return int(team)

    def stop_team(self, team: int) -> None:
        self._c.holdfast_team_stop(team)

    def run(self, team: int, ops: Array[Op], batch: Batch) -> None:
        """Run the operations in order. Releases the GIL."""
        self._c.holdfast_run(team, self._isa, ops, len(ops), byref(batch))

    def give_up(self, aborted: int, counters: int, count: int) -> None:
        """Set the flag at `aborted`, and wake all who sleep at the `count` counters from this address on."""
        self._c.holdfast_give_up(aborted, counters, count)

    def pack_dense(self, weight: Weight, rows: int, stride: int, half: int) -> None:
        self._c.holdfast_pack_dense(byref(weight), rows, stride, half)

    def pack_groups(self, weight: Weight, rows: int, row_bytes: int, half: int) -> None:
        self._c.holdfast_pack_groups(byref(weight), rows, row_bytes, half)


def _path() -> Path:
    if chosen := os.environ.get(LIBRARY_VARIABLE):
        return Path(chosen)
    path = Path(__file__).with_name(f"_library{sysconfig.get_config_var('EXT_SUFFIX')}")
    if not path.exists():
        raise FileNotFoundError(f"no compiled kernels at {path}: was a C compiler there when Holdfast was installed?")
    return path
