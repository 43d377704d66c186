"""Between host and device without waiting for either. On the CPU there is nothing to move."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def upload(numbers: np.ndarray, device: torch.device) -> Tensor:
    """A copy on the device, there when the work that is put on the current stream from now on needs it."""
    tensor = torch.from_numpy(numbers)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Download:
    """A tensor on its way to the host."""

    def __init__(self, tensor: Tensor) -> None:
        self._host, self._event = tensor, None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    @property
    def is_there(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> Tensor:
        """The tensor, once the device has made it."""
        if self._event is not None:
            self._event.synchronize()
        return self._host
