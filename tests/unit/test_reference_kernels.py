"""The reference kernels against definitions written out loop by loop."""

from __future__ import annotations

import random

import gguf
import pytest
import torch

from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads, Quantized, Routing
from holdfast.kernels.reference import ReferenceKernels

KERNELS = ReferenceKernels()


# --- attention -------------------------------------------------------------------------------------


def place(positions: torch.Tensor, slots: torch.Tensor) -> BatchLayout:
    """As much of a layout as `store_kv` needs: one request."""
    count = len(positions)
    return BatchLayout((count,), (int(positions[-1]) + 1,), positions, slots, torch.zeros(1, 1, dtype=torch.int32))


class Problem:
    """Random requests of all kinds over a scattered cache, and the answer from the definition."""

    def __init__(self, seed: int, lens: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int = 8) -> None:
        """`lens`: (query length, context length) per request."""
        random_ = torch.Generator().manual_seed(seed)
        size = 4
        self.lens = lens
        widths = [-(-context // size) for _, context in lens]
        ids = (torch.randperm(sum(widths), generator=random_) + 1).split(widths)
        self.heads = Heads(heads, kv_heads, head_dim)
        self.k_pages = torch.zeros(sum(widths) + 1, kv_heads, size, head_dim)
        self.v_pages = torch.zeros_like(self.k_pages)
        self.q = torch.randn(sum(query for query, _ in lens), heads, head_dim, generator=random_)
        tables = torch.zeros(len(lens), max(widths), dtype=torch.int32)
        positions, slots, self.keys, self.values = [], [], [], []
        for row, ((query, context), blocks) in enumerate(zip(lens, ids, strict=True)):
            tables[row, : len(blocks)] = blocks
            where = torch.arange(context)
            at = blocks[where // size] * size + where % size
            keys, values = torch.randn(2, context, kv_heads, head_dim, generator=random_)
            queries = torch.randn(context, heads * head_dim, generator=random_)
            qkv = torch.cat((queries, keys.flatten(1), values.flatten(1)), dim=1)
            q = KERNELS.store_kv(qkv, self.heads, self.k_pages, self.v_pages, place(where, at))
            assert torch.equal(q, queries), "nothing to norm or rotate"
            self.keys.append(keys)
            self.values.append(values)
            positions.append(where[context - query :])
            slots.append(at[context - query :])
        self.batch = BatchLayout(
            query_lens=tuple(query for query, _ in lens),
            context_lens=tuple(context for _, context in lens),
            positions=torch.cat(positions),
            slots=torch.cat(slots),
            block_tables=tables,
        )

    def run(self, options: AttentionOptions, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        q, k, v = self.q.to(dtype), self.k_pages.to(dtype), self.v_pages.to(dtype)
        return KERNELS.attention(q.flatten(1), self.heads, k, v, self.batch, options).view(self.q.shape)

    def expected(self, options: AttentionOptions) -> torch.Tensor:
        """One query, one head, one key at a time."""
        out, token = torch.empty_like(self.q), 0
        group = self.q.shape[1] // self.keys[0].shape[1]
        for (query, context), keys, values in zip(self.lens, self.keys, self.values, strict=True):
            for position in range(context - query, context):
                first = 0 if options.window is None else max(0, position - options.window + 1)
                for head in range(self.q.shape[1]):
                    scores = keys[first : position + 1, head // group] @ self.q[token, head] * options.scale
                    if options.softcap is not None:
                        scores = torch.tanh(scores / options.softcap) * options.softcap
                    if options.alibi_slopes is not None:
                        scores += options.alibi_slopes[head] * (torch.arange(first, position + 1) - position)
                    out[token, head] = scores.softmax(0) @ values[first : position + 1, head // group]
                token += 1
        return out


MIXED = [(1, 9), (5, 5), (1, 1), (3, 17), (1, 30), (2, 2), (1, 4), (9, 12)]
OPTIONS = {
    "plain": AttentionOptions(scale=0.3),
    "window": AttentionOptions(scale=0.3, window=3),
    "wide window": AttentionOptions(scale=0.3, window=100),
    "soft-cap": AttentionOptions(scale=0.8, softcap=1.5),
    "alibi": AttentionOptions(scale=0.3, alibi_slopes=torch.linspace(0.1, 2, 6)),
    "everything": AttentionOptions(scale=0.8, softcap=2.0, window=5, alibi_slopes=torch.linspace(0.1, 2, 6)),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_equals_its_definition(options: AttentionOptions, kv_heads: int):
    """Prefill from the start, later chunks, and decodes between them, over scattered blocks."""
    problem = Problem(0, MIXED, heads=6, kv_heads=kv_heads)
    torch.testing.assert_close(problem.run(options), problem.expected(options), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_attention_in_bfloat16(options: AttentionOptions):
    problem = Problem(3, MIXED, heads=6, kv_heads=2)
    out = problem.run(options, torch.bfloat16)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), problem.expected(options), atol=0.06, rtol=0)


def test_many_long_decodes_are_cut_into_groups():
    """More keys than one gather may copy: requests are sorted by length and cut; nothing may get mixed up."""
    dice = random.Random(0)
    lens = [(1, dice.choice((3, 700, 1500))) for _ in range(90)] + [(2, 50)]
    dice.shuffle(lens)
    problem = Problem(1, lens, heads=2, kv_heads=1, head_dim=4)
    options = AttentionOptions(scale=0.5, window=900)
    torch.testing.assert_close(problem.run(options), problem.expected(options), atol=1e-5, rtol=0)


def test_long_prefill_with_softcap_is_cut_into_rows():
    problem = Problem(2, [(300, 310)], heads=2, kv_heads=2, head_dim=4)
    options = AttentionOptions(scale=0.5, softcap=3.0)
    torch.testing.assert_close(problem.run(options), problem.expected(options), atol=1e-5, rtol=0)


# --- q, k and v ------------------------------------------------------------------------------------


def turned(x: torch.Tensor, table: torch.Tensor, position: int) -> torch.Tensor:
    """One head [D] rotated: dim i turns with dim i + rotary_dim / 2; dims beyond rotary_dim stay."""
    cos, sin = table[position]
    out = x.clone()
    for i in range(len(cos)):
        a, b = x[i], x[i + len(cos)]
        out[i], out[i + len(cos)] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("rotary_dim", [0, 6, 8])
def test_store_kv_norms_then_rotates_and_writes_to_the_slots(rotary_dim: int, normed: bool, dtype: torch.dtype):
    """q and k are normed and turned, v is neither; each head and token lands in its own place, all others stay."""
    random_ = torch.Generator().manual_seed(4)
    norms = torch.randn(2, 8, generator=random_) if normed else (None, None)
    table = torch.randn(10, 2, rotary_dim // 2, generator=random_) if rotary_dim else None
    heads = Heads(6, 2, 8, rope=table, q_norm=norms[0], k_norm=norms[1], eps=1e-5)
    qkv = torch.randn(4, (6 + 2 * 2) * 8, generator=random_).to(dtype)
    before = qkv.double().view(4, 10, 8)
    positions, slots = torch.tensor([9, 0, 3, 4]), torch.tensor([4 * 4 + 1, 2 * 4 + 3, 0, 4 * 4 + 2])
    k_pages, v_pages = (torch.full((5, 2, 4, 8), 7.0).to(dtype) for _ in range(2))
    q = KERNELS.store_kv(qkv, heads, k_pages, v_pages, place(positions, slots))
    assert q.dtype == dtype
    assert q.shape == (4, 48)

    def expected(token: int, head: int, norm: torch.Tensor | None) -> torch.Tensor:
        x = before[token, head]
        if norm is not None:
            x = x / (x.pow(2).mean() + 1e-5).sqrt() * norm
        return x if table is None else turned(x, table.double(), int(positions[token]))

    near = {"atol": 1e-5, "rtol": 1e-2 if dtype == torch.bfloat16 else 1e-5}
    for token, slot in enumerate(slots.tolist()):
        for head in range(6):
            torch.testing.assert_close(q.view(4, 6, 8)[token, head].double(), expected(token, head, norms[0]), **near)
        for head in range(2):
            key = k_pages[slot // 4, head, slot % 4].double()
            torch.testing.assert_close(key, expected(token, 6 + head, norms[1]), **near)
            assert torch.equal(v_pages[slot // 4, head, slot % 4].double(), before[token, 8 + head])
    for pages in (k_pages, v_pages):
        assert (pages == 7.0).all(dim=-1).sum() == 5 * 2 * 4 - 4 * 2


# --- linear ----------------------------------------------------------------------------------------


def test_linear_stacks_parts_and_their_biases():
    parts, biases = [torch.randn(rows, 12) for rows in (5, 1, 3)], [torch.randn(rows) for rows in (5, 1, 3)]
    x = torch.randn(4, 12)
    expected = torch.cat([x @ part.T for part in parts], dim=1)
    torch.testing.assert_close(KERNELS.linear(x, KERNELS.pack(parts)), expected)
    with_biases = KERNELS.linear(x, KERNELS.pack(parts, biases))
    torch.testing.assert_close(with_biases, expected + torch.cat(biases))


def test_pack_copies_what_it_needs():
    """The loader lets go of what it packed: a view of a file."""
    part, x = torch.randn(3, 4), torch.randn(2, 4)
    packed = KERNELS.pack([part])
    expected = KERNELS.linear(x, packed)
    part.zero_()
    assert torch.equal(KERNELS.linear(x, packed), expected)


def test_activations_are_transformers_ones():
    from transformers.activations import ACT2FN  # noqa: PLC0415

    x, bias = torch.linspace(-4, 4, 101)[:, None], torch.tensor([0.25, -0.5])
    up, gate = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [1.5]])
    for ours, theirs in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu", "relu")):
        activate = ACT2FN[theirs]
        plain = KERNELS.linear(x, KERNELS.pack([up], [bias], activation=ours))
        torch.testing.assert_close(plain, activate(x @ up.T + bias), atol=1e-6, rtol=0)
        gated = KERNELS.linear(x, KERNELS.pack([gate, up], [bias, -bias], activation=ours, gated=True))
        expected = activate(x @ gate.T + bias) * (x @ up.T - bias)
        torch.testing.assert_close(gated, expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_gives_the_dtype_asked_for(x_dtype: torch.dtype, weight_dtype: torch.dtype):
    """Also of weights in another dtype than x, and into the float32 residual stream."""
    x, weight, bias = torch.randn(4, 64).to(x_dtype), torch.randn(8, 64).to(weight_dtype), torch.randn(8)
    expected = x.double() @ weight.double().T + bias.to(weight_dtype)
    packed = KERNELS.pack([weight], [bias.to(weight_dtype)])
    rounded = torch.bfloat16 in (x_dtype, weight_dtype)  # torch multiplies in bfloat16 what is all bfloat16
    for dtype in (None, torch.float32, torch.bfloat16):
        out = KERNELS.linear(x, packed, dtype=dtype)
        assert out.dtype == (dtype or x_dtype)
        atol = 1e-4 if out.dtype == torch.float32 and not rounded else 0.2
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    stream = torch.randn(4, 8)
    before = stream.double()
    assert KERNELS.linear(x, packed, add_to=stream) is stream
    torch.testing.assert_close(stream.double(), before + expected, atol=0.2 if rounded else 1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_quantized_parts_are_their_exact_values(kind: str):
    """Stacked, as a table, and whatever dtype the kernels turn them into."""
    quantization = gguf.GGMLQuantizationType[kind]
    blocks = [gguf.quants.quantize(torch.randn(rows, 96).numpy(), quantization) for rows in (5, 2)]
    exact = torch.cat([torch.from_numpy(gguf.quants.dequantize(part, quantization)) for part in blocks])
    parts = [Quantized(kind, torch.from_numpy(part)) for part in blocks]
    assert [part.shape for part in parts] == [(5, 96), (2, 96)]
    x = torch.randn(3, 96)
    torch.testing.assert_close(KERNELS.linear(x, KERNELS.pack(parts)), x @ exact.T)
    ids = torch.tensor([6, 0, 3])
    assert torch.equal(KERNELS.embedding(ids, KERNELS.pack(parts)), exact[ids])
    rounding = ReferenceKernels(torch.bfloat16)
    assert torch.equal(rounding.embedding(ids, rounding.pack(parts)), exact[ids].bfloat16().float())


# --- the small ones --------------------------------------------------------------------------------


def test_norms_compute_in_float32_and_return_the_dtype_asked_for():
    x = (torch.randn(3, 16) * 30).bfloat16()
    weight, bias = torch.randn(16), torch.randn(16)
    exact = x.double()
    rms = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    centred = exact - exact.mean(-1, keepdim=True)
    layer = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    for dtype in (torch.bfloat16, torch.float32):
        near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}
        torch.testing.assert_close(KERNELS.rms_norm(x, weight, 1e-5, dtype), rms.to(dtype), **near)
        torch.testing.assert_close(KERNELS.layer_norm(x, weight, bias, 1e-5, dtype), layer.to(dtype), **near)
    no_bias = KERNELS.layer_norm(x, weight, None, 1e-5, torch.float32)
    torch.testing.assert_close(no_bias.double(), layer - bias, atol=1e-5, rtol=1e-5)


def test_norms_add_unrounded_to_the_residual_stream():
    x, weight, bias = torch.randn(3, 16).bfloat16(), torch.randn(16), torch.randn(16)
    start = torch.randn(3, 16)
    for norm, args in ((KERNELS.rms_norm, (weight,)), (KERNELS.layer_norm, (weight, bias))):
        stream = start.clone()
        assert norm(x, *args, 1e-5, torch.bfloat16, add_to=stream) is stream
        assert torch.equal(stream, start + norm(x, *args, 1e-5, torch.float32))


def test_convert_makes_another_tensor():
    """Blocks that norm after their sums read it while the stream is added to."""
    x = torch.tensor([[1.0, 1.001]])
    assert KERNELS.convert(x, torch.bfloat16).tolist() == [[1.0, 1.0]]
    assert KERNELS.convert(x, torch.float32).data_ptr() != x.data_ptr()


def test_embedding_scales_moves_and_adds_rows():
    table = torch.randn(7, 3)
    ids, packed = torch.tensor([4, 0]), KERNELS.pack([table])
    torch.testing.assert_close(KERNELS.embedding(ids, packed, scale=2.5), table[[4, 0]] * 2.5)
    stream = torch.ones(2, 3)
    assert KERNELS.embedding(ids, packed, offset=2, add_to=stream) is stream
    torch.testing.assert_close(stream, table[[6, 2]] + 1)
    rows = KERNELS.embedding(ids, KERNELS.pack([table.bfloat16()]), scale=1.1)
    torch.testing.assert_close(rows, table.bfloat16().float()[[4, 0]] * 1.1)


def test_softcap_in_place():
    x = torch.tensor([[0.0, 1.0, -50.0]])
    expected = torch.tanh(x / 3.0) * 3.0
    assert KERNELS.softcap(x, 3.0) is x
    torch.testing.assert_close(x, expected)


# --- experts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_experts_equal_their_definition(chosen: int, renormalize: bool):
    """Row by row: the best by score, each one's answer times its share; the last expert is nobody's choice."""
    random_ = torch.Generator().manual_seed(chosen)
    gates, ups = torch.randn(2, 6, 7, 4, generator=random_)
    downs = torch.randn(6, 4, 7, generator=random_)
    x, scores = torch.randn(9, 4, generator=random_), torch.randn(9, 6, generator=random_)
    scores[:, 5] = -100.0
    expected = torch.zeros(9, 4)
    for row in range(9):
        shares = scores[row].softmax(-1)
        best = sorted(range(6), key=lambda expert: -shares[expert].item())[:chosen]
        total = sum(shares[expert] for expert in best) if renormalize else 1.0
        for expert in best:
            hidden = torch.nn.functional.silu(gates[expert] @ x[row]) * (ups[expert] @ x[row])
            expected[row] += shares[expert] / total * (downs[expert] @ hidden)
    up = [KERNELS.pack([gates[e], ups[e]], activation="silu", gated=True) for e in range(6)]
    down = [KERNELS.pack([downs[e]]) for e in range(6)]
    routing = Routing(chosen, renormalize)
    torch.testing.assert_close(KERNELS.experts(x, scores, routing, up, down), expected)
    stream = torch.ones(9, 4)
    assert KERNELS.experts(x.bfloat16(), scores, routing, up, down, add_to=stream) is stream
    torch.testing.assert_close(stream, expected + 1, atol=0.1, rtol=0.05)


def test_ties_between_experts_go_to_the_lowest():
    """Each expert answers with its own number."""
    up = [KERNELS.pack([torch.ones(1, 1)]) for _ in range(5)]
    down = [KERNELS.pack([torch.tensor([[10.0**expert]])]) for expert in range(5)]
    scores = torch.tensor([[0.0, 2.0, 2.0, 2.0, -1.0], [5.0, 0.0, 1.0, 5.0, 0.0]])
    out = KERNELS.experts(torch.ones(2, 1), scores, Routing(2, renormalize=True), up, down)
    torch.testing.assert_close(out, torch.tensor([[(10 + 100) / 2], [(1 + 1000) / 2]]))
