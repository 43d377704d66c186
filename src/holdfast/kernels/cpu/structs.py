"""The structs of csrc/ops.h, field for field, and its constants; `library` checks sizes and values."""

from __future__ import annotations

from ctypes import POINTER, Structure, Union, c_float, c_int64, c_uint32, c_void_p
from typing import Any

from holdfast.kernels.interface import GROUP

PANEL = 32
"""Columns of a panel of weights."""
TILE_TOKENS = 16
SPLIT = 1024
"""Tokens of an attention item, and keys of a split."""
MAX_HEAD_DIM = 512
CONSTANTS = (PANEL, GROUP, TILE_TOKENS, SPLIT, MAX_HEAD_DIM)
"""In the order of CONSTANTS in ops.h."""

DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2}
FORMATS = {"float32": 0, "bfloat16": 1, "Q8_0": 2, "Q4_0": 3, "Q4_1": 4}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}


class Rows(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64), ("dtype", c_int64)]


class Batch(Structure):
    _fields_ = [
        ("rows", c_int64),
        ("requests", c_int64),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("tables", c_void_p),
        ("table_width", c_int64),
        ("items", c_void_p),
        ("failed", c_void_p),
        ("moves", c_void_p),
    ]


class Weight(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("bias", c_void_p),
        ("shards", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("panel_bytes", c_int64),
        ("format", c_int64),
        ("num_shards", c_int64),
        ("activation", c_int64),
        ("gated", c_int64),
    ]


class Linear(Structure):
    _fields_ = [
        ("x", Rows),
        ("y", Rows),
        ("weights", POINTER(Weight)),
        ("offsets", c_void_p),
        ("groups", c_int64),
        ("factors", c_void_p),
        ("digits", c_int64),
        ("add", c_int64),
    ]


class Quantize(Structure):
    _fields_ = [
        ("x", Rows),
        ("y", Rows),
        ("factors", c_void_p),
        ("k", c_int64),
        ("per_row", c_int64),
        ("offset", c_int64),
        ("digits", c_int64),
    ]


class Embedding(Structure):
    _fields_ = [
        ("ids", c_void_p),
        ("table", POINTER(Weight)),
        ("y", Rows),
        ("offset", c_int64),
        ("add", c_int64),
        ("scale", c_float),
    ]


class Norm(Structure):
    _fields_ = [
        ("x", Rows),
        ("y", Rows),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("width", c_int64),
        ("centered", c_int64),
        ("add", c_int64),
        ("eps", c_float),
    ]


class Convert(Structure):
    _fields_ = [("x", Rows), ("y", Rows), ("width", c_int64)]


class Softcap(Structure):
    _fields_ = [("x", Rows), ("width", c_int64), ("cap", c_float)]


class Pages(Structure):
    _fields_ = [
        ("k", c_void_p),
        ("v", c_void_p),
        ("kv_heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("dtype", c_int64),
    ]


class StoreKV(Structure):
    _fields_ = [
        ("qkv", Rows),
        ("pages", Pages),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("cos_sin", c_void_p),
        ("heads", c_int64),
        ("rotary", c_int64),
        ("eps", c_float),
    ]


class Attention(Structure):
    _fields_ = [
        ("q", Rows),
        ("y", Rows),
        ("pages", Pages),
        ("alibi", c_void_p),
        ("heads", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
        ("partial", c_void_p),
    ]


class Merge(Attention):
    """The second pass of attention, over the same fields."""


class Route(Structure):
    _fields_ = [
        ("logits", Rows),
        ("ids", c_void_p),
        ("shares", c_void_p),
        ("experts", c_int64),
        ("chosen", c_int64),
        ("renormalize", c_int64),
    ]


class Owners(Structure):
    _fields_ = [("table", c_void_p), ("turns", c_int64), ("experts", c_int64)]


class Sort(Structure):
    _fields_ = [
        ("ids", c_void_p),
        ("owners", Owners),
        ("offsets", c_void_p),
        ("sources", c_void_p),
        ("places", c_void_p),
        ("experts", c_int64),
        ("chosen", c_int64),
        ("self", c_int64),
        ("chosen_counts", c_void_p),
        ("own_count", c_void_p),
    ]


class Gather(Structure):
    _fields_ = [("x", Rows), ("y", Rows), ("sources", c_void_p), ("width", c_int64), ("chosen", c_int64)]


class Combine(Structure):
    _fields_ = [
        ("x", Rows),
        ("y", Rows),
        ("places", c_void_p),
        ("shares", c_void_p),
        ("width", c_int64),
        ("chosen", c_int64),
        ("add", c_int64),
    ]


class Argmax(Structure):
    _fields_ = [("logits", Rows), ("chosen", c_void_p), ("width", c_int64)]


class Noise(Structure):
    _fields_ = [("logits", Rows), ("seeds", c_void_p), ("positions", c_void_p), ("width", c_int64)]


class Filter(Structure):
    _fields_ = [
        ("logits", Rows),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("width", c_int64),
    ]


class Counter(Structure):
    """In shared memory, like `Tally`: on a cache line of its own."""

    _fields_ = [("count", c_uint32), ("sleepers", c_uint32), ("padding", c_int64 * 7)]


class Tally(Structure):
    _fields_ = [
        ("exchanges", c_int64),
        ("bytes_read", c_int64),
        ("waited_ns", c_int64),
        ("idle_ns", c_int64),
        ("steps", c_int64),
        ("step_ns", c_int64),
        ("expert_rows", c_int64),
        ("moves", c_int64),
    ]


class Endpoint(Structure):
    _fields_ = [
        ("aborted", c_void_p),
        ("tally", c_void_p),
        ("timeout_ns", c_int64),
        ("failed", c_int64),
    ]


FAILED_ABORTED, FAILED_LATE = 1, 2


class Slots(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("slot_bytes", c_int64),
        ("depth", c_int64),
        ("clock", c_void_p),
        ("ahead", c_int64),
    ]


class Meet(Structure):
    _fields_ = [
        ("end", POINTER(Endpoint)),
        ("own", c_void_p),
        ("others", c_void_p),
        ("num_others", c_int64),
        ("clock", c_void_p),
        ("ahead", c_int64),
        ("idle", c_int64),
    ]


class Move(Structure):
    _fields_ = [
        ("x", Rows),
        ("slots", Slots),
        ("tally", c_void_p),
        ("width", c_int64),
        ("part", c_int64),
        ("parts", c_int64),
        ("take", c_int64),
    ]


class Join(Structure):
    _fields_ = [
        ("y", Rows),
        ("sources", POINTER(Slots)),
        ("joins", c_void_p),
        ("pieces", c_int64),
        ("others", c_int64),
        ("tally", c_void_p),
        ("bias", c_void_p),
        ("width", c_int64),
        ("add", c_int64),
    ]


class Collect(Structure):
    _fields_ = [
        ("y", Rows),
        ("sources", POINTER(Slots)),
        ("starts", c_void_p),
        ("ranks", c_int64),
        ("self", c_int64),
        ("tally", c_void_p),
    ]


class Deal(Structure):
    _fields_ = [
        ("x", Rows),
        ("slots", Slots),
        ("ids", c_void_p),
        ("places", c_void_p),
        ("owners", Owners),
        ("width", c_int64),
        ("chosen", c_int64),
        ("self", c_int64),
    ]


class Reunite(Structure):
    _fields_ = [
        ("y", Rows),
        ("sources", POINTER(Slots)),
        ("is_mine", c_void_p),
        ("joins", c_void_p),
        ("ids", c_void_p),
        ("owners", Owners),
        ("shares", c_void_p),
        ("width", c_int64),
        ("chosen", c_int64),
        ("pieces", c_int64),
        ("tally", c_void_p),
        ("add", c_int64),
    ]


class Pause(Structure):
    _fields_ = [("ns", c_int64), ("row_ns", c_int64)]


OPERATIONS: tuple[type[Structure], ...] = (
    Linear,
    Quantize,
    Embedding,
    Norm,
    Convert,
    Softcap,
    StoreKV,
    Attention,
    Merge,
    Route,
    Sort,
    Gather,
    Combine,
    Argmax,
    Noise,
    Filter,
    Meet,
    Move,
    Join,
    Collect,
    Deal,
    Reunite,
    Pause,
)
"""In the order of OPERATIONS in ops.h."""


class _AnyOperation(Union):
    _fields_ = [(kind.__name__, kind) for kind in OPERATIONS]


class Op(Structure):
    _fields_ = [("kind", c_int64), ("of", _AnyOperation)]


def op(operation: Any) -> Op:
    """An operation as a step program holds it."""
    kind = type(operation)
    return Op(OPERATIONS.index(kind), _AnyOperation(**{kind.__name__: operation}))
