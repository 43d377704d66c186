"""What the families of published models put their layers together from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from holdfast.core.errors import ModelError
from holdfast.models.config import Config, head_size
from holdfast.planner.shapes.shape import (
    Attention,
    Experts,
    Layer,
    Matrix,
    ModelShape,
    attention_matrices,
    mlp_matrices,
    router_matrix,
    share_layers,
)


def refuse(config: Config, what: str) -> ModelError:
    """The error for a part of an architecture that is not known here."""
    return ModelError(f"{config.path}: not supported: {what}")


def decoder(
    config: Config, layers: Iterable[Layer], *, tied: bool = False, other_params: int | None = None, **fields: Any
) -> ModelShape:
    """Layers between an embedding table and a head. Unless `other_params` says more, one RMSNorm comes before the
    head; `tied` is what a config means that does not say."""
    hidden, vocab = config.integer("hidden_size"), config.integer("vocab_size")
    tied = config.flag("tie_word_embeddings", tied)
    return ModelShape(
        name=config.path,
        hidden=hidden,
        vocab=vocab,
        layers=share_layers(layers),
        tied=tied,
        embedding_params=vocab * hidden * (1 if tied else 2),
        other_params=hidden if other_params is None else other_params,
        max_context=config.integer("max_position_embeddings"),
        **fields,
    )


def grouped_queries(config: Config, window: int | None = None) -> Attention:
    """The ordinary attention of a config: H query heads share G KV heads."""
    num_heads, head_dim = config.integer("num_attention_heads"), head_size(config)
    num_kv_heads = config.integer("num_key_value_heads", num_heads)
    return Attention("softmax", num_heads, num_kv_heads, head_dim, head_dim, window)


def layer(
    hidden: int,
    attention: Attention,
    feed_forward: tuple[tuple[Matrix, ...], Experts | None],
    *,
    norms: int = 2,
    other_params: int = 0,
    output_gate: bool = False,
) -> Layer:
    """Attention of the `softmax` kind, then an MLP or experts; `norms` RMSNorms of the hidden size."""
    matrices = attention_matrices(hidden, attention, output_gate=output_gate) + feed_forward[0]
    return Layer(attention, matrices, feed_forward[1], norms * hidden + other_params)


def mlp(hidden: int, columns: int, *, gated: bool = True) -> tuple[tuple[Matrix, ...], None]:
    return mlp_matrices(hidden, columns, gated=gated), None


def experts(
    config: Config, columns: int, num_experts: int, *, shared_columns: int = 0, gated: bool = True, chosen: int = 0
) -> tuple[tuple[Matrix, ...], Experts]:
    """Router, shared experts as one MLP, and the routed ones. `chosen` 0: what the config says."""
    hidden, chosen = config.integer("hidden_size"), chosen or config.integer("num_experts_per_tok")
    shared = mlp_matrices(hidden, shared_columns, gated=gated, prefix="shared ") if shared_columns else ()
    routed = Experts(num_experts, chosen, mlp_matrices(hidden, columns, gated=gated))
    return (router_matrix(hidden, num_experts), *shared), routed


def layer_types(config: Config, known: Sequence[str], default: Sequence[str] = ()) -> Sequence[str]:
    """`layer_types` of as many layers as there are, each one of `known`; or `default` where there is no list."""
    num_layers = config.integer("num_hidden_layers")
    kinds = config.sequence("layer_types", str) or default
    if len(kinds) != num_layers or not set(kinds) <= set(known):
        raise ModelError(f"{config.path}: layer_types {list(kinds)}: wants {num_layers} of {', '.join(known)}")
    return kinds


def per_layer(config: Config, name: str) -> list[int]:
    """A list of one whole number per layer; those of layers that only draft tokens, at its end, are left out."""
    num_layers, values = config.integer("num_hidden_layers"), config.sequence(name, int)
    if len(values) < num_layers:
        raise ModelError(f"{config.path}: {name} has {len(values)} entries for {num_layers} layers")
    return list(values[:num_layers])


def from_layer_on(config: Config) -> list[bool]:
    """Which layers have experts: all but the first `first_k_dense_replace`, or as `moe_layer_freq` or
    `mlp_layer_types` list them."""
    num_layers = config.integer("num_hidden_layers")
    if config.has("mlp_layer_types"):
        kinds = config.sequence("mlp_layer_types", str)
        if len(kinds) < num_layers:
            raise ModelError(f"{config.path}: mlp_layer_types has {len(kinds)} entries for {num_layers} layers")
        return [kind == "sparse" for kind in kinds[:num_layers]]
    if isinstance(config.values.get("moe_layer_freq"), list):
        return [value == 1 for value in per_layer(config, "moe_layer_freq")]
    config.require("moe_layer_freq", 1)
    dense = config.integer("first_k_dense_replace") if config.values.get("first_k_dense_replace") else 0
    return [index >= dense for index in range(num_layers)]
