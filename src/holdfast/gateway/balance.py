"""Which replica a request goes to. Pure: loads in, a choice out."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

STRETCH = 64
"""Tokens by which prompts are compared: two that share fewer at their beginning are strangers."""
MAX_STRETCHES = 64
"""That are looked at of a prompt: 4,096 tokens tell prompts apart well enough."""
REMEMBERED = 100_000
"""Beginnings that are remembered, the latest."""
SLACK = 4
"""Requests that a replica may have beyond twice what another has, and still get those whose beginning it knows."""


class Balancer:
    """To the replica that has seen the longest beginning of the prompt, and so holds its keys and values; unless it
    is much busier than another. Otherwise to the less busy of two drawn at random (Mitzenmacher, "The power of two
    choices in randomized load balancing"), which does not send everything to one as the least of all would."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._known: OrderedDict[bytes, int] = OrderedDict()
        """Digest of a beginning → the replica it last went to."""

    def choose(self, prompt: Sequence[int], loads: Mapping[int, int]) -> int:
        """`loads`: requests of each replica that can take one; at least one."""
        if len(loads) == 1:
            return next(iter(loads))
        digests = _beginnings(prompt)
        chosen = self._knowing(digests, loads)
        if chosen is None:
            chosen = min(self._random.sample(sorted(loads), 2), key=lambda replica: (loads[replica], replica))
        for digest in digests:
            self._known[digest] = chosen
            self._known.move_to_end(digest)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return chosen

    def _knowing(self, digests: Sequence[bytes], loads: Mapping[int, int]) -> int | None:
        for digest in reversed(digests):
            replica = self._known.get(digest)
            if replica is not None and replica in loads:
                busy = loads[replica] > 2 * min(loads.values()) + SLACK
                return None if busy else replica
        return None


def _beginnings(prompt: Sequence[int]) -> list[bytes]:
    """A digest for every whole stretch from the start on, each of all tokens before its end."""
    digest, digests = blake2b(digest_size=16), []
    for end in range(STRETCH, min(len(prompt), STRETCH * MAX_STRETCHES) + 1, STRETCH):
        digest.update(b",".join(b"%d" % token for token in prompt[end - STRETCH : end]) + b";")
        digests.append(digest.digest())
    return digests
