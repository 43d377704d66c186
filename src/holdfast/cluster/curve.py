"""Sockets between machines: encrypted (CURVE), and only for those that have the same secret.

Both sides' key pairs are drawn from the secret, so there is nothing else to hand out: a machine that does not have it
can neither read, nor speak, nor pass for another.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils import z85

from holdfast.core.errors import ConfigError

LEAST_BYTES = 16
_DOMAIN = "holdfast"


def read_key(path: str) -> bytes:
    """The secret of `--node-key-file`, without the line's end that an editor leaves. Raises `ConfigError`."""
    try:
        key = Path(path).read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise ConfigError(f"--node-key-file {path}: {error.strerror}") from error
    if len(key) < LEAST_BYTES:
        raise ConfigError(f"--node-key-file {path}: has {len(key)} bytes, at least {LEAST_BYTES} are needed")
    return key


def _keys(key: bytes, role: Literal["first", "node"]) -> tuple[bytes, bytes]:
    """Public and secret key (Z85) of one side."""
    private = z85.encode(
        hashlib.blake2b(hashlib.blake2b(key).digest(), person=role.encode(), digest_size=32).digest()
    )
    return zmq.curve_public(private), private


class _Nodes:
    """Whoever has the nodes' key pair. (The interface is pyzmq's.)"""

    def __init__(self, key: bytes) -> None:
        self._public, _ = _keys(key, "node")

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public


def admit_nodes(context: zmq.Context[zmq.Socket[bytes]], key: bytes) -> ThreadAuthenticator:
    """Have sockets of `context` that `listen` made ask who connects. To be stopped before the context ends."""
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback(_DOMAIN, _Nodes(key))
    return authenticator


def listen(socket: zmq.Socket[bytes], key: bytes) -> None:
    """To be called before `bind`."""
    public, private = _keys(key, "first")
    socket.setsockopt(zmq.IPV6, 1)  # IPv4 as well
    socket.curve_server = True
    socket.curve_publickey, socket.curve_secretkey = public, private
    socket.zap_domain = _DOMAIN.encode()


def reach(socket: zmq.Socket[bytes], key: bytes) -> None:
    """To be called before `connect`."""
    server, _ = _keys(key, "first")
    socket.setsockopt(zmq.IPV6, 1)
    socket.curve_serverkey = server
    socket.curve_publickey, socket.curve_secretkey = _keys(key, "node")
