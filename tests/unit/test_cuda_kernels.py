"""The Triton kernels: each against the reference or float64 over odd shapes, and bit for bit against itself in other
company. On the device where there is one (`make test-gpu`), else through Triton's interpreter."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

from holdfast.kernels.cuda.close import CloseCudaKernels
from holdfast.kernels.cuda.formats import Codes
from holdfast.kernels.cuda.graphs import DecodeInputs, GraphProgram, _Graph, step_tensors
from holdfast.kernels.cuda.kernels import CudaKernels
from holdfast.kernels.cuda.linear import DeviceMatrix
from holdfast.kernels.interface import AttentionOptions, BatchLayout, Heads, Routing
from holdfast.kernels.reference import ReferenceKernels
from support.attention import Cached
from support.cpu import generator, matrix, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
KERNELS = {dtype: CudaKernels(dtype) for dtype in (torch.float32, torch.bfloat16)}
DTYPES = list(KERNELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def here(x: Tensor) -> Tensor:
    return x.to(DEVICE)


def close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(
        out.double().cpu() / scale, expected.double().cpu() / scale, atol=TOLERANCE[dtype], rtol=0
    )


# --- linear ---

FORMATS = ["dense", "Q8_0", "Q4_0", "Q4_1", "FP8"]


def random_matrix(kind: str, rows: int, columns: int, dtype: torch.dtype, seed: int = 0):
    return matrix(str(dtype).removeprefix("torch.") if kind == "dense" else kind, rows, columns, generator(seed))


@every_dtype
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("count", "rows", "columns"), [(1, 33, 64), (5, 70, 96), (17, 16, 32), (70, 65, 160)])
def test_linear_is_the_product(count: int, rows: int, columns: int, kind: str, dtype: torch.dtype):
    """Rows, columns and K that fill no tile, in every format."""
    weight, exact = random_matrix(kind, rows, columns, dtype)
    x = torch.randn(count, columns, generator=generator(1)).to(dtype)
    kernels = KERNELS[dtype]
    out = kernels.linear(here(x), kernels.pack([on_device(weight)]), dtype=torch.float32)
    close(out, x.double() @ exact.T, dtype)


def on_device(part):
    if isinstance(part, Tensor):
        return here(part)
    return type(part)(part.format, here(part.blocks), None if part.scales is None else here(part.scales))


@pytest.mark.parametrize(("count", "columns"), [(3, 1), (2, 31), (9, 45)])
def test_linear_of_an_odd_number_of_columns(count: int, columns: int):
    weight, exact = random_matrix("dense", 7, columns, torch.bfloat16)
    x = torch.randn(count, columns, generator=generator(1)).bfloat16()
    kernels = KERNELS[torch.bfloat16]
    close(kernels.linear(here(x), kernels.pack([here(weight)])), x.double() @ exact.T, torch.bfloat16)


@every_dtype
@pytest.mark.parametrize("activation", [None, "silu", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_bias_activation_and_gate(gated: bool, activation, dtype: torch.dtype):
    parts = [random_matrix("dense", 40, 48, dtype, seed)[0] for seed in (0, 1)]
    biases = [torch.randn(40, generator=generator(seed)).to(dtype) for seed in (2, 3)]
    x, stream = torch.randn(6, 48, generator=generator(4)).to(dtype), torch.randn(6, 40 * (2 - gated))
    reference = ReferenceKernels(torch.float32)
    expected = reference.linear(
        x.float(),
        reference.pack(
            [part.float() for part in parts], [bias.float() for bias in biases], activation=activation, gated=gated
        ),
        add_to=stream.clone(),
    )
    kernels, mine = KERNELS[dtype], here(stream.clone())
    packed = kernels.pack(
        [here(part) for part in parts], [here(bias) for bias in biases], activation=activation, gated=gated
    )
    out = kernels.linear(here(x), packed, add_to=mine)
    assert out is mine
    close(out, expected, dtype)


@pytest.mark.parametrize(
    "ends", [(10, 40), (32, 64, 96), (5, 6, 7, 8, 100), tuple(range(8, 72, 8)), tuple(range(4, 80, 4))]
)
@pytest.mark.parametrize("count", [1, 70])
def test_shards_meet_in_a_binary_tree(ends: tuple[int, ...], count: int):
    """Whether by registers or by memory: each shard's own product, added as the tree says, bit for bit."""
    kernels, width = KERNELS[torch.bfloat16], ends[-1]
    weight = here(torch.randn(20, width, generator=generator(0)).bfloat16())
    x = here(torch.randn(count, width, generator=generator(1)).bfloat16())
    out = kernels.linear(x, kernels.pack([weight], shards=ends), dtype=torch.float32)
    stack: list[Tensor] = []
    for shard, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        part = kernels.pack([weight[:, start:end].contiguous()])
        stack.append(kernels.linear(x[:, start:end].contiguous(), part, dtype=torch.float32))
        last, bits = shard == len(ends) - 1, shard
        while len(stack) > 1 and (last or bits & 1):
            right = stack.pop()
            stack[-1] = stack[-1] + right
            bits >>= 1
    assert same_bits(out, stack[0])


@every_dtype
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shards", [(), (32, 64, 96)])
def test_a_row_is_the_same_in_any_company(shards: tuple[int, ...], kind: str, dtype: torch.dtype):
    kernels = KERNELS[dtype]
    weight = kernels.pack([on_device(random_matrix(kind, 50, 96, dtype)[0])], shards=shards)
    x = here(torch.randn(150, 96, generator=generator(1)).to(dtype))
    together = kernels.linear(x, weight)
    for some in (slice(0, 1), slice(7, 9), slice(30, 63), slice(1, 70), slice(20, 149)):
        assert same_bits(kernels.linear(x[some], weight), together[some])


# --- rows ---


@every_dtype
@pytest.mark.parametrize("width", [1, 48, 100, 576])
def test_norms(width: int, dtype: torch.dtype):
    x, stream = torch.randn(5, width, generator=generator(0)), torch.randn(5, width, generator=generator(1))
    weight, bias = torch.randn(2, width, generator=generator(2))
    kernels, reference = KERNELS[dtype], ReferenceKernels(torch.float32)
    close(kernels.rms_norm(here(x), here(weight), 1e-5, dtype), reference.rms_norm(x, weight, 1e-5, dtype), dtype)
    for shift in (None, bias):
        mine = None if shift is None else here(shift)
        out = kernels.layer_norm(here(x), here(weight), mine, 1e-5, torch.float32, add_to=here(stream.clone()))
        expected = reference.layer_norm(x, weight, shift, 1e-5, torch.float32, add_to=stream.clone())
        close(out, expected, torch.float32)


@pytest.mark.parametrize("kind", FORMATS)
def test_embedding(kind: str):
    table, exact = random_matrix(kind, 20, 96, torch.bfloat16)
    ids, stream = torch.tensor([3, 0, 17]), torch.randn(3, 96, generator=generator(3))
    kernels = KERNELS[torch.bfloat16]
    packed = kernels.pack([on_device(table)])
    close(kernels.embedding(here(ids), packed, scale=1.5), exact[ids] * 1.5, torch.float32)
    out = kernels.embedding(here(ids), packed, offset=2, add_to=here(stream.clone()))
    close(out, exact[ids + 2] + stream, torch.float32)


def test_convert_and_softcap():
    x = torch.tensor([[-1e30, -3.0, -0.5, 0.0, 1e-6, 2.0, 400.0]])
    kernels = KERNELS[torch.bfloat16]
    halves = kernels.convert(here(x), torch.bfloat16).cpu()
    # the interpreter cuts off what does not fit instead of rounding
    torch.testing.assert_close(halves, x.bfloat16(), rtol=0 if DEVICE == "cuda" else 2**-7, atol=0)
    mine = here(x.clone())
    assert kernels.softcap(mine, 30.0) is mine
    torch.testing.assert_close(mine.cpu(), torch.tanh(x / 30.0) * 30.0, atol=1e-5, rtol=1e-4)


# --- attention ---

OPTIONS = {
    "plain": AttentionOptions(scale=0.2),
    "window": AttentionOptions(scale=0.2, window=21),
    "soft-cap": AttentionOptions(scale=0.4, softcap=2.0),
    "alibi": AttentionOptions(scale=0.2, alibi_slopes=torch.linspace(0.01, 0.2, 6)),
    "everything": AttentionOptions(scale=0.4, softcap=3.0, window=70, alibi_slopes=torch.linspace(0.01, 0.2, 6)),
}
PARTS = [(0, 150, 151), (1, 0, 5), (2, 30, 77), (3, 0, 1), (4, 63, 64), (5, 10, 12)]
LENS = [151, 5, 80, 1, 64, 12]


def filled(dtype: torch.dtype, heads: Heads, lens: list[int], block_size: int) -> Cached:
    """The reference writes the pages: a program per head of a token takes the interpreter long."""
    writer = ReferenceKernels(dtype)
    return Cached(KERNELS[dtype], heads, lens, block_size=block_size, dtype=dtype, device=DEVICE, filled_by=writer)


def options_here(options: AttentionOptions) -> AttentionOptions:
    slopes = options.alibi_slopes
    return AttentionOptions(options.scale, options.softcap, options.window, None if slopes is None else here(slopes))


@every_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("kv_heads", "head_dim", "block_size"), [(1, 64, 16), (2, 40, 4), (6, 16, 32)])
def test_attention_is_its_definition(
    options: AttentionOptions, kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype
):
    """Decodes, prefills from the start and from the middle, over scattered blocks; what is nobody's is NaN."""
    heads = Heads(6, kv_heads, head_dim)
    cached = filled(dtype, heads, LENS, block_size)
    out = cached.run(PARTS, options_here(options))
    close(out, cached.expected(PARTS, options), dtype)


@pytest.mark.parametrize(("num_heads", "kv_heads", "head_dim"), [(8, 2, 128), (3, 3, 96), (4, 1, 256)])
def test_attention_of_wide_heads(num_heads: int, kv_heads: int, head_dim: int):
    """A prefill tile has fewer rows where registers would not do."""
    cached, parts = (
        filled(torch.bfloat16, Heads(num_heads, kv_heads, head_dim), [70, 20], 16),
        [(0, 69, 70), (1, 3, 20)],
    )
    options = AttentionOptions(head_dim**-0.5)
    out = cached.run(parts, options)
    close(out, cached.expected(parts, options), torch.bfloat16)
    assert same_bits(cached.run([(0, 60, 70)], options)[-1:], out[:1])


@every_dtype
@pytest.mark.parametrize(
    "options", [OPTIONS["plain"], AttentionOptions(scale=0.2, window=1030)], ids=["plain", "window"]
)
def test_a_query_is_the_same_in_any_company(options: AttentionOptions, dtype: torch.dtype):
    """Alone as a decode with splits of their own, in a chunk, and in another chunk, around the ends of splits."""
    cached = filled(dtype, Heads(4, 2, 16), [2060, 1030, 70], 16)
    chunk = cached.run([(0, 2040, 2060)], options)
    alone = [(0, 2041, 2042), (0, 2048, 2049), (0, 2059, 2060)]
    for request, start, stop in alone:
        expected = chunk[start - 2040 : stop - 2040]
        assert same_bits(cached.run([(request, start, stop)], options), expected)
    mixed = cached.run([(1, 1015, 1030), *alone, (2, 69, 70)], options)
    for row, (_, start, _) in enumerate(alone):
        assert same_bits(mixed[15 + row], chunk[start - 2040])
    assert same_bits(mixed[:15], cached.run([(1, 1000, 1030)], options)[15:])
    close(chunk, cached.expected([(0, 2040, 2060)], options), dtype)


@pytest.mark.skipif(DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 10e9, reason="takes 9 GB of the device")
def test_offsets_beyond_2_to_the_31_numbers():
    """In a large card's cache, and in a large vocabulary's table. On CPU the zeros take no memory until touched."""
    kernels, heads, size, count = KERNELS[torch.bfloat16], Heads(2, 1, 64), 16, 20
    blocks = (1 << 31) // (size * 64) + 10
    k_pages, v_pages = (torch.zeros(blocks, 1, size, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    qkv = here(torch.randn(count, 4 * 64, generator=generator(0)).bfloat16())
    positions, outs = torch.arange(count, device=DEVICE), []
    for first in (1, blocks - 5):
        tables = torch.tensor([[first + 2, first]], dtype=torch.int32, device=DEVICE)
        slots = tables[0].long()[positions // size] * size + positions % size
        for start, stop in ((0, count - 1), (count - 1, count)):
            rows = slice(start, stop)
            batch = BatchLayout((stop - start,), (stop,), positions[rows], slots[rows], tables)
            q = kernels.store_kv(qkv[rows].clone(), heads, k_pages, v_pages, batch)
            outs.append(kernels.attention(q, heads, k_pages, v_pages, batch, AttentionOptions(0.1)))
        assert k_pages[first, 0, : count - size].any()
    assert outs[0].any()
    assert same_bits(outs[0], outs[2])
    assert same_bits(outs[1], outs[3])
    table = v_pages.view(-1, 64)
    matrix = DeviceMatrix(Codes(0, table), len(table), 64, None, 0, False, torch.tensor([64]), 16)
    ids = slots[[0, 5, 19]]
    assert torch.equal(kernels.embedding(ids, matrix), table[ids].float())


def test_rows_that_fill_up_a_batch_touch_nothing():
    """As a graph of decodes for five requests is run for three: with no slot and no context, in splits of others."""
    heads, options = Heads(4, 2, 16), OPTIONS["plain"]
    kernels, cached = KERNELS[torch.bfloat16], filled(torch.bfloat16, heads, [2060, 30, 1024], 16)
    parts = [(0, 2059, 2060), (1, 29, 30), (2, 1023, 1024)]
    layout, qkv = cached.layout(parts), here(torch.cat([cached.qkv[r][start:stop] for r, start, stop in parts]))
    rows = torch.cat([qkv, torch.full_like(qkv[:2], torch.nan)])
    pages, expected = (cached.k_pages, cached.v_pages), cached.run(parts, options)
    before = [page.clone() for page in pages]
    inputs = DecodeInputs(5, 200, num_splits=4, device=torch.device(DEVICE))
    inputs.fill(torch.arange(1, 4, device=DEVICE), layout, layout.derive("cuda", step_tensors).lens)
    assert inputs.token_ids.tolist() == [1, 2, 3, 0, 0]
    kernels.store_kv(rows.clone(), heads, *pages, inputs.layout)
    for page, old in zip(pages, before, strict=True):
        assert same_bits(page, old)
    out = kernels.attention(rows[:, : 4 * 16].contiguous(), heads, *pages, inputs.layout, options)
    assert same_bits(out[:3], expected)
    assert not out[3:].any()


def test_graphs_that_are_dropped_hold_nothing_and_are_run_no_more():
    """NCCL's abort waits for as long as one holds its kernels. In the place of torch's graph, one that counts."""
    device, told = torch.device(DEVICE), []
    program = GraphProgram(lambda token_ids, batch: token_ids + 1, device)
    graph = SimpleNamespace(replay=lambda: told.append("run"), reset=lambda: told.append("gone"))
    inputs = DecodeInputs(1, 1, num_splits=1, device=device)
    program._graphs[1, 1] = _Graph(inputs, graph, torch.zeros(1, dtype=torch.int64, device=device))
    step = torch.tensor([7], device=device), DecodeInputs(1, 1, num_splits=1, device=device).layout
    assert program(*step).tolist() == [0]
    program.drop()
    assert program(*step).tolist() == [8]
    assert told == ["run", "gone"]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_router_gone_wrong_still_names_experts():
    """A NaN that makes an id of whatever was in memory: the address of no expert."""
    kernels = KERNELS[torch.float32]
    up, down = kernels.pack([here(torch.ones(16, 32))]), kernels.pack([here(torch.ones(32, 16))])
    logits = torch.tensor([[1.0, 2.0, 3.0], [torch.nan, 1.0, 2.0], [torch.inf, torch.inf, 0.0]])
    out = kernels.experts(here(torch.ones(3, 32)), here(logits), Routing(2, True), [up] * 3, [down] * 3)
    assert torch.equal(out.isnan().any(dim=1).cpu(), torch.tensor([False, True, True]))


@every_dtype
@pytest.mark.parametrize("kind", FORMATS)
def test_close_kernels_are_close(kind: str, dtype: torch.dtype):
    """cuBLAS's products with all that follows them."""
    kernels, exact = CloseCudaKernels(dtype), KERNELS[dtype]
    parts = [on_device(random_matrix(kind, 64, 96, dtype, seed)[0]) for seed in (0, 1)]
    biases = [here(torch.randn(64, generator=generator(seed)).to(dtype)) for seed in (2, 3)]
    x, stream = here(torch.randn(5, 96, generator=generator(4)).to(dtype)), here(torch.randn(5, 64))
    for number, activation in ((2, "silu"), (1, "gelu"), (1, None)):
        how = {"activation": activation, "gated": number == 2}
        mine, theirs = (k.pack(parts[:number], biases[:number], **how) for k in (kernels, exact))
        close(kernels.linear(x, mine), exact.linear(x, theirs).cpu(), torch.bfloat16)
        out = kernels.linear(x, mine, add_to=stream.clone())
        close(out, exact.linear(x, theirs, add_to=stream.clone()).cpu(), torch.bfloat16)


@every_dtype
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("rotary_dim", [0, 24, 40])
def test_store_kv(rotary_dim: int, normed: bool, dtype: torch.dtype):
    random_ = generator(0)
    norms = torch.randn(2, 40, generator=random_) if normed else (None, None)
    table = torch.randn(50, 2, rotary_dim // 2, generator=random_) if rotary_dim else None
    results = []
    for kernels, move in ((ReferenceKernels(dtype), Tensor.cpu), (KERNELS[dtype], here)):
        parts = [None if x is None else move(x) for x in (table, *norms)]
        heads = Heads(6, 2, 40, rope=parts[0], q_norm=parts[1], k_norm=parts[2], eps=1e-5)
        device = str(move(torch.zeros(1)).device)
        cached = Cached(kernels, heads, [37, 9], dtype=dtype, device=device, filled_by=ReferenceKernels(dtype))
        q = cached.store([(0, 3, 20), (1, 8, 9)])
        results.append([q, cached.k_pages.nan_to_num(), cached.v_pages.nan_to_num()])
    for expected, out in zip(*results, strict=True):
        close(out, expected, dtype)


# --- experts ---


@every_dtype
@pytest.mark.parametrize(("count", "experts", "chosen"), [(1, 4, 2), (13, 3, 3), (40, 8, 2)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_experts(renormalize: bool, count: int, experts: int, chosen: int, dtype: torch.dtype):
    """Against the reference, and each row alone against itself among others."""
    random_ = generator(0)
    ups = [[torch.randn(48, 32, generator=random_).to(dtype) for _ in range(2)] for _ in range(experts)]
    downs = [torch.randn(32, 48, generator=random_).to(dtype) for _ in range(experts)]
    x = torch.randn(count, 32, generator=random_).to(dtype)
    logits = torch.randn(count, experts, generator=random_)
    logits[0] = 0.5
    routing = Routing(chosen, renormalize)

    def run(kernels, some: slice, move) -> Tensor:
        up = [kernels.pack([move(part) for part in parts], activation="silu", gated=True) for parts in ups]
        down = [kernels.pack([move(part)], shards=(16, 32, 48)) for part in downs]
        return kernels.experts(move(x[some]), move(logits[some]), routing, up, down)

    together = run(KERNELS[dtype], slice(None), here)
    close(together, run(ReferenceKernels(dtype), slice(None), Tensor.cpu), dtype)
    for row in range(0, count, 7):
        assert same_bits(run(KERNELS[dtype], slice(row, row + 1), here), together[row : row + 1])


# --- sampling ---


def test_argmax():
    logits = torch.randn(6, 3000, generator=generator(0))
    logits[0, -1], logits[1, 0], logits[2], logits[3, 5], logits[4, 7] = 9.0, 9.0, -torch.inf, torch.nan, torch.inf
    logits[5, 1024] = logits[5, 5] = 20.0
    logits[2, 0] = -torch.inf
    assert KERNELS[torch.bfloat16].argmax(here(logits)).tolist() == [2999, 0, 0, 5, 7, 5]


@pytest.mark.parametrize("width", [1, 31, 5000])
def test_noise_is_that_of_the_reference(width: int):
    seeds = torch.tensor([0, 1, 2**63 - 1, -1, -(2**62), 0x123456789ABCDEF])
    positions = torch.tensor([0, 7, 131071, 5, 2, 2**31 - 1])
    expected = ReferenceKernels().add_gumbel_noise(torch.zeros(6, width), seeds, positions)
    out = KERNELS[torch.bfloat16].add_gumbel_noise(here(torch.zeros(6, width)), here(seeds), here(positions))
    torch.testing.assert_close(out.cpu(), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("width", [1, 5, 300, 5000])
def test_filters_keep_what_the_reference_keeps(width: int):
    random_ = generator(width)
    rows = [(k, p, m) for k in (0, 1, 3, 70, 10**6) for p in (1.0, 0.9, 0.3, 0.0) for m in (0.0, 0.05)]
    logits = torch.randn(len(rows), width, generator=random_) * 3
    logits[::3] = logits[::3].round()  # ties
    limits = [
        torch.tensor(column, dtype=kind)
        for column, kind in zip(zip(*rows, strict=True), (torch.int64, torch.float32, torch.float32), strict=True)
    ]
    expected = ReferenceKernels().filter_logits(logits.clone(), *limits)
    out = KERNELS[torch.bfloat16].filter_logits(here(logits.clone()), *map(here, limits)).cpu()
    different = (out != expected).any(dim=1).nonzero().flatten().tolist()
    assert [rows[i] for i in different] == []
