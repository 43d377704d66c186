"""The gateway's sockets to and from the engines."""

from __future__ import annotations

import zmq
import zmq.asyncio

from holdfast.core.boot import RECONNECT_MS, Endpoints
from holdfast.core.wire import EngineReady, Hello, ToEngine, ToGateway, decoder, encode


class Engines:
    """By number of their replica. Each is greeted with the `epoch` of this gateway."""

    def __init__(self, endpoints: Endpoints, count: int, epoch: int) -> None:
        """Binds the gateway's PULL."""
        self._endpoints = endpoints
        self._epoch = epoch
        self._context = zmq.Context()
        self._incoming = zmq.asyncio.Socket(self._context, zmq.PULL)
        self._incoming.set_hwm(0)
        self._incoming.bind(endpoints.gateway)
        self._serials = [0] * count
        self._outgoing = [self._connect(replica) for replica in range(count)]
        self._decode = decoder(ToGateway).decode

    async def receive(self) -> ToGateway:
        """What any of them says next to this gateway, and to no earlier one."""
        while True:
            message: ToGateway = self._decode(await self._incoming.recv())
            if message.gateway == self._epoch:
                return message

    def send(self, replica: int, message: ToEngine) -> None:
        self._outgoing[replica].send(encode(message), zmq.NOBLOCK)

    def is_answer(self, ready: EngineReady) -> bool:
        """Whether it answers the last greeting: else it was on its way when its replica was lost."""
        return ready.serial == self._serials[ready.replica]

    def renew(self, replica: int) -> None:
        """The engine, with what it had not read, or the way to it is gone: what is sent from now on is for the
        next one."""
        self._outgoing[replica].close(linger=0)
        self._serials[replica] += 1
        self._outgoing[replica] = self._connect(replica)

    def close(self) -> None:
        self._incoming.close(linger=0)
        for socket in self._outgoing:
            socket.close(linger=0)
        self._context.term()

    def _connect(self, replica: int) -> zmq.Socket[bytes]:
        # a plain socket: with no limit on its queue a send never waits, so `abort` works in any `finally`
        socket = self._context.socket(zmq.PUSH)
        socket.set_hwm(0)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.connect(self._endpoints.engine(replica))
        socket.send(encode(Hello(self._epoch, self._serials[replica])), zmq.NOBLOCK)
        return socket
