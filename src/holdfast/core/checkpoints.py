"""Messages between an engine and the checkpoint store; like all others msgspec structs in msgpack.

    engine ──ToStore──▶ store ──FromStore──▶ that engine

A block is named by its prefix hash, which says all that comes before it, too.
"""

from __future__ import annotations

from holdfast.core.message import Message


class Keep(Message, frozen=True):
    """Slots are wanted for these blocks. Answered by `Kept`."""

    blocks: list[tuple[bytes, bytes]]
    """Each with the one before it."""


class Find(Message, frozen=True):
    """How many of these, which follow each other, are there? Answered by `Found`."""

    key: str
    blocks: list[bytes]


class Forget(Message, frozen=True):
    """These were not written after all, or not as they should be. Not answered."""

    blocks: list[bytes]


ToStore = Keep | Find | Forget


class Kept(Message, frozen=True):
    """The slot of each block that was asked for; -1 when there is nothing to write: it is there, or has no room."""

    slots: list[tuple[bytes, int]]


class Found(Message, frozen=True):
    """The slots of the first of the blocks, as many as are there. What is in them is for the reader to check."""

    key: str
    slots: list[int]
    more: bool = False
    """Others of them are on disk: it is worth asking again for what is missing, once these have been fetched."""


FromStore = Kept | Found

# --- between the stores of machines: `cluster.copies` ----------------------------------------------


class Offer(Message, frozen=True):
    """A node has these blocks. Answered by `Want`. `generation`: the last that it heard of, None: of none yet."""

    generation: str | None
    number: int
    blocks: list[bytes]


class Seek(Message, frozen=True):
    """A node lacks these, which follow each other. Answered by copies of the first, as many as there are,
    or fit in one go, and by `Sought`."""

    blocks: list[bytes]


class Copy(Message, frozen=True):
    """A block; two more frames have the checksums of its cells and these."""

    generation: str
    block: bytes
    before: bytes


ToFirstStore = Offer | Seek | Copy


class Want(Message, frozen=True):
    """Of what was offered, copies of these are wanted."""

    generation: str
    number: int
    blocks: list[bytes]


class Sought(Message, frozen=True):
    """So many of what was sought, beginning with this block, have been sent."""

    generation: str
    first: bytes
    count: int


ToNodeStore = Want | Copy | Sought
