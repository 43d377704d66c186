"""A tiny Mixtral whose experts are chosen about as Zipf's law has it: a few of them most of the time."""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from support.checkpoints import random_model

SHAPE = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "max_position_embeddings": 2048,
}
EXPERTS = {"num_local_experts": 16, "num_experts_per_tok": 2}


def skewed_mixtral(*, exponent: float = 1.0, seed: int = 0, **config: object) -> PreTrainedModel:
    """The first number of the residual stream is the same for every token, and no layer changes it: it carries the
    logarithms of Zipf's shares, in another order for each layer, to the router. What the others add has the spread
    of Gumbel noise, so the likeliest expert is one drawn by these shares."""
    model = random_model(seed, model_type="mixtral", **config)
    order = np.random.default_rng(seed)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.experts.down_proj[:, 0] = 0.0
            layer.post_attention_layernorm.weight[0] = 1.0
            router = layer.mlp.gate.weight
            experts, hidden = router.shape
            router.normal_(0.0, 1.28 / hidden**0.5)
            ranks = torch.from_numpy(order.permutation(experts) + 1.0)
            router[:, 0] = -exponent * ranks.log().float()
    return model
