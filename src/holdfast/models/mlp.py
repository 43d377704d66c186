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
        self.down = weights.row_parallel(f"{name}.down", lambda trees: trees.mlp)

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        return self.down(self.up(x), add_to=add_to)


class MixtureOfExperts:
    """Each token goes through K of E experts; their weighted outputs are added in expert-id order, in float32."""

    def __init__(self, spec: DecoderSpec, weights: Weights, name: str) -> None:
        assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
        self.kernels = weights.kernels
        self.routing = Routing(spec.moe.experts_per_token, spec.moe.renormalize)
        self.router = weights.linear(f"{name}.router")
        self.collectives = weights.stage_collectives
        held = range(spec.moe.num_experts) if self.collectives is None else weights.place.shard.experts
        self.up = [weights.packed[f"{name}.experts.{expert}.up"] for expert in held]
        self.down = [weights.packed[f"{name}.experts.{expert}.down"] for expert in held]

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        # float32: rounded to bfloat16, different scores often become equal, and the choice one of ids
        scores = self.router(x, dtype=torch.float32)
        if self.collectives is None:
            return self.kernels.experts(x, scores, self.routing, self.up, self.down, add_to=add_to)
        pieces = list(zip(*(down.packed for down in self.down), strict=True))
        return self.collectives.experts(x, scores, self.routing, self.up, pieces, add_to=add_to)
