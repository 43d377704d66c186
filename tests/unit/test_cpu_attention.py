"""Attention and the KV cache of the CPU kernels in every build: against float64, and bit for bit against itself."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.kernels.cpu import executor
from holdfast.kernels.cpu.step import StepBatch
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads
from support.attention import Cached, Part
from support.cpu import BFLOAT16_EPS, Build, every_build, every_isa, generator, same_bits

DTYPES = [torch.float32, torch.bfloat16]


def slopes(num_heads: int) -> Tensor:
    return torch.linspace(0.01, 0.5, num_heads)


def options_for(num_heads: int, head_dim: int) -> dict[str, AttentionOptions]:
    scale = head_dim**-0.5
    return {
        "plain": AttentionOptions(scale),
        "window": AttentionOptions(scale, window=50),
        "soft-cap": AttentionOptions(2 * scale, softcap=1.5),
        "alibi": AttentionOptions(scale, alibi_slopes=slopes(num_heads)),
        "everything": AttentionOptions(3 * scale, softcap=2.0, window=90, alibi_slopes=slopes(num_heads)),
    }


OPTIONS = list(options_for(1, 1))


def assert_near(out: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest number, and half a step of a bfloat16 result."""
    rounding = BFLOAT16_EPS if out.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=rounding)


MIXED: list[Part] = [
    (0, 0, 9),  # a prefill,
    (1, 200, 201),  # decodes,
    (2, 0, 1),
    (3, 64, 65),
    (4, 100, 135),  # a later chunk,
    (5, 3, 67),  # one that ends in another tile,
    (6, 127, 128),
]
LENS = [stop for *_, stop in MIXED]


@every_build
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_equals_its_definition(build: Build, dtype: torch.dtype, option: str):
    """Prefills, later chunks and decodes in one step, with every block size; nothing of unused blocks is read."""
    kernels, options = build.kernels(dtype), options_for(9, 64)[option]
    caches = [Cached(kernels, Heads(9, 3, 64), LENS, block_size=size, dtype=dtype) for size in (1, 4, 16, 32)]
    expected = caches[0].expected(MIXED, options)
    for cached in caches:
        assert_near(cached.run(MIXED, options), expected)


SHAPES = [
    (1, 1, 1),
    (3, 3, 7),
    (6, 1, 10),
    (4, 2, 64),
    (8, 1, 80),
    (5, 1, 96),
    (14, 2, 128),
    (2, 1, 256),
    (1, 1, 512),
]


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_of_any_heads(isa: str, shape: tuple[int, int, int], dtype: torch.dtype):
    """One or many query heads for each KV head, in parts of four; head dims that are odd or less than a vector."""
    kernels = Build(isa, 2).kernels(dtype)
    for block_size, options in zip((4, 16), list(options_for(shape[0], shape[2]).values())[::4], strict=True):
        cached = Cached(kernels, Heads(*shape), [70, 33, 130], block_size=block_size, dtype=dtype)
        parts = [(0, 0, 70), (1, 32, 33), (2, 100, 130)]
        assert_near(cached.run(parts, options), cached.expected(parts, options))


@every_isa
@given(
    shape=st.sampled_from([(1, 1, 3), (6, 2, 5), (5, 1, 16), (9, 3, 24)]),
    block_size=st.sampled_from([1, 3, 4, 16, 24, 32, 48]),
    dtype=st.sampled_from(DTYPES),
    option=st.sampled_from(OPTIONS),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_any_step_equals_its_definition(  # noqa: PLR0917 - a dimension each
    isa: str, shape: tuple[int, int, int], block_size: int, dtype: torch.dtype, option: str, seed: int
):
    """Requests, chunks, blocks and windows that end at any place of a tile."""
    dice = random.Random(seed)
    stops = [dice.randint(1, 300) for _ in range(dice.randint(1, 6))]
    parts = [(request, dice.choice((stop - 1, 0, dice.randrange(stop))), stop) for request, stop in enumerate(stops)]
    cached = Cached(Build(isa, 2).kernels(dtype), Heads(*shape), stops, block_size=block_size, dtype=dtype, seed=seed)
    options = options_for(shape[0], shape[2])[option]
    assert_near(cached.run(parts, options), cached.expected(parts, options))


@every_build
@pytest.mark.parametrize("option", OPTIONS)
def test_long_contexts_are_split_and_joined(build: Build, option: str):
    """States of 1,024 keys each that are joined wrongly, within a unit or over threads; empty ones."""
    options = options_for(6, 32)[option]
    cached = Cached(build.kernels(), Heads(6, 2, 32), [1023, 1024, 1025, 2048, 2100, 3500])
    decodes = [(request, length - 1, length) for request, length in enumerate(cached.lens)]
    chunks = [(2, 1000, 1025), (4, 2040, 2070), (5, 3490, 3500)]
    expected = cached.expected([*decodes, *chunks], options)
    assert_near(cached.run(decodes, options), expected[:6])
    assert_near(cached.run(chunks, options), expected[6:])
    assert_near(cached.run([*decodes, *chunks], options), expected)


# --- exactness ---


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", ["plain", "everything"])
def test_a_query_is_the_same_in_chunks_decodes_and_company(isa: str, option: str, dtype: torch.dtype):
    """Sums over keys that are cut where a chunk, a step, a thread or a neighbour has its ends."""
    options, length = options_for(3, 10)[option], 1100
    one, two = (
        Cached(Build(isa, threads).kernels(dtype), Heads(3, 1, 10), [length, 300, 40], block_size=size, dtype=dtype)
        for threads, size in ((1, 16), (2, 4))
    )
    at_once = one.run([(0, 0, length)], options)
    for cached, size in ((two, 512), (one, 64), (two, 7)):
        for start in range(0, length, size):
            stop = min(start + size, length)
            assert same_bits(cached.run([(0, start, stop)], options), at_once[start:stop]), (start, stop)
    for at in (*range(70), *range(500, 515), *range(1010, 1040), 1099):
        for cached in (one, two):
            assert same_bits(cached.run([(0, at, at + 1)], options), at_once[at : at + 1]), at
        company = [(1, 299, 300), (0, at, at + 1), (2, 0, 40), (1, 100, 130)]
        assert same_bits(two.run(company, options)[1:2], at_once[at : at + 1]), at


@every_isa
def test_a_long_decode_is_the_same_without_room_for_its_splits(isa: str, monkeypatch: pytest.MonkeyPatch):
    """A step of so many long decodes that their splits stay together: other sums than when there were few."""
    kernels = Build(isa, 2).kernels()
    cached = Cached(kernels, Heads(6, 2, 33), [2500, 1025, 700, 3100])
    decodes = [(request, length - 1, length) for request, length in enumerate(cached.lens)]
    for options in options_for(6, 33).values():
        apart = cached.run(decodes, options)
        with monkeypatch.context() as patch:
            patch.setattr(executor, "PARTIAL_FLOATS", 6 * (33 + 2) * 9)  # a split more than there is room for
            assert same_bits(cached.run(decodes, options), apart)
    items = [StepBatch(cached.layout(decodes), room).items.tolist() for room in (9, 10)]
    assert items == [[0, 1, 2, 3, 4], [0, 3, 5, 6, 10]]


@every_isa
def test_a_split_that_a_row_does_not_see_leaves_its_zeros(isa: str):
    """-0 + 0 = 0: a row before the border of a split, with others of its chunk behind it."""
    cached = Cached(Build(isa, 1).kernels(), Heads(2, 1, 16), [1030])
    q, k, v = cached.split(0)
    q[:], k[:64], k[64:], v[:64], v[64:] = 1.0, 0.0, 50.0, -1.0, -0.0  # -1 · e^-200 = -0
    cached.store([(0, 0, 1030)])
    options = AttentionOptions(0.25)
    out = cached.run([(0, 1010, 1030)], options)
    assert out[:14].signbit().all()
    for row in range(20):
        alone = cached.run([(0, 1010 + row, 1011 + row)], options)
        assert same_bits(out[row : row + 1], alone), 1010 + row


# --- what is not a number ---


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_reaches_only_who_sees_it(isa: str, dtype: torch.dtype, bad: float):
    """0 · NaN: keys and values of later tokens, of those before the window, and of other requests."""
    kernels = Build(isa, 2).kernels(dtype)
    for name, options in options_for(4, 12).items():
        for block_size in (4, 16):
            cached = Cached(kernels, Heads(4, 2, 12), [150, 40], block_size=block_size, dtype=dtype)
            step = [(0, 0, 150), (1, 0, 40)]
            clean = cached.run(step, options)
            cached.qkv[0][100, 4 * 12 :] = bad  # key and value; the query stays
            cached.store([(0, 100, 101)])
            out = cached.run(step, options)
            seen = torch.zeros(190, dtype=torch.bool)
            seen[100 : 150 if options.window is None else min(150, 100 + options.window)] = True
            assert torch.equal(out[~seen], clean[~seen]), name
            assert not out[seen].isfinite().all(dim=-1).any(), name


@every_isa
def test_a_window_leaves_a_bad_token_behind(isa: str):
    """A NaN that passed through a row's sums before its window began."""
    cached = Cached(Build(isa, 2).kernels(), Heads(2, 1, 16), [2200])
    options = AttentionOptions(0.25, window=30)
    parts = [(0, 0, 2200), (0, 2199, 2200), (0, 2000, 2100)]
    clean = cached.run(parts, options)
    for at in (5, 1000, 1023, 1024, 1900):
        cached.qkv[0][at, 2 * 16 :] = torch.nan
        cached.store([(0, at, at + 1)])
    out = cached.run(parts, options)
    bad = out.isnan().any(dim=-1)
    assert bad.nonzero()[:, 0].tolist() == [
        at for at in range(2200) if any(0 <= at - first < 30 for first in (5, 1000, 1023, 1024, 1900))
    ]
    assert torch.equal(out[~bad], clean[~bad])


# --- the cache ---


def by_token(k_pages: Tensor) -> Tensor:
    """[P, G, S, D] of keys as they lie (csrc/pages.inc), by token."""
    blocks, heads, size, dims = k_pages.shape
    cells = k_pages.reshape(blocks, heads, -1)
    if k_pages.dtype == torch.float32:
        return cells.view(blocks, heads, dims, size).transpose(2, 3)
    pairs = cells[..., : dims // 2 * 2 * size].view(blocks, heads, dims // 2, size, 2)
    odd = cells[..., dims // 2 * 2 * size :].view(blocks, heads, dims % 2, size).transpose(2, 3)
    return torch.cat((pairs.permute(0, 1, 3, 2, 4).flatten(3), odd), dim=-1)


@every_build
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(8, 0), (8, 8), (80, 32), (7, 6), (64, 64), (1, 0)])
def test_store_kv_norms_then_rotates_and_writes_to_the_slots(
    build: Build, head_dim: int, rotary_dim: int, normed: bool, dtype: torch.dtype
):
    """q and k are normed and turned, v is neither; each head and token lands in its own place, all others stay."""
    random_, (num_heads, kv_heads) = generator(4), (6, 2)
    norms = torch.randn(2, head_dim, generator=random_) if normed else (None, None)
    angles = torch.rand(10, rotary_dim // 2, generator=random_) * 6
    table = torch.stack((angles.cos(), angles.sin()), dim=1) if rotary_dim else None
    heads = Heads(num_heads, kv_heads, head_dim, rope=table, q_norm=norms[0], k_norm=norms[1], eps=1e-5)
    qkv = torch.randn(4, (num_heads + 2 * kv_heads) * head_dim, generator=random_).to(dtype)
    before = qkv.double().view(4, num_heads + 2 * kv_heads, head_dim)
    positions, slots = torch.tensor([9, 0, 3, 4]), torch.tensor([4 * 4 + 1, 2 * 4 + 3, 0, 4 * 4 + 2])
    k_pages, v_pages = (torch.full((5, kv_heads, 4, head_dim), 7.0).to(dtype) for _ in range(2))
    batch = BatchLayout((4,), (10,), positions, slots, torch.zeros(1, 1, dtype=torch.int32))
    q = build.kernels(dtype).store_kv(qkv, heads, k_pages, v_pages, batch)
    assert (q.dtype, q.shape) == (dtype, (4, num_heads * head_dim))

    def placed(x: Tensor, norm: Tensor | None) -> Tensor:
        if norm is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
        if table is None:
            return x
        cos, sin = table[positions].double()[:, None].unbind(2)
        first, second, rest = x.split((rotary_dim // 2, rotary_dim // 2, head_dim - rotary_dim), dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)

    near = {"atol": 2e-6, "rtol": BFLOAT16_EPS if dtype == torch.bfloat16 else 2e-6}
    torch.testing.assert_close(q.view(4, num_heads, -1).double(), placed(before[:, :num_heads], norms[0]), **near)
    blocks, offsets = slots // 4, slots % 4
    keys = by_token(k_pages)[blocks, :, offsets].double()
    torch.testing.assert_close(keys, placed(before[:, num_heads:-kv_heads], norms[1]), **near)
    assert torch.equal(v_pages[blocks, :, offsets].double(), before[:, -kv_heads:])
    for pages in (by_token(k_pages).clone(), v_pages):
        pages[blocks, :, offsets] = 7.0
        assert (pages == 7.0).all()


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_reads_what_store_kv_wrote(isa: str, dtype: torch.dtype):
    """Keys that are written in one order and read in another: each query finds its own token."""
    kernels, heads = Build(isa, 2).kernels(dtype), Heads(1, 1, 64)
    for block_size in (1, 8, 16, 64):
        cached = Cached(kernels, heads, [64], block_size=block_size, dtype=dtype)
        cached.qkv[0] = torch.eye(64).repeat(1, 3).to(dtype)
        cached.store([(0, 0, 64)])
        out = cached.run([(0, 0, 64)], AttentionOptions(scale=1000.0))
        assert torch.equal(out, torch.eye(64).to(dtype))
