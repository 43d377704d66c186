"""A child process that is ready at once and does nothing: what it is told to say of its GPU is in IDLER_GPUS, as
JSON, by name."""

from __future__ import annotations

import json
import os
import sys

from holdfast.cluster.child import Control, run_child
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot


def run(boot: Boot, control: Control) -> None:
    gpus = json.loads(os.environ["IDLER_GPUS"])
    control.send(wire.encode(lifecycle.Ready(gpu=gpus.get(sys.argv[1], ""))))
    decode = wire.decoder(lifecycle.ToChild).decode
    while not isinstance(decode(control.recv()), lifecycle.Stop):
        pass


if __name__ == "__main__":
    run_child(run)
