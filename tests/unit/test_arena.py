"""Where packed weights live."""

from __future__ import annotations

from holdfast.kernels.cpu.memory import Arena


def test_memory_goes_to_the_next_of_its_size():
    """Experts come and go while a model is served: what one leaves, the next of its size takes."""
    arena = Arena()
    first, second = arena.take(1000), arena.take(1000)
    assert first.ctypes.data % 64 == second.ctypes.data % 64 == 0
    left = first.ctypes.data
    del first
    assert arena.take(2000).ctypes.data != left
    third = arena.take(1000)
    assert third.ctypes.data == left
    assert third.ctypes.data != second.ctypes.data
