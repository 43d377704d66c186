"""Families that cache one compressed vector per token instead of keys and values per head."""

from __future__ import annotations

from holdfast.models.config import Config
from holdfast.planner.shapes.parts import decoder, experts, from_layer_on, mlp, per_layer, refuse
from holdfast.planner.shapes.shape import Attention, Layer, Matrix, ModelShape


def latent_attention(config: Config) -> tuple[Attention, tuple[Matrix, ...], int]:
    """MLA (arXiv:2405.04434, section 2.1), its matrices and its norms' numbers. Queries are compressed too where
    there is a `q_lora_rank`. What makes the compressed vectors belongs to no head, so every rank has it."""
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    rank, rope_dim = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    nope_dim, value_dim = config.integer("qk_nope_head_dim"), config.integer("v_head_dim")
    head_dim, norms = nope_dim + rope_dim, rank
    if config.has("q_lora_rank"):
        query_rank = config.integer("q_lora_rank")
        norms += query_rank
        queries: tuple[Matrix, ...] = (
            Matrix("q down", hidden, query_rank, "replicated"),
            Matrix("q up", query_rank, num_heads * head_dim, "column"),
        )
    else:
        queries = (Matrix("q", hidden, num_heads * head_dim, "column"),)
    matrices = (
        *queries,
        Matrix("kv down", hidden, rank + rope_dim, "replicated"),
        Matrix("kv up", rank, num_heads * (nope_dim + value_dim), "column"),
        Matrix("attention output", num_heads * value_dim, hidden, "row"),
    )
    return Attention("latent", num_heads, 1, head_dim, value_dim, latent_dim=rank + rope_dim), matrices, norms


def deepseek(config: Config) -> ModelShape:
    """DeepSeek V2, V3, R1 and V3.2, Kimi K2, GLM-5: MLA with experts; the last ones and V3.2 with an indexer, which
    picks the tokens that attention reads (DeepSeek Sparse Attention)."""
    hidden, columns = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    shared = config.integer("n_shared_experts") * columns if config.values.get("n_shared_experts") else 0
    routed = experts(config, columns, config.integer("n_routed_experts"), shared_columns=shared)
    dense = mlp(hidden, config.integer("intermediate_size"))
    layers = []
    for is_routed, has_indexer in zip(from_layer_on(config), _indexers(config), strict=True):
        attention, matrices, norms = latent_attention(config)
        if config.has("index_topk"):
            attention, indexer, index_norms = _indexed(config, attention, has_indexer=has_indexer)
            matrices, norms = matrices + indexer, norms + index_norms
        plain, chosen = routed if is_routed else dense
        layers.append(Layer(attention, matrices + plain, chosen, 2 * hidden + norms))
    return decoder(config, layers)


def _indexers(config: Config) -> list[bool]:
    """Which layers choose their tokens themselves; "shared" ones read what the last of these has chosen."""
    num_layers = config.integer("num_hidden_layers")
    kinds = config.sequence("indexer_types", str) or ["full"] * num_layers
    if len(kinds) < num_layers or not set(kinds) <= {"full", "shared"}:
        raise refuse(config, f"indexer_types {kinds}")
    return [kind == "full" for kind in kinds[:num_layers]]


def _indexed(config: Config, attention: Attention, *, has_indexer: bool) -> tuple[Attention, tuple[Matrix, ...], int]:
    num_read, index_dim = config.integer("index_topk"), config.integer("index_head_dim")
    cached = index_dim if has_indexer else 0
    sparse = Attention(
        "latent",
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_dim,
        attention.value_dim,
        latent_dim=attention.latent_dim,
        index_dim=cached,
        num_read=num_read,
    )
    if not has_indexer:
        return sparse, (), 0
    hidden, index_heads = config.integer("hidden_size"), config.integer("index_n_heads")
    matrices = (
        Matrix("index q", config.integer("q_lora_rank"), index_heads * index_dim, "replicated"),
        Matrix("index k", hidden, index_dim, "replicated"),
        Matrix("index weights", hidden, index_heads, "replicated"),
    )
    return sparse, matrices, 2 * index_dim


def deepseek_v4(config: Config) -> ModelShape:
    """One key, which is the value too, for all heads: of the last tokens as they are, and of all earlier ones as one
    for every 4 tokens (found by an indexer) or every 128 (all read), by layer; four residual streams.

    What is cached of a group of tokens is counted with each of them in equal parts; the window, as a fixed state.
    """
    hidden, num_experts = config.integer("hidden_size"), config.integer("n_routed_experts")
    columns = config.integer("moe_intermediate_size")
    shared = config.integer("n_shared_experts") * columns
    plain, routed = experts(config, columns, num_experts, shared_columns=shared)
    streams = config.integer("hc_mult")
    mixing = Matrix("residual streams", streams * hidden, (2 + streams) * streams, "replicated")
    scalars = 2 * (mixing.outputs + 3)
    layers = []
    for ratio in per_layer(config, "compress_ratios"):
        attention, matrices, other = _compressed_attention(config, ratio)
        matrices = (mixing, *matrices, mixing, *plain)
        layers.append(Layer(attention, matrices, routed, 2 * hidden + other + scalars))
    last = streams * streams * hidden + streams + 1
    return decoder(config, layers, other_params=hidden + last)


def _compressed_attention(config: Config, ratio: int) -> tuple[Attention, tuple[Matrix, ...], int]:
    """Attention over tokens of which `ratio` become one; 0: the window alone."""
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim, query_rank = config.integer("head_dim"), config.integer("q_lora_rank")
    groups, output_rank = config.integer("o_groups"), config.integer("o_lora_rank")
    window = config.integer("sliding_window")
    matrices: tuple[Matrix, ...] = (
        Matrix("q down", hidden, query_rank, "replicated"),
        Matrix("q up", query_rank, num_heads * head_dim, "column"),
        Matrix("kv down", hidden, head_dim, "replicated"),
        # each group of heads has a product of its own: as many outputs, of a group's inputs
        Matrix("output down", num_heads * head_dim // groups, groups * output_rank, "column"),
        Matrix("attention output", groups * output_rank, hidden, "row"),
    )
    other = query_rank + head_dim + num_heads
    if ratio == 0:
        attention = Attention("latent", num_heads, 1, head_dim, head_dim, window, latent_dim=head_dim)
        return attention, matrices, other
    if ratio not in (4, 128) or head_dim % ratio:
        raise refuse(config, f"compress_ratios of {ratio} with a head_dim of {head_dim}")
    overlap = 2 if ratio == 4 else 1  # groups of 4 are made of 8 tokens each
    matrices += (Matrix("compressor", hidden, 2 * overlap * head_dim, "replicated"),)
    other += ratio * overlap * head_dim + head_dim
    index_dim, num_read = 0, None
    if ratio == 4:
        index_heads, index_dim = config.integer("index_n_heads"), config.integer("index_head_dim")
        num_read = config.integer("index_topk") * ratio
        matrices += (
            Matrix("index compressor", hidden, 2 * overlap * index_dim, "replicated"),
            Matrix("index q", query_rank, index_heads * index_dim, "replicated"),
            Matrix("index weights", hidden, index_heads, "replicated"),
        )
        other += ratio * overlap * index_dim + index_dim
    attention = Attention(
        "latent",
        num_heads,
        1,
        head_dim,
        head_dim,
        latent_dim=head_dim // ratio,
        state_numbers=window * head_dim,
        index_dim=index_dim // ratio,
        num_read=num_read,
    )
    return attention, matrices, other
