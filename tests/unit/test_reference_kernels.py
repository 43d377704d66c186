"""The reference kernels against definitions written out loop by loop."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.kernels.interface import AttentionOptions, BatchLayout
from holdfast.kernels.philox import philox
from holdfast.kernels.reference import ReferenceKernels

KERNELS = ReferenceKernels()


# --- noise -----------------------------------------------------------------------------------------


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 from the paper, with Python's own integers."""
    c, k = list(counter), list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


def tensor_philox(counter: list[int], key: list[int]) -> list[int]:
    c0, c1, c2, c3, k0, k1 = (torch.tensor([word]) for word in (*counter, *key))
    return [int(word) for word in philox((c0, c1, c2, c3), (k0, k1))]


ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # the vectors published with the generator
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]):
    assert scalar_philox(counter, key) == words
    assert tensor_philox(counter, key) == words


word = st.integers(0, ONES)


@given(st.lists(word, min_size=4, max_size=4), st.lists(word, min_size=2, max_size=2))
def test_philox_equals_the_scalar_one(counter: list[int], key: list[int]):
    assert tensor_philox(counter, key) == scalar_philox(counter, key)


def scalar_noise(seed: int, position: int, token_id: int) -> float:
    key = [seed % 2**32, (seed >> 32) % 2**32]
    chosen = scalar_philox([token_id // 4, position, 0, 0], key)[token_id % 4]
    return -math.log(-math.log1p(-(chosen + 0.5) * 2.0**-32))


def test_noise_is_a_function_of_seed_position_and_token():
    """Also for seeds above 2^63, which travel as negative numbers, and a vocabulary that is no multiple of four."""
    seeds, positions = [0, 1, 2**63 - 1, -1, -(2**62)], [0, 7, 131071, 5, 2]
    noise = KERNELS.gumbel_noise(torch.tensor(seeds), torch.tensor(positions), 10)
    assert noise.shape == (5, 10)
    assert noise.dtype == torch.float32
    for row, seed, position in zip(noise.tolist(), seeds, positions, strict=True):
        expected = [scalar_noise(seed, position, token_id) for token_id in range(10)]
        assert row == pytest.approx(expected, abs=1e-6)


def test_noise_does_not_depend_on_the_batch():
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    together = KERNELS.gumbel_noise(seeds, positions, 4099)
    alone = KERNELS.gumbel_noise(seeds[1:2], positions[1:2], 4099)
    assert torch.equal(together[1], alone[0])
    assert KERNELS.gumbel_noise(seeds[:0], positions[:0], 11).shape == (0, 11)


def test_noise_samples_the_softmax():
    """argmax(logits + noise) over many positions hits each token as often as its probability says (Gumbel-max)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    draws = 4_000
    noise = KERNELS.gumbel_noise(torch.full((draws,), 42), torch.arange(draws), 5)
    counts = (logits + noise).argmax(-1).bincount(minlength=5)
    expected = logits.softmax(-1) * draws
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), (counts, expected)


# --- filters ---------------------------------------------------------------------------------------


def naive_filter(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """Token ids that stay; the filters in order, each over what the one before left."""
    peak = max(row)
    kept = {i for i, x in enumerate(row) if min_p == 0 or x >= peak + math.log(min_p)}
    if top_k:
        kth = sorted((row[i] for i in kept), reverse=True)[min(top_k, len(kept)) - 1]
        kept = {i for i in kept if row[i] >= kth}
    if top_p < 1:
        total = sum(math.exp(row[i]) for i in kept)
        mass, last = 0.0, peak
        for value in sorted((row[i] for i in kept), reverse=True):
            if mass >= top_p * total:
                break
            last = value
            mass += math.exp(value)
        kept = {i for i in kept if row[i] >= last}
    return kept


@given(st.integers(0, 2**32), st.sampled_from([6, 50, 3000]))
@settings(max_examples=60, deadline=None)
def test_filters_equal_the_naive_ones(seed: int, vocab_size: int):
    """3,000 tokens are more than the candidates looked at first, and flat rows make those fall short."""
    dice = random.Random(seed)
    rows, settings_ = [], []
    for _ in range(4):
        spread = dice.choice((0.01, 1.0, 5.0))
        rows.append([dice.gauss(0, spread) for _ in range(vocab_size)])
        settings_.append((dice.choice((0, 1, 3, 40, 2000)), dice.choice((1.0, 0.9, 0.37)), dice.choice((0.0, 0.05))))
    top_k = torch.tensor([k for k, _, _ in settings_])
    top_p, min_p = (torch.tensor([entry[i] for entry in settings_]) for i in (1, 2))
    logits = torch.tensor(rows)
    filtered = KERNELS.filter_logits(logits.clone(), top_k, top_p, min_p)
    assert torch.equal(filtered.isinf() | (filtered == logits), torch.ones_like(logits, dtype=torch.bool))
    for row, out, setting in zip(logits.double().tolist(), filtered, settings_, strict=True):
        kept = set(out.isfinite().nonzero()[:, 0].tolist())
        # rounding may move the last token of a nucleus in or out; nothing else may differ
        assert len(kept ^ naive_filter(row, *setting)) <= (1 if setting[1] < 1 else 0)


def test_filters_keep_ties_together():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    off = {"top_p": torch.ones(1), "min_p": torch.zeros(1)}
    kept = KERNELS.filter_logits(logits, torch.tensor([2]), **off)
    assert kept.isfinite().tolist() == [[False, True, True, True, False]]


def test_the_likeliest_token_always_stays():
    logits = torch.tensor([[0.0, 5.0, 1.0]])
    kept = KERNELS.filter_logits(logits, torch.tensor([1]), torch.tensor([1e-9]), torch.tensor([1.0]))
    assert kept.isfinite().tolist() == [[False, True, False]]


# --- attention -------------------------------------------------------------------------------------


class Problem:
    """Random requests of all kinds over a scattered cache, and the answer from the definition."""

    def __init__(self, seed: int, lens: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int = 8) -> None:
        """`lens`: (query length, context length) per request."""
        random_ = torch.Generator().manual_seed(seed)
        size = 4
        self.lens = lens
        widths = [-(-context // size) for _, context in lens]
        ids = (torch.randperm(sum(widths), generator=random_) + 1).split(widths)
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
            KERNELS.store_kv(keys, values, self.k_pages, self.v_pages, at)
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
        return KERNELS.attention(q, k, v, self.batch, options)

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


# --- the small ones --------------------------------------------------------------------------------


def test_rotate_turns_pairs_and_leaves_the_rest():
    """Half-split: dim i turns with dim i + rotary_dim / 2; dims beyond rotary_dim stay."""
    table = torch.randn(10, 2, 3)
    x, positions = torch.randn(4, 2, 8), torch.tensor([9, 0, 3, 3])
    out = KERNELS.rotate(x, table, positions)
    for token, position in enumerate(positions):
        cos, sin = table[position]
        for i in range(3):
            a, b = x[token, :, i], x[token, :, i + 3]
            torch.testing.assert_close(out[token, :, i], a * cos[i] - b * sin[i])
            torch.testing.assert_close(out[token, :, i + 3], b * cos[i] + a * sin[i])
    assert torch.equal(out[..., 6:], x[..., 6:])
    assert KERNELS.rotate(x.bfloat16(), table, positions).dtype == torch.bfloat16


def test_norms_compute_in_float32_and_return_the_models_dtype():
    x = (torch.randn(3, 16) * 30).bfloat16()
    weight, bias = torch.randn(16), torch.randn(16)
    exact = x.double()
    rms = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    out = KERNELS.rms_norm(x, weight, 1e-5, x.dtype)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, rms.bfloat16())
    centred = exact - exact.mean(-1, keepdim=True)
    layer = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias
    torch.testing.assert_close(KERNELS.layer_norm(x, weight, bias, 1e-5, x.dtype), layer.bfloat16())
    heads = torch.randn(3, 2, 16)
    assert KERNELS.rms_norm(heads, weight, 1e-5, heads.dtype).shape == heads.shape


def test_route_orders_experts_and_gives_ties_to_the_lowest():
    logits = torch.tensor([[0.0, 2.0, 2.0, 2.0, -1.0], [5.0, 0.0, 1.0, 4.0, 0.0]])
    weights, ids = KERNELS.route(logits, 2, renormalize=False)
    assert ids.tolist() == [[1, 2], [0, 3]]
    torch.testing.assert_close(weights, logits.softmax(-1).gather(1, ids))
    renormalized, _ = KERNELS.route(logits, 2, renormalize=True)
    torch.testing.assert_close(renormalized.sum(-1), torch.ones(2))


def test_activations_are_transformers_ones():
    from transformers.activations import ACT2FN  # noqa: PLC0415

    x = torch.linspace(-4, 4, 101)
    for ours, theirs in (("silu", "silu"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu", "relu")):
        torch.testing.assert_close(KERNELS.activate(x, ours), ACT2FN[theirs](x), atol=1e-6, rtol=0)
    torch.testing.assert_close(KERNELS.gated_activate(x, x + 1, "silu"), ACT2FN["silu"](x) * (x + 1))


def test_embedding_scales_rows():
    table = torch.randn(7, 3)
    torch.testing.assert_close(KERNELS.embedding(torch.tensor([6, 0]), table, 2.5), table[[6, 0]] * 2.5)
