"""What FasterTransformer allocates for a batch of a GPT: an engine that knows its batch beforehand.

It has no blocks: buffers are as long as the longest sequence, for all of the batch, and are made when a batch comes.
Counted after its source (github.com/NVIDIA/FasterTransformer at df4a753, src/fastertransformer): the `allocateBuffer`
of models/multi_gpu_gpt/ParallelGpt.cc, ParallelGptContextDecoder.cc and ParallelGptDecoder.cc, of
layers/attention_layers/GptContextAttentionLayer.cc, layers/FfnLayer.cc and layers/sampling_layers; the
`mallocWeights` of ParallelGptWeight.cc.
"""

from __future__ import annotations

from holdfast.planner.memory.engines import GIB
from holdfast.planner.memory.ranks import RankMemory, ShapeTable, rank_memory
from holdfast.planner.memory.shares import even_shares

RESERVE = int(2.6 * GIB)
"""Beside its buffers: device context, the code of all its kernels, cuBLAS. What its guide measures of GPT-350M, 1.3B
and 6.7B on an A100 with one or two sequences (docs/gpt_guide.md, Memory Usage) less what is counted here."""
_POSITIONS = 1024
"""max_seq_len of examples/cpp/multi_gpu_gpt/gpt_config.ini."""
_BUFFERS_OF_PROMPT = 5
"""[batch, input, hidden]: input and output of the context decoder; in it the norm, the attention's result, and a
layer's."""
_BUFFERS_OF_SHARED_PROMPTS = 3
"""Of the same size: hidden states, keys and values of prompts that are computed once (shared_contexts_ratio = 1, as
its example has it; from two sequences on)."""
_BUFFERS_OF_HEADS = 8
"""[batch, input, hidden / tensor degree]: q, k and v before and after they are transposed, the result likewise."""
_BYTES_PER_LOGIT = 36 + 8
"""Of each sequence and word, in float32 and int32: logits, and what comes of their gathering; a copy of either
sampling layer, for top-k one more, for top-p the words, the sorted words and logits, and what sorting takes."""


def fastertransformer_memory(
    table: ShapeTable, *, tensor: int = 1, pipeline: int = 1, batch: int, input_len: int, output_len: int
) -> RankMemory:
    """Bytes of the fullest rank for `batch` prompts of `input_len` tokens, `output_len` tokens each to come, in 16
    bits.

    Embeddings and head are whole on every rank, and two tables even where they are tied; the table of positions is
    as wide as the vocabulary. Micro-batches of a pipeline share the buffers of the whole batch; those of the context
    decoder are as large as a micro-batch. Raises `ConfigError` for degrees that cannot be.
    """
    shape = table.shape
    share = even_shares(shape.num_layers, tensor=tensor, pipeline=pipeline)[0]
    layers = rank_memory(table, share)
    kv = sum(
        count * kind.attention.kv_numbers_per_token() for kind, count in table.counts(*share.layers) if kind.attention
    )
    columns = max(kind.mlp_live // 2 for kind in table.kinds)  # as many made as taken: no gate
    heads = max(kind.attention.num_heads for kind in table.kinds if kind.attention)
    inner = max(kind.attention.num_heads * kind.attention.value_dim for kind in table.kinds if kind.attention)
    prompts = micro_batch(batch, pipeline) * input_len
    shared = _BUFFERS_OF_SHARED_PROMPTS if batch > 1 else 0
    numbers = (
        2 * batch * input_len * shape.hidden
        + (_BUFFERS_OF_PROMPT - 2 + shared) * prompts * shape.hidden
        + (_BUFFERS_OF_HEADS * inner + columns + heads * input_len) * prompts // tensor
        + batch * input_len * input_len
    )
    return RankMemory(
        attention_weights=layers.attention_weights,
        mlp_weights=layers.mlp_weights,
        embedding_weights=2 * (2 * table.table + _POSITIONS * shape.vocab),
        other_weights=layers.other_weights,
        kv_cache=2 * batch * (input_len + output_len) * kv // tensor,
        activations=2 * numbers,
        logits=batch * shape.vocab * _BYTES_PER_LOGIT,
        reserve=RESERVE,
    )


def micro_batch(batch: int, pipeline: int) -> int:
    """Sequences that go through a pipeline's stages together (`getLocalBatchSize` of utils/nccl_utils.cc)."""
    return batch // pipeline if pipeline > 1 and batch % pipeline == 0 else batch
