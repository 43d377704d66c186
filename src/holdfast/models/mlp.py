"""The feed-forward half of a block: one MLP or a routed mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from holdfast.core.spec import DecoderSpec
from holdfast.kernels.interface import Routing
from holdfast.models.layers import Weights
from holdfast.parallel.collectives import LocalExperts
from holdfast.parallel.placement import experts_at, group_of, owners_of, table_of


class MLP:
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)). `up` is packed with all but down."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.up = weights.linear(f"{name}.up")
        self.down = weights.row_parallel(f"{name}.down", lambda trees: trees.mlp)

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        return self.down(self.up(x), add_to=add_to)


class MixtureOfExperts:
    """Each token goes through K of E experts; their weighted outputs are added in expert-id order, in float32."""

    def __init__(self, spec: DecoderSpec, weights: Weights, layer: int) -> None:
        assert spec.moe is not None, "a layer with experts needs DecoderSpec.moe"
        name, place = f"layers.{layer}.moe", weights.place
        self.kernels = weights.kernels
        self.routing = Routing(spec.moe.experts_per_token, spec.moe.renormalize)
        self.router = weights.linear(f"{name}.router")
        self.collectives = weights.stage_collectives
        ids = experts_at(place, layer)
        self.up, self.down = (
            [weights.packed[f"{name}.experts.{expert}.{half}"] for expert in ids] for half in ("up", "down")
        )
        if self.collectives is not None:
            pieces = list(zip(*(down.packed for down in self.down), strict=True))
            table = torch.tensor(table_of(owners_of(place.stage_plan, layer)))
            index = torch.full(table.shape[1:], len(ids))
            index[list(ids)] = torch.arange(len(ids))
            here = index.where(table == group_of(place), len(ids)).to(weights.device)
            self.local = LocalExperts(layer, ids, self.up, pieces, table, here)

    def __call__(self, x: Tensor, *, add_to: Tensor | None = None) -> Tensor:
        # float32: rounded to bfloat16, different scores often become equal, and the choice one of ids
        scores = self.router(x, dtype=torch.float32)
        if self.collectives is None:
            return self.kernels.experts(x, scores, self.routing, self.up, self.down, add_to=add_to)
        return self.collectives.experts(x, scores, self.routing, self.local, add_to=add_to)
