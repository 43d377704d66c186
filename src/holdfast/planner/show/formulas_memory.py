"""The formulas of a rank's memory; see `formulas`."""

from __future__ import annotations

from holdfast.planner.estimate import Estimate, Question, shares_of
from holdfast.planner.memory.ranks import (
    GATHERED_LAYERS,
    LayerSizes,
    kv_bytes_per_block,
    kv_numbers_per_token,
    live_numbers_per_token,
)
from holdfast.planner.memory.shares import RankShare
from holdfast.planner.show.lines import Line, bytes_of, number


def memory_lines(question: Question, some: Estimate) -> list[Line]:
    """Weights, room and tokens of the rank with the least room for tokens: it decides for all."""
    index = min(range(len(some.stages)), key=lambda stage: _tokens(question, some, stage))
    share, stage = shares_of(question, some.candidate)[index], some.stages[index]
    section = f"Memory of a rank of stage {index}" if len(some.stages) > 1 else "Memory of a rank"
    weights = _weight_lines(question, some, share, section)
    memory, engine, load = stage.memory, question.memory_engine, question.load()
    lines = list(weights)
    if memory.gathered_weights:
        each = memory.gathered_weights / GATHERED_LAYERS
        lines.append(
            Line(
                section, "gathered weights", "layers in use × a layer", f"{GATHERED_LAYERS} · {bytes_of(each)}",
                GATHERED_LAYERS * each, bytes_of(memory.gathered_weights),
            )
        )  # fmt: skip
    all_weights = sum(line.value for line in lines)
    lines.append(
        Line(
            section, "weights", " + ".join(line.name for line in lines),
            " + ".join(bytes_of(line.value) for line in lines), all_weights, bytes_of(all_weights),
        )
    )  # fmt: skip
    live = live_numbers_per_token(question.table, share)
    activations = load.batched_tokens * live * 2
    lines.append(
        Line(
            section, "activations", "tokens of a step × numbers alive × 2 B",
            f"{load.batched_tokens} · {number(live)} · 2 B", activations, bytes_of(activations),
        )
    )  # fmt: skip
    others = {
        "logits": memory.logits, "communication": memory.communication, "reserve": memory.reserve,
    }  # fmt: skip
    there = {name: size for name, size in others.items() if size}
    usable = stage.device_bytes * engine.utilization
    room = usable - all_weights - activations - sum(there.values())
    lines.append(
        Line(
            section, "room for KV",
            " − ".join(["device × utilization", "weights", "activations", *there]),
            f"{bytes_of(stage.device_bytes)} · {number(engine.utilization)} − "
            + " − ".join(bytes_of(size) for size in (all_weights, activations, *there.values())),
            room * engine.kv_fraction, bytes_of(room * engine.kv_fraction),
        )
    )  # fmt: skip
    return lines + _kv_lines(question, share, section, room)


def _tokens(question: Question, some: Estimate, stage: int) -> float:
    """That the KV cache of a stage's ranks has room for, negative where even weights have none."""
    size = kv_bytes_per_block(question.table, shares_of(question, some.candidate)[stage], question.load())
    return some.stages[stage].kv_room / size if size else float("inf")


def _kv_lines(question: Question, share: RankShare, section: str, room: float) -> list[Line]:
    load = question.load()
    each = load.kv_format.bytes_per_number
    terms, numbers = [], 0
    for kind, layers in question.table.counts(*share.layers):
        if cached := kv_numbers_per_token(kind.attention, share):
            terms.append(f"{layers} · {_cached(kind, share, cached)}")
            numbers += layers * cached
    if not numbers:
        return []
    formula = "layers × (KV heads of the rank × (key + value)) × bytes of a number"
    if any(kind.attention and kind.attention.kind == "latent" for kind, _ in question.table.counts(*share.layers)):
        formula = "layers × latent, the same on every rank × bytes of a number"
    token = numbers * each
    tokens = room / token
    return [
        Line(section, "KV of a token", formula, f"({' + '.join(terms)}) · {number(each)} B", token, bytes_of(token)),
        Line(
            section, "tokens", "room for KV / KV of a token, in whole blocks",
            f"{bytes_of(max(room, 0))} / {bytes_of(token)}", max(tokens, 0), f"{max(tokens, 0):,.0f}",
        ),
    ]  # fmt: skip


def _cached(kind: LayerSizes, share: RankShare, cached: int) -> str:
    attention = kind.attention
    if attention is None or attention.kind != "softmax":
        return number(cached)
    each = attention.head_dim + attention.value_dim
    extra = f" + {attention.index_dim}" if attention.index_dim else ""
    heads = (cached - attention.index_dim) // each
    return f"({heads} · ({attention.head_dim} + {attention.value_dim}){extra})"


# --- weights ---


def _weight_lines(question: Question, some: Estimate, share: RankShare, section: str) -> list[Line]:
    """By what they are for; each with what every kind of layer contributes."""
    shape, spread = question.shape, len(some.candidate.replicas) if some.candidate.shard_weights else 1
    plain, routed = shape.weight_bits / 8, shape.expert_bits / 8
    groups: list[tuple[str, str, list[tuple[str, float]]]] = [
        ("attention", "layers × (cut by heads + KV heads of the rank + whole) × bytes", []),
        ("MLP", "layers × (cut by columns + whole) × bytes", []),
        ("experts", "layers × experts of the rank × (an expert's share) × bytes", []),
        ("norms and biases", "layers × numbers × 2 B", []),
    ]
    for kind, layers in question.table.counts(*share.layers):
        for group, (text, size) in zip(groups, _of_kind(kind, layers, share, plain, routed), strict=True):
            if size:
                group[2].append((text, size))
    text, size = _embedding(question, share)
    if size:
        groups.append(("embeddings and head", "(rows of the rank × hidden + positions) × 2 B", [(text, size)]))
    lines = []
    for name, formula, terms in groups:
        if not terms:
            continue
        total = sum(size for _, size in terms) / spread
        numbers = " + ".join(text for text, _ in terms)
        if spread > 1:
            numbers = f"({numbers}) / {spread}"
        words = f"({formula}) / replicas" if spread > 1 else formula
        lines.append(Line(section, name, words, numbers, total, bytes_of(total)))
    return lines


def _of_kind(kind: LayerSizes, layers: int, share: RankShare, plain: float, routed: float) -> list[tuple[str, float]]:
    """Attention, MLP, experts and the rest of `layers` equal layers: in numbers, and in bytes."""
    heads = _whole(kind.attention.num_kv_heads, share.kv_heads) if kind.attention and kind.per_kv_head else 0
    degree, columns, cut = 1 / share.query_heads, 1 / share.columns, 1 / share.expert_columns
    held = _whole(kind.num_experts, share.experts)
    other = kind.other + held * kind.expert_biases
    attention = [f"{number(kind.by_query_heads)} / {number(degree)}"]
    attention += [f"{heads} · {number(kind.per_kv_head)}"] if heads else []
    attention += [number(kind.attention_replicated)] if kind.attention_replicated else []
    mlp = [f"{number(kind.by_columns)} / {number(columns)}"]
    mlp += [number(kind.mlp_replicated)] if kind.mlp_replicated else []
    return [
        (
            f"{layers} · ({' + '.join(attention)}) · {number(plain)} B",
            layers * (kind.by_query_heads / degree + heads * kind.per_kv_head + kind.attention_replicated) * plain,
        ),
        (
            f"{layers} · ({' + '.join(mlp)}) · {number(plain)} B",
            layers * (kind.by_columns / columns + kind.mlp_replicated) * plain,
        ),
        (
            f"{layers} · {held} · {number(kind.expert)} / {number(cut)} · {number(routed)} B",
            layers * held * kind.expert / cut * routed,
        ),
        (f"{layers} · {number(other)} · 2 B", layers * other * 2),
    ]


def _embedding(question: Question, share: RankShare) -> tuple[str, float]:
    shape = question.shape
    rows = _whole(shape.vocab, share.vocab)
    extra = shape.other_params + shape.tower_params if share.is_first else 0
    tables = int(share.is_first) + int(share.is_last and not (shape.tied and share.is_first))
    if not tables:
        return "", 0.0
    return (
        f"({tables} · {rows} · {shape.hidden} + {number(extra)}) · 2 B",
        (tables * rows * shape.hidden + extra) * 2,
    )


def _whole(count: int, share: float) -> int:
    return -int(-(count * share - 1e-9) // 1)
