"""Points in the code at which a process can be held, for `holdfast chaos` and tests: faults strike just there.

HOLDFAST_FAULTS names a folder. A file in it called ROLE-at-POINT ("gateway-at-logged") holds the first process of
that role that comes to the point: it renames the file to held-PID-NAME ("held-123-worker 0.0.1") and stops itself.
Whoever made the file kills it there, or lets something happen to others and lets it go on (SIGCONT). The points:

    prefill      worker     a step is about to begin in which a prompt begins to be read
    chunk        worker     the same, in which a prompt is read on: not its first chunk
    decode       worker     the same, in which a request gets its next token
    sampled      worker     a step's tokens are sampled, and the engine does not know them
    sampled      engine     it knows them, and the gateway does not
    logged       gateway    they are in the token log, and no client has them
    queued       engine     a request waits, since as many run as may (--max-num-seqs)
    checkpoint   worker     a block's cells are written into the checkpoint store, and do not count yet
    restore      worker     a block's cells are copied from there, and not checked yet
    recovery     engine     a request comes that goes on, with the tokens it had elsewhere
    loading      worker     it reads its weights
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "HOLDFAST_FAULTS"


class Points:
    """Those of the process called `name` ("worker 0.0.1"); without the variable no file is looked for."""

    def __init__(self, name: str) -> None:
        folder = os.environ.get(VARIABLE)
        self._folder = Path(folder) if folder else None
        self._name = name

    def reach(self, point: str) -> None:
        """Be held here, if somebody wants it."""
        if self._folder is None:
            return
        role = self._name.partition(" ")[0]
        try:
            (self._folder / f"{role}-at-{point}").rename(self._folder / f"held-{os.getpid()}-{self._name}")
        except FileNotFoundError:  # nobody does, or another process was the first
            return
        signal.raise_signal(signal.SIGSTOP)
