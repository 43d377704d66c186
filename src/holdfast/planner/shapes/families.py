"""Families with keys and values per head that the runtime does not serve yet, each from its config.

Where nothing else is named, the source is the family's config.json together with its modelling code in
transformers: what is counted here is compared with it in tests.
"""

from __future__ import annotations

from dataclasses import replace

from holdfast.models.config import Config, head_size
from holdfast.models.families import FAMILIES
from holdfast.planner.shapes.parts import (
    decoder,
    experts,
    from_layer_on,
    grouped_queries,
    layer,
    layer_types,
    mlp,
    per_layer,
    refuse,
)
from holdfast.planner.shapes.shape import Attention, Layer, Matrix, ModelShape, attention_matrices, shape_of_spec

_FULL, _SLIDING = "full_attention", "sliding_attention"


def gemma2(config: Config) -> ModelShape:
    """Sandwich norms; every other layer, the first included, has a window (arXiv:2408.00118)."""
    hidden, window = config.integer("hidden_size"), config.integer("sliding_window", 4096)
    default = [_FULL if index % 2 else _SLIDING for index in range(config.integer("num_hidden_layers"))]
    feed_forward = mlp(hidden, config.integer("intermediate_size"))
    layers = [
        layer(hidden, grouped_queries(config, window if kind == _SLIDING else None), feed_forward, norms=4)
        for kind in layer_types(config, (_FULL, _SLIDING), default)
    ]
    return decoder(config, layers, tied=True)


def gemma4(config: Config) -> ModelShape:
    """Layers with a window have their own number and size of KV heads; the others use their keys as values; experts
    work beside an MLP, with norms of their own."""
    if config.values.get("hidden_size_per_layer_input"):
        raise refuse(config, f"hidden_size_per_layer_input {config.values['hidden_size_per_layer_input']}")
    if config.values.get("num_kv_shared_layers"):
        raise refuse(config, f"num_kv_shared_layers {config.values['num_kv_shared_layers']}")
    hidden, num_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    num_kv_heads, window = config.integer("num_key_value_heads"), config.integer("sliding_window")
    plain, routed = mlp(hidden, config.integer("intermediate_size"))[0], None
    norms, other = 4, 0
    if config.flag("enable_moe_block", False):
        num_experts = config.integer("num_experts")
        columns, chosen = config.integer("moe_intermediate_size"), config.integer("top_k_experts")
        router, routed = experts(config, columns, num_experts, chosen=chosen)
        plain, norms, other = plain + router, 7, hidden + num_experts  # the router's scales
    layers = []
    for kind in layer_types(config, (_FULL, _SLIDING)):
        if kind == _SLIDING:
            head_dim = config.integer("head_dim")
            attention = Attention("softmax", num_heads, num_kv_heads, head_dim, head_dim, window)
        else:
            head_dim = config.integer("global_head_dim")
            global_heads = config.integer("num_global_key_value_heads", num_kv_heads)
            attention = Attention("softmax", num_heads, global_heads, head_dim, head_dim)
        matrices = attention_matrices(hidden, attention)
        if kind == _FULL and config.flag("attention_k_eq_v", False):
            qkv = replace(matrices[0], outputs=matrices[0].outputs - attention.num_kv_heads * head_dim)
            matrices = (qkv, matrices[1])
        layers.append(Layer(attention, matrices + plain, routed, norms * hidden + other + 2 * head_dim))
    return decoder(config, layers, tied=True)


def llama4(config: Config) -> ModelShape:
    """One expert of many and a shared one, in every n-th layer; three of four layers see a chunk only."""
    hidden, columns = config.integer("hidden_size"), config.integer("intermediate_size")
    step, num_layers = config.integer("interleave_moe_layer_step", 1), config.integer("num_hidden_layers")
    chunk = config.integer("attention_chunk_size") if config.has("attention_chunk_size") else None
    routed = experts(config, columns, config.integer("num_experts"), shared_columns=columns)
    dense = mlp(hidden, config.integer("intermediate_size_mlp"))
    layers = [
        layer(
            hidden,
            # what has no rotary positions sees everything: every fourth
            grouped_queries(config, None if (index + 1) % 4 == 0 else chunk),
            dense if (index + 1) % step else routed,
        )
        for index in range(num_layers)
    ]
    return decoder(config, layers)


def gpt_oss(config: Config) -> ModelShape:
    """Biases everywhere, and a learned sink per query head (arXiv:2508.10925)."""
    hidden, columns = config.integer("hidden_size"), config.integer("intermediate_size")
    num_experts, window = config.integer("num_experts"), config.integer("sliding_window")
    default = [_FULL if index % 2 else _SLIDING for index in range(config.integer("num_hidden_layers"))]
    router, unbiased = experts(config, columns, num_experts)
    feed_forward = router, replace(unbiased, biases=2 * columns + hidden)
    layers = []
    for kind in layer_types(config, (_FULL, _SLIDING), default):
        attention = grouped_queries(config, window if kind == _SLIDING else None)
        biases = sum(matrix.outputs for matrix in attention_matrices(hidden, attention)) + num_experts
        layers.append(layer(hidden, attention, feed_forward, other_params=biases + attention.num_heads))
    return decoder(config, layers)


def minimax_m2(config: Config) -> ModelShape:
    """Experts in every layer; queries and keys are normed over all heads at once."""
    if config.values.get("shared_intermediate_size"):
        raise refuse(config, f"shared_intermediate_size {config.values['shared_intermediate_size']}")
    hidden, attention = config.integer("hidden_size"), grouped_queries(config)
    feed_forward = experts(config, config.integer("intermediate_size"), config.integer("num_experts"))
    normed = (attention.num_heads + attention.num_kv_heads) * attention.head_dim
    other = normed if config.flag("use_qk_norm", True) else 0
    layers = [layer(hidden, attention, feed_forward, other_params=other)] * config.integer("num_hidden_layers")
    return decoder(config, layers)


def minimax_m3(config: Config) -> ModelShape:
    """An index of few heads tells which blocks of tokens a layer's attention reads."""
    hidden, plain = config.integer("hidden_size"), grouped_queries(config)
    sparse = config.mapping("sparse_attention_config")
    index_dim, index_heads = sparse.integer("sparse_index_dim"), sparse.integer("sparse_num_index_heads")
    indexed = replace(
        plain,
        index_dim=index_dim,
        num_read=sparse.integer("sparse_topk_blocks") * sparse.integer("sparse_block_size"),
    )
    index = Matrix("index", hidden, (index_heads + 1) * index_dim, "replicated")
    columns, num_experts = config.integer("moe_intermediate_size"), config.integer("num_experts")
    shared = config.integer("n_shared_experts") * columns
    routed = experts(config, columns, num_experts, shared_columns=shared)
    dense = mlp(hidden, config.integer("dense_intermediate_size"))
    read_sparsely = sparse.sequence("sparse_attention_freq", int)
    layers = []
    for number, is_routed in enumerate(from_layer_on(config)):
        is_indexed = number < len(read_sparsely) and read_sparsely[number] == 1
        made = layer(hidden, indexed if is_indexed else plain, routed if is_routed else dense)
        norms = 2 * plain.head_dim + (2 * index_dim if is_indexed else 0)
        matrices = (index, *made.matrices) if is_indexed else made.matrices
        layers.append(replace(made, matrices=matrices, other_params=made.other_params + norms))
    return decoder(config, layers)


def mimo_v2(config: Config) -> ModelShape:
    """Values narrower than keys; layers with a window have other KV heads, and sinks."""
    hidden = config.integer("hidden_size")
    full = replace(grouped_queries(config), value_dim=config.integer("v_head_dim"))
    sliding = Attention(
        "softmax",
        config.integer("swa_num_attention_heads", full.num_heads),
        config.integer("swa_num_key_value_heads"),
        config.integer("swa_head_dim", full.head_dim),
        config.integer("swa_v_head_dim", full.value_dim),
        config.integer("sliding_window"),
    )
    routed = experts(config, config.integer("moe_intermediate_size"), config.integer("n_routed_experts"))
    dense = mlp(hidden, config.integer("intermediate_size"))
    sinks = [config.flag("add_full_attention_sink_bias", False), config.flag("add_swa_attention_sink_bias", True)]
    layers = [
        layer(
            hidden,
            sliding if is_sliding else full,
            routed if is_routed else dense,
            other_params=sinks[is_sliding] * (sliding if is_sliding else full).num_heads,
        )
        for is_sliding, is_routed in zip(
            per_layer(config, "hybrid_layer_pattern"), from_layer_on(config), strict=True
        )
    ]
    return decoder(config, layers)


def step3(config: Config) -> ModelShape:
    """A gate per query head; a shared expert; layers with a window may have more query heads."""
    hidden, window = config.integer("hidden_size"), config.integer("sliding_window")
    full = grouped_queries(config)
    other_heads = config.mapping("attention_other_setting").integer("num_attention_heads", full.num_heads)
    sliding = replace(full, num_heads=other_heads, window=window)
    columns = config.integer("moe_intermediate_size")
    shared = config.integer("share_expert_dim", columns)
    routed = experts(config, columns, config.integer("num_experts"), shared_columns=shared)
    dense = mlp(hidden, config.integer("intermediate_size"))
    layers = []
    for kind, is_routed in zip(layer_types(config, (_FULL, _SLIDING)), from_layer_on(config), strict=True):
        attention = sliding if kind == _SLIDING else full
        gates = hidden * attention.num_heads
        other = 2 * attention.head_dim + gates
        layers.append(layer(hidden, attention, routed if is_routed else dense, other_params=other))
    return decoder(config, layers)


def nemotron_nas(config: Config) -> ModelShape:
    """A Llama whose layers were searched one by one (`block_configs`): some lack attention, MLPs differ in width."""
    hidden, num_heads, head_dim = (
        config.integer("hidden_size"),
        config.integer("num_attention_heads"),
        head_size(config),
    )
    layers = []
    for index, block in enumerate(config.sequence("block_configs", dict)):
        parts = {name: Config(f"{config.path}: block {index}: {name}", block.get(name) or {}) for name in block}
        for part in parts.values():
            if any(part.values.get(name) for name in ("replace_with_linear", "sparsify", "window_length")):
                raise refuse(part, "a part that is replaced by a linear one, made sparse or given a window")
        attention: Attention | None = None
        matrices: tuple[Matrix, ...] = ()
        norms = 0
        if not parts["attention"].flag("no_op", False):
            num_kv_heads = max(1, num_heads // parts["attention"].integer("n_heads_in_group"))
            attention = Attention("softmax", num_heads, num_kv_heads, head_dim, head_dim)
            matrices, norms = attention_matrices(hidden, attention), 1
        if not parts["ffn"].flag("no_op", False):
            columns = int(2 * parts["ffn"].number("ffn_mult", above=0.0) * hidden / 3)
            matrices += mlp(hidden, -(-columns // 256) * 256)[0]
            norms += 1
        layers.append(Layer(attention, matrices, None, norms * hidden))
    if len(layers) != config.integer("num_hidden_layers"):
        raise refuse(config, f"block_configs of {len(layers)} for {config.integer('num_hidden_layers')} layers")
    return decoder(config, layers)


def grok1(config: Config) -> ModelShape:
    """Sandwich norms and two of eight experts (xai-org/grok-1, model.py)."""
    hidden = config.integer("hidden_size")
    feed_forward = experts(config, config.integer("intermediate_size"), config.integer("num_experts"))
    one = layer(hidden, grouped_queries(config), feed_forward, norms=4)
    return decoder(config, [one] * config.integer("num_hidden_layers"), tied=True)


def opt(config: Config) -> ModelShape:
    """OPT; the 350M one has embeddings narrower than its layers, and a matrix on either side of them."""
    hidden, width = (
        config.integer("hidden_size"),
        config.integer("word_embed_proj_dim", config.integer("hidden_size")),
    )
    shape = shape_of_spec(FAMILIES["opt"].spec(Config(config.path, {**config.values, "word_embed_proj_dim": hidden})))
    if width == hidden:
        return shape
    tables = shape.embedding_params // hidden * width
    return replace(shape, embedding_params=tables, other_params=shape.other_params + 2 * width * hidden)


def mllama(config: Config) -> ModelShape:
    """Llama 3.2 Vision's decoder. Some layers attend to the image alone: they keep nothing of the text, and a request
    without an image skips them, but their weights are there."""
    hidden, attention = config.integer("hidden_size"), grouped_queries(config)
    feed_forward = mlp(hidden, config.integer("intermediate_size"))
    looks = set(config.sequence("cross_attention_layers", int))
    text = layer(hidden, attention, feed_forward)
    image = replace(text, attention=None, other_params=text.other_params + 2 * attention.head_dim + 2)
    layers = [image if index in looks else text for index in range(config.integer("num_hidden_layers"))]
    extra_rows = 8  # of the input table, for the image's place among the tokens
    return decoder(config, layers, other_params=hidden * (1 + extra_rows))
