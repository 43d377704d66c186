"""What exactness costs: every product of a Llama-1B step by our kernels, and by oneDNN with prepacked weights.

oneDNN through torch is the fastest path here that changes its order of summation with the number of rows. Both run
the same chain over the same weights, each with what else it needs (activation, residual, rounding), turn about.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.interface import BatchLayout

from .checkpoints import LLAMA_1B
from .work import THREADS

ROWS = (1, 8, 32, 128, 512)
GOAL_ROWS = (8, 32)
GOAL_COST = 0.03
LAYERS = LLAMA_1B.layers
HIDDEN = LLAMA_1B.hidden
Q_WIDTH = LLAMA_1B.heads * LLAMA_1B.head_dim
QKV_WIDTH = Q_WIDTH + 2 * LLAMA_1B.kv_heads * LLAMA_1B.head_dim


@dataclass
class ExactnessResult:
    """Seconds of every round, by rows."""

    exact: dict[int, list[float]] = field(default_factory=dict)
    onednn: dict[int, list[float]] = field(default_factory=dict)

    def cost(self, rows: int) -> float:
        """What the exact chain takes longer, as a share; negative: it is the faster one."""
        ratios = [ours / theirs for ours, theirs in zip(self.exact[rows], self.onednn[rows], strict=True)]
        return median(ratios) - 1

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "exact_seconds": self.exact,
            "onednn_seconds": self.onednn,
            "cost": {rows: self.cost(rows) for rows in self.exact},
            "goal": {"rows": GOAL_ROWS, "cost": GOAL_COST},
        }


def measure_exactness(rounds: int) -> ExactnessResult:
    """Both chains at each number of rows, `rounds` times, after a first run that does not count."""
    torch.set_num_threads(THREADS)
    weights = _weights()
    exact, onednn = Exact(weights), OneDNN(weights)
    del weights
    result = ExactnessResult()
    for rows in ROWS:
        ids = torch.randint(0, LLAMA_1B.vocab, (rows,))
        onednn.prepare(rows)
        for number in range(rounds + 1):
            ours, theirs = _seconds(exact, ids), _seconds(onednn, ids)
            if number:
                result.exact.setdefault(rows, []).append(ours)
                result.onednn.setdefault(rows, []).append(theirs)
        print(f"exactness at {rows} rows: {result.cost(rows):+.1%}", file=sys.stderr)
    return result


def _weights() -> dict[str, list[Tensor]]:
    """Of every layer, so that they come from memory as in a real step; the embeddings are the head too."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).bfloat16()

    shapes = {
        "qkv": (QKV_WIDTH, HIDDEN),
        "o": (HIDDEN, Q_WIDTH),
        "gate": (LLAMA_1B.mlp, HIDDEN),
        "up": (LLAMA_1B.mlp, HIDDEN),
        "down": (HIDDEN, LLAMA_1B.mlp),
    }
    layers = {name: [matrix(*shape) for _ in range(LAYERS)] for name, shape in shapes.items()}
    return layers | {"head": [matrix(LLAMA_1B.vocab, HIDDEN)]}


def _seconds(chain: Exact | OneDNN, ids: Tensor) -> float:
    begin = time.perf_counter()
    chain(ids)
    return time.perf_counter() - begin


class Exact:
    """Our kernels, as a recorded step."""

    def __init__(self, weights: dict[str, list[Tensor]]) -> None:
        self.kernels = kernels = CpuKernels(torch.bfloat16, THREADS)
        self.qkv = [kernels.pack([matrix]) for matrix in weights["qkv"]]
        self.o = [kernels.pack([matrix], shards=_shards(Q_WIDTH)) for matrix in weights["o"]]
        pairs = zip(weights["gate"], weights["up"], strict=True)
        self.up = [kernels.pack(pair, activation="silu", gated=True) for pair in pairs]
        self.down = [kernels.pack([matrix], shards=_shards(LLAMA_1B.mlp)) for matrix in weights["down"]]
        self.head = kernels.pack(weights["head"])
        self.run = kernels.record(self._forward, max(ROWS))

    def _forward(self, ids: Tensor, _: BatchLayout) -> Tensor:
        linear, convert = self.kernels.linear, self.kernels.convert
        x = self.kernels.embedding(ids, self.head)
        for qkv, o, up, down in zip(self.qkv, self.o, self.up, self.down, strict=True):
            linear(linear(convert(x, torch.bfloat16), qkv)[:, :Q_WIDTH], o, add_to=x)
            linear(linear(convert(x, torch.bfloat16), up), down, add_to=x)
        return self.kernels.linear(convert(x, torch.bfloat16), self.head, dtype=torch.float32)

    def __call__(self, ids: Tensor) -> Tensor:
        count = len(ids)
        zeros = torch.zeros(count, dtype=torch.int64)
        return self.run(ids, BatchLayout((count,), (count,), zeros, zeros, torch.zeros(1, 1, dtype=torch.int32)))


def _shards(width: int) -> tuple[int, ...]:
    return tuple(width // 8 * (index + 1) for index in range(8))


class OneDNN:
    """`mkldnn._linear_pointwise` on weights reordered for the number of rows."""

    def __init__(self, weights: dict[str, list[Tensor]]) -> None:
        self.weights = weights
        self.table = weights["head"][0]

    def prepare(self, rows: int) -> None:
        """Reorder as oneDNN likes it best for so many rows."""
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.packed = {name: [reorder(w, rows) for w in matrices] for name, matrices in self.weights.items()}

    @torch.inference_mode()
    def __call__(self, ids: Tensor) -> Tensor:
        def linear(x: Tensor, weight: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

        x = F.embedding(ids, self.table).float()
        packed = (self.packed[name] for name in ("qkv", "o", "gate", "up", "down"))
        for qkv, o, gate, up, down in zip(*packed, strict=True):
            x += linear(linear(x.bfloat16(), qkv)[:, :Q_WIDTH].contiguous(), o)
            rounded = x.bfloat16()
            x += linear(F.silu(linear(rounded, gate)) * linear(rounded, up), down)
        return linear(x.bfloat16(), self.packed["head"][0]).float()
