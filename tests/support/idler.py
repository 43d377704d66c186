"""A child process that is ready at once and does nothing: what it is told to say of its GPU is in IDLER_GPUS, as
JSON, by name."""

from __future__ import annotations

import json
import os

from holdfast.cluster.child import Control, run_child
from holdfast.cluster.orders import Line, Order
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot


def run(boot: Boot, control: Control, order: Order, _: Line) -> None:
    gpus = json.loads(os.environ["IDLER_GPUS"])
    control.send(wire.encode(lifecycle.Ready(gpu=gpus.get(order.name, ""))))
    decode = wire.decoder(lifecycle.ToChild).decode
    while not isinstance(decode(control.recv()), lifecycle.Stop):
        pass


if __name__ == "__main__":
    run_child(run)
