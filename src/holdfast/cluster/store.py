"""The process of the checkpoint store: gives out slots of the shared memory, and knows which block is in which.

Nobody waits for it: an engine that hears nothing goes on without. When it dies the next one reads from the memory
what is there. It reads and writes slots for others alone: for its disk tier (`cluster.tier`), where a block is copied
to when it is complete, behind everything else, and back when it is asked for and has had to make way in memory; and
in the same way for the first machine of a service on several (`cluster.copies`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from functools import partial
from pathlib import Path

import zmq

from holdfast.cache.disk import DiskFile
from holdfast.cache.store import StoreLayout
from holdfast.cluster.child import Control, run_child
from holdfast.cluster.copies import Partner, SecondCopies
from holdfast.cluster.orders import Line, Order
from holdfast.cluster.owner import owner_of
from holdfast.cluster.slots import Store
from holdfast.core import lifecycle, wire
from holdfast.core.boot import Boot
from holdfast.core.checkpoints import ToStore

log = logging.getLogger(__name__)

_LOOK_SECONDS = 1.0


def run(boot: Boot, control: Control, order: Order, _: Line) -> None:
    """Answer engines until told to stop. Raises `ConfigError` for a folder of `--checkpoint-disk` that is not to be
    used, when the service starts; later on it is done without."""
    layout, cache = StoreLayout.of(boot.config, boot.model), boot.config.cache
    open_disk = None
    if cache.checkpoint_disk is not None:
        folder, size = Path(cache.checkpoint_disk), cache.checkpoint_disk_bytes or 0
        open_disk = partial(DiskFile, folder, owner_of(boot), layout, size)
    network, context = boot.network, control.context
    partner = copies = None
    if network is not None and network.is_first:
        copies = SecondCopies(context, network, layout.slot_bytes, Path(boot.endpoints.folder, "generation"))
    elif network is not None:
        partner = Partner(context, network, layout.slot_bytes)
    store = Store(order.descriptors["store"], layout, open_disk, partner)
    if store.tier is not None and order.epoch == 0:
        store.tier.start()
    engines = control.context.socket(zmq.ROUTER)
    engines.bind(boot.endpoints.store)
    control.send(wire.encode(lifecycle.Ready()))
    if len(store.index):
        log.warning("%d blocks of an earlier process are there", len(store.index))
    try:
        serve(store, control, engines, copies)
    finally:
        store.close()
        if copies is not None:
            copies.close()


def serve(store: Store, control: Control, engines: zmq.Socket[bytes], copies: SecondCopies | None = None) -> None:
    """Until told to stop."""
    decode, told = wire.decoder(ToStore).decode, wire.decoder(lifecycle.ToChild).decode
    poller = zmq.Poller()
    poller.register(control, zmq.POLLIN)
    poller.register(engines, zmq.POLLIN)
    others = [other for other in (store.partner, copies) if other is not None]
    for source in (*(other.socket for other in others), *([store.tier.fd] if store.tier is not None else [])):
        poller.register(source, zmq.POLLIN)
    looked = time.monotonic()
    store.look()  # which opens the disk, if that is to be done
    while True:
        readable = dict(poller.poll(int(1000 * store.patience)))
        if control in readable:
            if isinstance(told(control.recv()), lifecycle.Stop):
                return
            store.forget_all()
            if copies is not None:
                copies.renew()
        for other in others:
            if other.socket in readable:
                other.hear(store)
        if engines in readable:
            engine, data = engines.recv_multipart()
            if (answer := store.answer(decode(data), engine)) is not None:
                engines.send_multipart([engine, wire.encode(answer)])
        for engine, found in store.look():
            engines.send_multipart([engine, wire.encode(found)])
        if time.monotonic() - looked >= _LOOK_SECONDS:
            looked = time.monotonic()
            store.give_back()
            states = [other.state for other in (store.tier, copies) if other is not None]
            with contextlib.suppress(zmq.Again):
                for message in (lifecycle.Beat(), *states):
                    control.send(wire.encode(message), zmq.NOBLOCK)


if __name__ == "__main__":
    run_child(run)
