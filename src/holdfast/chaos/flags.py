"""Flags of the service under test, as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def value_of(flag: str, flags: Sequence[str]) -> str | None:
    """What `flags` say of one of them, the last time they do; None if they do not."""
    found = None
    for given, following in pairwise([*flags, ""]):
        name, equals, value = given.partition("=")
        if name == flag:
            found = value if equals else following
    return found
