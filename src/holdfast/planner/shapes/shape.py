"""What of a model the planner must know: its matrices, what each layer caches, and how many numbers that makes.

Everything here is counted for the whole model, before any cut. Numbers are counted, not bytes: what a number takes
depends on the format of the weights (`ModelShape.weight_bits`) and of the KV cache, which a plan chooses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from holdfast.core.spec import DecoderSpec, LayerSpec

Cut = Literal["column", "row", "replicated"]


@dataclass(frozen=True, slots=True)
class Matrix:
    """The weights of one product, [inputs] → [outputs], as the kernels do it: q, k and v are one matrix, gate and up
    are one."""

    name: str
    inputs: int
    """K: what is summed over."""
    outputs: int
    """N."""
    cut: Cut
    """How tensor parallelism takes it apart: `column` gives each rank some outputs, `row` some inputs (and its sums
    need an all-reduce), `replicated` everything to all."""

    @property
    def params(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, slots=True)
class Attention:
    """What a layer does with earlier tokens, and what it keeps of them."""

    kind: Literal["softmax", "latent", "linear"]
    """`softmax`: keys and values per KV head (MHA, GQA, MQA). `latent`: one compressed vector per token that all
    heads share (MLA, arXiv:2405.04434). `linear`: a state of fixed size per sequence (Mamba, gated delta net)."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of a query and a key."""
    value_dim: int
    """Of a value."""
    window: int | None = None
    """Tokens that a token sees at most, itself counted; None: all."""
    latent_dim: int = 0
    """`latent` only: numbers cached per token."""
    state_numbers: int = 0
    """`linear` only: numbers kept per sequence, whatever its length."""
    index_dim: int = 0
    """Further numbers cached per token, by which a sparse attention finds the tokens worth reading."""
    num_read: int | None = None
    """Tokens that a sparse attention reads at most, of all that are cached; None: all."""

    def kv_numbers_per_token(self) -> int:
        """Numbers that one layer caches of a token, all KV heads together."""
        if self.kind == "linear":
            return 0
        if self.kind == "latent":
            return self.latent_dim + self.index_dim
        return self.num_kv_heads * (self.head_dim + self.value_dim) + self.index_dim

    def tokens_kept(self, context: int) -> int:
        """Of a sequence of `context` tokens, those whose keys and values must be kept."""
        return context if self.window is None else min(context, self.window)

    def kv_numbers(self, context: int) -> int:
        """Numbers that one layer keeps of a sequence of `context` tokens."""
        return self.tokens_kept(context) * self.kv_numbers_per_token() + self.state_numbers

    def tokens_read(self, context: float) -> float:
        """Of `context` tokens, those whose keys and values a token is compared with."""
        return min(most for most in (context, self.window, self.num_read) if most is not None)

    def numbers_read(self, context: int) -> float:
        """Numbers that one layer reads to decode a token at `context` tokens: all that is kept, but where attention
        is sparse the index of all tokens and the keys and values of few."""
        unread = self.tokens_kept(context) - self.tokens_read(context)
        return self.kv_numbers(context) - unread * (self.kv_numbers_per_token() - self.index_dim)


@dataclass(frozen=True, slots=True)
class Experts:
    """Routed experts. Shared ones, and the router, are plain matrices of the layer."""

    num_experts: int
    num_chosen: int
    """Experts per token."""
    matrices: tuple[Matrix, ...]
    """Of one expert."""
    biases: int = 0
    """Of one expert."""

    @property
    def params_each(self) -> int:
        return sum(matrix.params for matrix in self.matrices) + self.biases

    @property
    def params(self) -> int:
        return self.num_experts * self.params_each


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the decoder."""

    attention: Attention | None
    """None: the layer looks at its own token only."""
    matrices: tuple[Matrix, ...]
    """What every token goes through, in order."""
    experts: Experts | None = None
    other_params: int = 0
    """Norms, biases, convolutions, scalars."""

    @property
    def params(self) -> int:
        routed = self.experts.params if self.experts else 0
        return sum(matrix.params for matrix in self.matrices) + routed + self.other_params

    @property
    def active_params(self) -> int:
        """Numbers that one token meets."""
        if self.experts is None:
            return self.params
        return self.params - (self.experts.num_experts - self.experts.num_chosen) * self.experts.params_each


@dataclass(frozen=True)
class ModelShape:
    """One decoder. Equal layers are one object; `kinds` groups them."""

    name: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    tied: bool
    """The head is the embedding table."""
    embedding_params: int
    """Of the embedding table, and of the head unless it is tied."""
    other_params: int
    """Outside layers: positions, final norm."""
    max_context: int
    """Tokens."""
    weight_bits: float = 16
    """Bits that a weight of the layers' plain matrices takes in the checkpoint, its share of the scales included.
    Embeddings, head, norms and biases take 16."""
    expert_bits: float = 16
    """The same of the experts' matrices."""
    tower_params: int = 0
    """Of encoders of images or sound, and what joins them to the decoder, at 16 bits."""

    def __hash__(self) -> int:
        """Of what tells models apart, not of every layer: shapes are keys wherever something is reckoned once."""
        return hash((self.name, self.hidden, self.num_layers, self.weight_bits, self.expert_bits))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head(self) -> Matrix:
        """The product that makes logits; its weights are counted in `embedding_params`."""
        return Matrix("head", self.hidden, self.vocab, "column")

    @cached_property  # a search asks for it at every plan it looks at
    def kinds(self) -> tuple[tuple[Layer, int], ...]:
        """Different layers with how many there are of each, in the order in which they first appear."""
        return self.kinds_among(0, self.num_layers)

    def kinds_among(self, first: int, last: int) -> tuple[tuple[Layer, int], ...]:
        """The same of layers first … last - 1."""
        return tuple(Counter(self.layers[first:last]).items())

    @property
    def params(self) -> int:
        """Numbers of the decoder. Towers, and layers that only draft tokens ahead (MTP), are not in it."""
        return self.embedding_params + self.other_params + sum(layer.params * count for layer, count in self.kinds)

    @property
    def active_params(self) -> int:
        """Numbers of the decoder that one token is multiplied with: chosen experts only, and not the embedding table,
        of which it takes a row; a tied one counts as the head."""
        table = 0 if self.tied else self.embedding_params // 2
        layers = sum(layer.active_params * count for layer, count in self.kinds)
        return self.embedding_params - table + self.other_params + layers

    @property
    def weight_bytes(self) -> int:
        """Bytes of the checkpoint's numbers, towers included."""
        plain = sum(matrix.params * count for layer, count in self.kinds for matrix in layer.matrices)
        experts = sum(
            layer.experts.num_experts * matrix.params * count
            for layer, count in self.kinds
            if layer.experts
            for matrix in layer.experts.matrices
        )
        others = self.params - plain - experts + self.tower_params
        return round((plain * self.weight_bits + experts * self.expert_bits + others * 16) / 8)

    def kv_numbers_per_token(self) -> int:
        """Numbers that all layers together cache of one more token, windows not yet full."""
        return sum(layer.attention.kv_numbers_per_token() * count for layer, count in self.kinds if layer.attention)

    def kv_numbers(self, context: int) -> int:
        """Numbers that all layers together keep of one sequence of `context` tokens: windows and fixed states
        counted as what they are. Times the bytes of a number: 2 in 16 bits."""
        return sum(layer.attention.kv_numbers(context) * count for layer, count in self.kinds if layer.attention)


def share_layers(layers: Iterable[Layer]) -> tuple[Layer, ...]:
    """The same layers, equal ones made one object."""
    known: dict[Layer, Layer] = {}
    return tuple(known.setdefault(layer, layer) for layer in layers)


def mlp_matrices(hidden: int, columns: int, *, gated: bool = True, prefix: str = "") -> tuple[Matrix, ...]:
    """Up (with its gate) and down."""
    if gated:
        up = Matrix(f"{prefix}gate_up", hidden, 2 * columns, "column")
    else:
        up = Matrix(f"{prefix}up", hidden, columns, "column")
    return up, Matrix(f"{prefix}down", columns, hidden, "row")


def attention_matrices(hidden: int, attention: Attention, *, output_gate: bool = False) -> tuple[Matrix, ...]:
    """q, k and v as one, and the output. `output_gate`: queries bring a gate of their size along (Qwen3.5)."""
    queries = attention.num_heads * attention.head_dim * (2 if output_gate else 1)
    keys_and_values = attention.num_kv_heads * (attention.head_dim + attention.value_dim)
    return (
        Matrix("qkv", hidden, queries + keys_and_values, "column"),
        Matrix("attention output", attention.num_heads * attention.value_dim, hidden, "row"),
    )


def router_matrix(hidden: int, num_experts: int) -> Matrix:
    return Matrix("router", hidden, num_experts, "replicated")


def shape_of_spec(spec: DecoderSpec, name: str = "") -> ModelShape:
    """The shape of a decoder that the runtime serves; it counts what `models.parameters` lists."""
    hidden = spec.hidden_size
    norm = hidden if spec.norm == "rms" else 2 * hidden
    table = spec.vocab_size * hidden
    return ModelShape(
        name=name or spec.family,
        hidden=hidden,
        vocab=spec.vocab_size,
        layers=share_layers(_layer_of_spec(spec, layer, norm) for layer in spec.layers),
        tied=spec.tie_embeddings,
        embedding_params=table if spec.tie_embeddings else 2 * table,
        other_params=spec.learned_positions * hidden + norm * (spec.embedding_norm + spec.final_norm),
        max_context=spec.max_positions,
    )


def _layer_of_spec(spec: DecoderSpec, layer: LayerSpec, norm: int) -> Layer:
    """`norm`: numbers of one norm of the hidden size."""
    hidden, head_dim = spec.hidden_size, spec.head_dim
    attention = Attention("softmax", spec.num_heads, spec.num_kv_heads, head_dim, head_dim, layer.window)
    matrices = attention_matrices(hidden, attention)
    num_norms = 1 if spec.block == "parallel" and spec.shared_parallel_norm else 4 if spec.block == "sandwich" else 2
    other = norm * num_norms + (2 * head_dim if spec.qk_norm else 0)
    other += matrices[0].outputs * spec.qkv_bias + hidden * spec.attention_out_bias
    if not layer.moe:
        mlp = mlp_matrices(hidden, spec.mlp_size, gated=spec.gated_mlp)
        return Layer(attention, matrices + mlp, None, other + spec.mlp_bias * sum(matrix.outputs for matrix in mlp))
    assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
    mlp = mlp_matrices(hidden, spec.moe.expert_mlp_size, gated=spec.gated_mlp)
    biases = spec.mlp_bias * sum(matrix.outputs for matrix in mlp)
    experts = Experts(spec.moe.num_experts, spec.moe.experts_per_token, mlp, biases)
    return Layer(attention, (*matrices, router_matrix(hidden, spec.moe.num_experts)), experts, other)
