"""Compile the Triton kernels for a GPU that is not there: `python -m support.compiled 90 few|all`.

The launches of `CudaKernels` are made with small tensors of the CPU, whose addresses nobody follows; Triton compiles
each down to a cubin, and nothing is run. `all` takes a quarter of an hour.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelInterface

from holdfast.core.spec import Activation
from holdfast.kernels.cuda.kernels import CudaKernels
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads, Matrix, Routing
from support.cpu import generator, matrix

PRODUCTS: list[tuple[Activation | None, bool, tuple[int, ...]]] = [
    ("silu", True, ()),
    (None, False, (32, 64, 128)),
    (None, False, tuple(range(8, 129, 8))),
    (None, False, tuple(range(16, 129, 16))),
    ("gelu", True, ()),
    ("gelu_tanh", False, ()),
    ("relu", False, ()),
]
"""(activation, gated, shards)"""


SHARED = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes of shared memory a program can have, by compute capability."""
INSTRUCTION = re.compile(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n\d+(k\d+)\.(?:row\.col\.)?([.\w]+)")
"""A matrix instruction: its rows, its step along K, its types. How many columns it has, changes no sum."""


class NoDriver:
    """Stands where the driver of a GPU would."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def layout(query: int, context: int) -> BatchLayout:
    """One request over blocks of 16."""
    positions = torch.arange(context - query, context)
    return BatchLayout(
        (query,), (context,), positions, positions, torch.zeros(1, -(-context // 16), dtype=torch.int32)
    )


class Launches:
    """Every launch there is for one dtype; `few`: one of each kernel."""

    def __init__(self, dtype: torch.dtype, few: bool, num_stages: int) -> None:
        self.dtype, self.few, self.kernels = dtype, few, CudaKernels(dtype, num_stages=num_stages)

    def make(self) -> None:
        self.rows()
        formats = ["dense", "Q4_1", "FP8"] if self.few else ["dense", "Q8_0", "Q4_0", "Q4_1", "FP8"]
        for kind in formats[:1] if self.dtype == torch.float32 else formats:
            self.linear(kind)
            self.experts(kind)
        for head_dim in [128] if self.few else [40, 64, 80, 96, 128, 256]:
            self.attention(head_dim)

    def matrix(self, kind: str, rows: int, columns: int) -> Matrix:
        part = matrix("float32" if kind == "dense" else kind, rows, columns, generator(0))[0]
        return part.to(self.dtype) if isinstance(part, Tensor) else part

    def linear(self, kind: str) -> None:
        kernels, parts, biases = self.kernels, [self.matrix(kind, 96, 128)] * 2, [torch.zeros(96)] * 2
        for count, add in [(1, False), (300, True)] if self.few else product((1, 40, 300), (False, True)):
            x, stream = torch.zeros(count, 128, dtype=self.dtype), torch.zeros(count, 96) if add else None
            for activation, gated, shards in PRODUCTS[: 2 if self.few else None]:
                number = 1 + gated
                packed = kernels.pack(
                    parts[:number], biases[:number], activation=activation, gated=gated, shards=shards
                )
                kernels.linear(x, packed, add_to=stream)
        table, ids = kernels.pack(parts[:1]), torch.zeros(3, dtype=torch.int64)
        kernels.embedding(ids, table, add_to=kernels.embedding(ids, table))

    def experts(self, kind: str) -> None:
        kernels = self.kernels
        ups = [kernels.pack([self.matrix(kind, 96, 128)] * 2, activation="silu", gated=True) for _ in range(5)]
        downs = [kernels.pack([self.matrix(kind, 128, 96)], shards=(32, 96)) for _ in range(5)]
        for count in [100] if self.few else [1, 100]:
            x = torch.zeros(count, 128, dtype=self.dtype)
            kernels.experts(x, torch.zeros(count, 5), Routing(2, True), ups, downs)

    def rows(self) -> None:
        kernels, x, norm = self.kernels, torch.zeros(3, 96), torch.ones(96)
        kernels.rms_norm(x, norm, 1e-5, self.dtype)
        kernels.layer_norm(x, norm, norm, 1e-5, torch.float32, add_to=x)
        kernels.softcap(kernels.convert(kernels.convert(x, self.dtype), torch.float32), 30.0)
        ids, ones, logits = torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3, 5000)
        kernels.argmax(kernels.filter_logits(kernels.add_gumbel_noise(logits, ids, ids), ids, ones, ones))

    def attention(self, head_dim: int) -> None:
        norm = torch.ones(head_dim)
        heads = Heads(6, 2, head_dim, torch.zeros(3000, 2, head_dim // 2), norm, norm, 1e-5)
        k_pages, v_pages = torch.zeros(2, 200, 2, 16, head_dim, dtype=self.dtype)
        options = list(product((None, 100), (None, 5.0), (None, torch.zeros(6))))
        for query, context in ((1, 3000), (50, 60)):
            qkv, batch = torch.zeros(query, 10 * head_dim, dtype=self.dtype), layout(query, context)
            q = self.kernels.store_kv(qkv, heads, k_pages, v_pages, batch)
            for window, cap, slopes in options if head_dim == 40 else [options[0]]:
                self.kernels.attention(q, heads, k_pages, v_pages, batch, AttentionOptions(0.1, cap, window, slopes))


def instructions(ptx: str) -> frozenset[tuple[str, ...]]:
    return frozenset(INSTRUCTION.findall(ptx))


def main() -> None:
    capability, few = int(sys.argv[1]), sys.argv[2] == "few"
    compiled: list[str] = []
    products: defaultdict[tuple[Any, ...], set[frozenset[Any]]] = defaultdict(set)

    def compile_only(self: JITFunction[Any], grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            kernel = self.run(*args, grid=grid, warmup=True, **options)
            assert kernel.metadata.shared <= SHARED[capability], (kernel.name, kernel.metadata.shared)
            if options.get("FORMAT") == 0 and kernel.name == "linear_kernel" and options["DOT"] != tl.float32:
                assert options["STAGE"].value == 2 or "cp.async" in kernel.asm["ptx"], (
                    "loads one number after the other"
                )
            compiled.append(kernel.name)
            products[kernel.name, options.get("FORMAT"), options.get("DOT")] |= {instructions(kernel.asm["ptx"])}

        return launch

    KernelInterface.__getitem__ = compile_only
    triton.runtime.driver.set_active(NoDriver(capability))
    for dtype in [torch.bfloat16] if few else [torch.bfloat16, torch.float16, torch.float32]:
        Launches(dtype, few, 3 if SHARED[capability] > 150_000 else 2).make()
    for key, used in products.items():
        assert len(used - {frozenset()}) <= 1, f"{key}: one tile sums otherwise than another: {used}"
    print(" ".join(sorted(set(compiled))))


if __name__ == "__main__":
    main()
