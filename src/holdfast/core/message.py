"""How everything that crosses a process border is written: msgspec structs in msgpack, never pickle.

A direction is a tagged union, so a decoder made for it refuses everything else.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Array-encoded and tagged with the class name."""


encode = msgspec.msgpack.Encoder().encode


def decoder(of: Any) -> msgspec.msgpack.Decoder[Any]:
    """A decoder for one direction (a union). It raises `msgspec.ValidationError` on anything else."""
    return msgspec.msgpack.Decoder(of)
