"""The feed-forward half of a block: gated or plain, one or a routed mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.core.spec import DecoderSpec
from holdfast.models.layers import Weights


class GatedMLP:
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str) -> None:
        self.kernels = weights.kernels
        self.activation = spec.activation
        self.gate = weights.linear(f"{name}.gate")
        self.up = weights.linear(f"{name}.up")
        self.down = weights.linear(f"{name}.down")

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.gated_activate(self.gate(x), self.up(x), self.activation))


class PlainMLP:
    """down(activation(up(x)))."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str) -> None:
        self.kernels = weights.kernels
        self.activation = spec.activation
        self.up = weights.linear(f"{name}.up")
        self.down = weights.linear(f"{name}.down")

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.kernels.activate(self.up(x), self.activation))


class MixtureOfExperts:
    """Each token goes through K of E experts; their weighted outputs are added in expert-id order, in float32."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str) -> None:
        assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
        self.kernels = weights.kernels
        self.moe = spec.moe
        self.router = weights.linear(f"{name}.router")
        self.experts = [make_mlp(spec, weights, f"{name}.experts.{expert}") for expert in range(spec.moe.num_experts)]

    def __call__(self, x: Tensor) -> Tensor:
        shares, chosen = self.kernels.route(self.router(x), self.moe.experts_per_token, self.moe.renormalize)
        out = torch.zeros_like(x, dtype=torch.float32)
        for expert_id in torch.unique(chosen).tolist():  # ascending
            tokens, choice = torch.nonzero(chosen == expert_id, as_tuple=True)
            out.index_add_(0, tokens, self.experts[expert_id](x[tokens]).float() * shares[tokens, choice, None])
        return out.to(x.dtype)


def make_mlp(spec: DecoderSpec, weights: Weights, name: str) -> GatedMLP | PlainMLP:
    return GatedMLP(spec, weights, name) if spec.gated_mlp else PlainMLP(spec, weights, name)
