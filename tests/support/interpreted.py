"""Triton's interpreter, made to sum as a device does."""

from __future__ import annotations

import numpy as np


def sum_in_one_order() -> None:
    """The interpreter multiplies matrices by numpy, which sums in another order for other shapes, on most processors.
    A device's instructions do not. In float64, rounded once, the order does not show."""
    from triton.runtime import interpreter  # noqa: PLC0415 - not on machines without triton

    def create_dot(self, a, b, d, *how):
        products = np.matmul(a.data, b.data, dtype=np.float64)
        return interpreter.TensorHandle((products + d.data).astype(d.data.dtype), d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
