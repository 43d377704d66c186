"""A file of records: each is there whole or not at all, whatever killed its writer.

[length: 4 bytes][CRC-32 of the record: 4 bytes][record] …
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from holdfast.core.errors import ConfigError

_HEAD = struct.Struct("<II")


class LogFile:
    """Made, with its folder, if it is not there; readable by its owner alone. One process has it at a time.

    `sync`: what a record survives once `append` returns: `os` the process, `disk` the machine's power, too.
    """

    def __init__(self, path: Path, sync: Literal["os", "disk"] = "os") -> None:
        """Raises `ConfigError` when the file cannot be had."""
        self.path = path
        self._sync = sync == "disk"
        self.size = 0
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"token log {path}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"token log {path}: another service writes it") from None

    def read(self) -> Iterator[bytes]:
        """Its records, up to the first that is not whole."""
        data = memoryview(self.path.read_bytes())
        at = 0
        while at + _HEAD.size <= len(data):
            length, checksum = _HEAD.unpack_from(data, at)
            record = data[at + _HEAD.size : at + _HEAD.size + length]
            if len(record) < length or zlib.crc32(record) != checksum:
                return
            yield bytes(record)
            at += _HEAD.size + length

    def append(self, record: bytes) -> None:
        """Raises `OSError`; the file ends in rubbish then, and wants `replace`."""
        self._write(self._fd, _HEAD.pack(len(record), zlib.crc32(record)) + record)
        self.size += _HEAD.size + len(record)

    def replace(self, records: Iterable[bytes]) -> None:
        """Have these records instead of what there is: all of them or, if it raises `OSError`, none."""
        new = self.path.with_suffix(".new")
        data = b"".join(_HEAD.pack(len(record), zlib.crc32(record)) + record for record in records)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._write(fd, data)
            os.replace(new, self.path)
            if self._sync:
                self._sync_folder()
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self.size = fd, len(data)

    def _sync_folder(self) -> None:
        """So that the new file's name, too, survives."""
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._lock)

    def _write(self, fd: int, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        if self._sync:
            os.fdatasync(fd)
