"""The gateway's process."""

from __future__ import annotations

import asyncio

import uvloop
import zmq.asyncio

from holdfast.cluster.child import Control, run_child
from holdfast.cluster.orders import Line, Order
from holdfast.core.boot import Boot
from holdfast.gateway.main import run


def body(boot: Boot, control: Control, order: Order, _: Line) -> None:
    async def main() -> None:
        await run(boot, zmq.asyncio.Socket.shadow(control), order)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


if __name__ == "__main__":
    run_child(body)
