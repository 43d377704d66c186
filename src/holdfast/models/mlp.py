"""The feed-forward half of a block: one MLP or a routed mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import Routing
from holdfast.models.layers import Weights


class MLP:
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)). `up` is packed with all but down."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.up = weights.linear(f"{name}.up")
        self.down = weights.linear(f"{name}.down")

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        return self.down(self.up(x), add_to=add_to)


class MixtureOfExperts:
    """Each token goes through K of E experts; their weighted outputs are added in expert-id order, in float32."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str) -> None:
        assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
        self.kernels = weights.kernels
        self.routing = Routing(spec.moe.experts_per_token, spec.moe.renormalize)
        self.router = weights.linear(f"{name}.router")
        experts = [f"{name}.experts.{expert}" for expert in range(spec.moe.num_experts)]
        self.up = [weights.packed[f"{expert}.up"] for expert in experts]
        self.down = [weights.packed[f"{expert}.down"] for expert in experts]

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        # float32: rounded to bfloat16, different scores often become equal, and the choice one of ids
        scores = self.router(x, dtype=torch.float32)
        return self.kernels.experts(x, scores, self.routing, self.up, self.down, add_to=add_to)
