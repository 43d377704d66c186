"""What the decoder promises its kernels, which may record a step and run it again without the decoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from holdfast.kernels.reference import ReferenceKernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from support.cases import CASES
from support.checkpoints import Driver, random_model, save

ARRANGEMENTS = [
    "llama, grouped queries, llama3 rope",
    "gemma3, one KV head, soft-cap",
    "gpt2",
    "opt",
    "opt, norms after",
    "bloom, heads not a power of two",
    "falcon 7b: multi-query",
    "falcon 40b: grouped, two norms",
    "qwen3_moe, some layers dense",
]


class Watched:
    """Kernels whose calls are seen: how deep torch is within one, and what went in."""

    def __init__(self) -> None:
        self.kernels = ReferenceKernels()
        self.depth = 0
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(self.kernels, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            self.depth += 1
            try:
                return kernel(*args, **kwargs)
            finally:
                self.depth -= 1

        return call


class OutsideKernels(TorchDispatchMode):
    """Names of torch's operations that make numbers while no kernel runs."""

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self.watched = watched
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watched.depth == 0 and not func.is_view:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", ARRANGEMENTS)
def test_kernels_make_every_number_and_the_residual_stream_is_float32(case: str, tmp_path: Path):
    """An addition of torch's own would be missing from a recorded step."""
    watched = Watched()
    info = inspect_model(save(random_model(**CASES[case]), tmp_path))
    decoder = load_decoder(info, watched, torch.bfloat16, "cpu")
    driver = Driver(decoder, [list(range(9)), list(range(20, 25))])
    forward, logits, outside = decoder.forward, decoder.logits, OutsideKernels(watched)

    def watch(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: Any) -> torch.Tensor:
            with outside:
                return function(*args)

        return run

    decoder.forward, decoder.logits = watch(forward), watch(logits)
    watched.calls.clear()
    driver.step([(0, 7), (1, 5)])
    driver.step([(0, 2)])
    assert outside.seen == []
    assert all(rows.dtype == torch.float32 for parts in driver.logits for rows in parts)
    products = [args[0] for name, args, _ in watched.calls if name in ("linear", "experts")]
    assert {x.dtype for x in products} == {torch.bfloat16}
    streams = [options["add_to"] for _, _, options in watched.calls if options.get("add_to") is not None]
    assert len(streams) >= 2 * 2 * info.spec.num_layers
    assert {stream.dtype for stream in streams} == {torch.float32}


def test_the_watch_sees_arithmetic():
    """So that an empty list means something."""
    outside = OutsideKernels(Watched())
    with outside, torch.inference_mode():
        x = torch.ones(2, 3).view(6)
        _ = x + x
    assert [name for name in outside.seen if "add" in name]
    assert not [name for name in outside.seen if "view" in name]
