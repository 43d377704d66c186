"""Families most of whose layers keep a state of fixed size per sequence instead of keys and values."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.core.errors import ModelError
from holdfast.models.config import Config, head_size
from holdfast.planner.shapes.latent import latent_attention
from holdfast.planner.shapes.parts import decoder, experts, grouped_queries, layer_types, mlp, refuse
from holdfast.planner.shapes.shape import (
    Attention,
    Experts,
    Layer,
    Matrix,
    ModelShape,
    attention_matrices,
    mlp_matrices,
)

_BLOCKS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}


def nemotron_h(config: Config) -> ModelShape:
    """Each layer is one of Mamba-2, attention, MLP, experts, behind one norm (arXiv:2504.03624). Experts may work in
    a narrower space, into which and out of which one matrix each leads."""
    hidden = config.integer("hidden_size")
    blocks: Sequence[str] = config.sequence("layers_block_type", str)
    if not blocks:
        pattern = config.values.get("hybrid_override_pattern")
        if not isinstance(pattern, str) or not set(pattern) <= set(_BLOCKS):
            raise ModelError(f"{config.path}: hybrid_override_pattern {pattern!r}: wants {', '.join(_BLOCKS)}")
        blocks = [_BLOCKS[sign] for sign in pattern]
    known = {}
    for block in set(blocks):
        if block == "mamba":
            known[block] = _mamba2(config)
        elif block == "attention":
            attention = grouped_queries(config)
            if config.has("attention_head_dim"):
                head_dim = config.integer("attention_head_dim")
                attention = Attention("softmax", attention.num_heads, attention.num_kv_heads, head_dim, head_dim)
            known[block] = Layer(attention, attention_matrices(hidden, attention), None, hidden)
        elif block == "mlp":
            plain = mlp_matrices(hidden, config.integer("intermediate_size"), gated=False)
            known[block] = Layer(None, plain, None, hidden)
        elif block == "moe":
            known[block] = _nemotron_experts(config)
        else:
            raise refuse(config, f"layers_block_type {block!r}")
    return decoder(config, [known[block] for block in blocks])


def _mamba2(config: Config) -> Layer:
    """Mamba-2 (arXiv:2405.21060): one matrix makes gate, x, B, C and time steps; x, B and C pass a convolution."""
    hidden, num_heads = config.integer("hidden_size"), config.integer("mamba_num_heads")
    head_dim, state_size = config.integer("mamba_head_dim"), config.integer("ssm_state_size")
    groups, kernel = config.integer("n_groups"), config.integer("conv_kernel")
    inner = num_heads * head_dim
    convolved = inner + 2 * groups * state_size
    matrices = (
        Matrix("mamba input", hidden, inner + convolved + num_heads, "column"),
        Matrix("mamba output", inner, hidden, "row"),
    )
    attention = Attention(
        "linear",
        num_heads,
        groups,
        state_size,
        head_dim,
        state_numbers=num_heads * head_dim * state_size + convolved * (kernel - 1),
    )
    convolution = convolved * (kernel + config.flag("use_conv_bias", True))
    biases = sum(matrix.outputs for matrix in matrices) if config.flag("use_bias", False) else 0
    return Layer(attention, matrices, None, hidden + convolution + biases + 3 * num_heads + inner)


def _nemotron_experts(config: Config) -> Layer:
    hidden, num_experts = config.integer("hidden_size"), config.integer("n_routed_experts")
    columns, shared = config.integer("moe_intermediate_size"), config.integer("moe_shared_expert_intermediate_size")
    plain, routed = experts(config, columns, num_experts, shared_columns=shared, gated=False)
    if config.has("moe_latent_size"):
        width = config.integer("moe_latent_size")
        routed = Experts(num_experts, routed.num_chosen, mlp_matrices(width, columns, gated=False))
        plain += (
            Matrix("latent down", hidden, width, "replicated"),
            Matrix("latent up", width, hidden, "replicated"),
        )
    return Layer(None, plain, routed, hidden)


def qwen3_5(config: Config) -> ModelShape:
    """Qwen3-Next and Qwen3.5: gated delta nets (arXiv:2412.06464), in every fourth layer attention whose output is
    gated; an MLP, or experts with a shared one that has a gate."""
    hidden, interval = config.integer("hidden_size"), config.integer("full_attention_interval", 4)
    num_layers = config.integer("num_hidden_layers")
    default = ["linear_attention" if (index + 1) % interval else "full_attention" for index in range(num_layers)]
    plain, routed, other = *mlp(hidden, config.integer("intermediate_size", 1)), 0
    if config.has("num_experts"):
        columns, shared = config.integer("moe_intermediate_size"), config.integer("shared_expert_intermediate_size")
        plain, routed = experts(config, columns, config.integer("num_experts"), shared_columns=shared)
        other = hidden
    attention = grouped_queries(config)
    full = Layer(
        attention,
        attention_matrices(hidden, attention, output_gate=config.flag("attn_output_gate", True)) + plain,
        routed,
        2 * hidden + 2 * head_size(config) + other,
    )
    delta, matrices, delta_params = _delta_net(config)
    linear = Layer(delta, matrices + plain, routed, 2 * hidden + delta_params + other)
    kinds = layer_types(config, ("linear_attention", "full_attention"), default)
    return decoder(config, [linear if kind == "linear_attention" else full for kind in kinds])


def _delta_net(config: Config) -> tuple[Attention, tuple[Matrix, ...], int]:
    hidden, kernel = config.integer("hidden_size"), config.integer("linear_conv_kernel_dim")
    num_keys, key_dim = config.integer("linear_num_key_heads"), config.integer("linear_key_head_dim")
    num_values, value_dim = config.integer("linear_num_value_heads"), config.integer("linear_value_head_dim")
    values = num_values * value_dim
    convolved = 2 * num_keys * key_dim + values
    matrices = (
        Matrix("delta net input", hidden, convolved + values + 2 * num_values, "column"),
        Matrix("delta net output", values, hidden, "row"),
    )
    state = num_values * key_dim * value_dim + convolved * (kernel - 1)
    attention = Attention("linear", num_values, num_keys, key_dim, value_dim, state_numbers=state)
    return attention, matrices, convolved * kernel + 2 * num_values + value_dim


def kimi_linear(config: Config) -> ModelShape:
    """Kimi Linear (arXiv:2510.26692): delta nets with a decay per channel, and MLA in some layers."""
    for name in ("routed_expert_hidden_size", "attn_res_block_size"):
        if config.has(name):
            raise refuse(config, f"{name} {config.values[name]}")
    hidden, columns = config.integer("hidden_size"), config.integer("moe_intermediate_size")
    shared = config.integer("num_shared_experts") * columns
    chosen, num_experts = config.integer("num_experts_per_token"), config.integer("num_experts")
    routed = experts(config, columns, num_experts, shared_columns=shared, chosen=chosen)
    dense = mlp(hidden, config.integer("intermediate_size"))
    first = config.integer("first_k_dense_replace") if config.values.get("first_k_dense_replace") else 0
    linear = config.mapping("linear_attn_config")
    attends = set(linear.sequence("full_attn_layers", int))  # counted from 1
    parts = {True: latent_attention(config), False: _kimi_delta(hidden, linear)}
    layers = []
    for index in range(config.integer("num_hidden_layers")):
        attention, matrices, other = parts[index + 1 in attends]
        plain, chosen_experts = routed if index >= first else dense
        layers.append(Layer(attention, matrices + plain, chosen_experts, 2 * hidden + other))
    return decoder(config, layers)


def _kimi_delta(hidden: int, linear: Config) -> tuple[Attention, tuple[Matrix, ...], int]:
    """q, k and v through convolutions, a decay per channel and an output gate, both by way of one head's width."""
    num_heads, head_dim = linear.integer("num_heads"), linear.integer("head_dim")
    kernel, width = linear.integer("short_conv_kernel_size"), linear.integer("num_heads") * linear.integer("head_dim")
    matrices = (
        Matrix("delta net input", hidden, 3 * width + num_heads, "column"),
        Matrix("decay and gate down", hidden, 2 * head_dim, "replicated"),
        Matrix("decay up", head_dim, width, "column"),
        Matrix("gate up", head_dim, width, "column"),
        Matrix("delta net output", width, hidden, "row"),
    )
    state = num_heads * head_dim * head_dim + 3 * width * (kernel - 1)
    attention = Attention("linear", num_heads, num_heads, head_dim, head_dim, state_numbers=state)
    return attention, matrices, 3 * width * kernel + width + num_heads + head_dim
