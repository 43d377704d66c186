"""`CpuKernels.linear` in every build: against float64, and bit for bit against itself in other company."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.interface import Matrix, Quantized
from support.cpu import (
    FLOAT_EPS,
    FORMATS,
    HELD,
    ISAS,
    STEPS,
    Build,
    every_build,
    every_isa,
    generator,
    in_steps,
    matrix,
)

FLOAT64: dict[Activation | None, object] = {
    None: lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """In float64, of x as it is multiplied: x · weightᵀ + bias, and what rounding may make of it: K roundings of sums
    that grow like a random walk's, each with a sign of its own; ten times that."""
    exact, size = x.double() @ weight.T, (x.double().square() @ weight.square().amax(dim=0)).sqrt()[:, None]
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    return exact, (2 + 2 * weight.shape[1] ** 0.5) * FLOAT_EPS * size


def definition(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], activation: Activation | None
) -> tuple[Tensor, Tensor]:
    """What `linear` is to return, in float64, for one weight or (gate, up), and how far off it may be."""
    products = [product(x, *both) for both in zip(weights, biases or [None] * len(weights), strict=True)]
    gate, error = products[0]
    out = FLOAT64[activation](gate)
    error = 1.2 * error + (4e-7 * (1 + gate.abs()) if activation else 0)  # no activation is steeper than 1.13
    if len(weights) > 1:
        up, up_error = products[1]
        error = error * (up.abs() + up_error) + out.abs() * up_error
        out = out * up
    return out, error + FLOAT_EPS * out.abs()


def assert_near(out: Tensor, expected: Tensor, error: Tensor) -> None:
    excess = ((out.double() - expected).abs() - error).max().item()
    assert excess <= 0, f"{excess:.3e} beyond what rounding explains"


some_rows = st.sampled_from([1, 2, 13, 14, 15, 29, 112, 113]) | st.integers(1, 130)
some_columns = st.sampled_from([1, 31, 32, 33, 64]) | st.integers(1, 100)
some_numbers = st.sampled_from([1, 2, 3, 64]) | st.integers(1, 200)


@every_build
@given(
    shape=st.tuples(some_rows, some_columns, some_numbers),
    kinds=st.tuples(st.sampled_from(["float32", "bfloat16"]), st.sampled_from(FORMATS)),
    gated=st.booleans(),
    biased=st.booleans(),
    activation=st.sampled_from([*FLOAT64]),
    bits=st.sampled_from([8, 16]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_linear_equals_its_definition(  # noqa: PLR0917 - a dimension each
    build: Build,
    shape: tuple[int, int, int],
    kinds: tuple[str, str],
    gated: bool,
    biased: bool,
    activation: Activation | None,
    bits: int,
    seed: int,
):
    """Tiles, panels, pairs and groups that are cut wrongly at any end of any shape, whatever x and weights are."""
    random_, (rows, columns, k), (x_kind, kind) = generator(seed), shape, kinds
    if kind.startswith("Q"):
        k = -(-k // 32) * 32
    x, _ = matrix(x_kind, rows, k, random_)
    parts, exact = zip(*(matrix(kind, columns, k, random_) for _ in range(1 + gated)), strict=True)
    biases = [torch.randn(columns, generator=random_) for _ in parts] if biased else []
    kernels = build.kernels(bits=bits)
    packed = kernels.pack(parts, biases, activation=activation, gated=gated)
    out = kernels.linear(x, packed, dtype=torch.float32)
    given_ = in_steps(x, bits) if isinstance(parts[0], Quantized) else x
    assert_near(out, *definition(given_, list(exact), biases, activation))


@every_isa
@pytest.mark.parametrize(
    "shape", [(1, 576, 64), (9, 1000, 33), (40, 96, 8192), (3, 49152, 64), (2, 151_936, 8)], ids=str
)
def test_bfloat16_is_as_near_to_the_truth_as_torch(isa: str, shape: tuple[int, int, int]):
    """A large K or a whole vocabulary in which sums lose more than they have to."""
    (rows, columns, k), random_ = shape, generator(0)
    x, weight = (torch.randn(n, k, generator=random_).bfloat16() for n in (rows, columns))
    exact = x.double() @ weight.double().T
    theirs = (F.linear(x, weight).double() - exact).abs().max()
    kernels = Build(isa, 2).kernels()
    packed = kernels.pack([weight])
    assert (kernels.linear(x, packed, dtype=torch.float32).double() - exact).abs().max() <= theirs
    # here both round the same sums; half of a step, and sums may differ by which side of it they are on
    assert (kernels.linear(x, packed).double() - exact).abs().max() <= theirs * 1.001
    assert_near(kernels.linear(x, packed, dtype=torch.float32), *product(x, weight.double(), None))


@every_isa
@pytest.mark.parametrize("bits", [8, 16])
def test_rounding_rows_costs_half_a_step(isa: str, bits: int):
    """Quantized products whose rows are rounded by more than their group's scale explains; groups of zeros, too."""
    random_ = generator(1)
    x = torch.randn(20, 320, generator=random_) * torch.logspace(-3, 3, 20)[:, None]
    x[3], x[4, 32:64] = 0.0, 0.0
    largest = x.view(20, -1, 32).abs().amax(dim=-1, keepdim=True).expand(-1, -1, 32).reshape(20, 320).double()
    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        part, exact = matrix(kind, 40, 320, random_)
        kernels = Build(isa, 1).kernels(bits=bits)
        out = kernels.linear(x, kernels.pack([part]))
        expected, error = product(x, exact, None)
        assert_near(out, expected, error + largest / STEPS[bits] / 2 @ exact.abs().T)
        assert not out[3].any()


# --- exactness ---


@every_isa
@pytest.mark.parametrize(("kind", "bits"), HELD)
def test_a_row_is_the_same_alone_and_in_any_company(isa: str, kind: str, bits: int):
    """An order of summation that depends on how many rows share the call, on a row's place, or on who computes it."""
    random_ = generator(2)
    x = torch.randn(230, 96, generator=random_).bfloat16()
    part, _ = matrix(kind, 70, 96, random_)
    teams = [Build(isa, threads).kernels(bits=bits) for threads in (1, 2, 3)]
    weights = [kernels.pack([part], activation="silu") for kernels in teams]
    alone = torch.cat([teams[0].linear(x[i : i + 1], weights[0], dtype=torch.float32) for i in range(len(x))])
    for count in range(2, 201):
        team, start = count % 3, count * 7 % 30
        together = teams[team].linear(x[start : start + count], weights[team], dtype=torch.float32)
        assert torch.equal(together, alone[start : start + count]), f"{count} rows, {team + 1} threads"


@every_isa
@pytest.mark.parametrize(("kind", "bits"), HELD)
def test_a_row_is_the_same_over_a_long_k(isa: str, kind: str, bits: int):
    """Sums that are put down and taken up again between pieces of K."""
    random_, k = generator(3), 8192 + 4096 + 32
    x = torch.randn(31, k, generator=random_).bfloat16()
    part, exact = matrix(kind, 33, k, random_)
    kernels = Build(isa, 2).kernels(bits=bits)
    packed = kernels.pack([part])
    together = kernels.linear(x, packed, dtype=torch.float32)
    for i in (0, 14, 15, 30):
        assert torch.equal(kernels.linear(x[i : i + 1], packed, dtype=torch.float32), together[i : i + 1])
    assert_near(together, *product(in_steps(x, bits) if kind.startswith("Q") else x, exact, None))


def in_a_tree(sums: list[Tensor]) -> Tensor:
    """The left half takes the largest power of two that leaves something for the right."""
    if len(sums) == 1:
        return sums[0]
    left = 1 << (len(sums) - 1).bit_length() - 1
    return in_a_tree(sums[:left]) + in_a_tree(sums[left:])


def cut(part: Matrix, start: int, end: int) -> Matrix:
    """Columns [start, end)."""
    if not isinstance(part, Quantized):
        return part[:, start:end]
    group_bytes = part.blocks.shape[1] * 32 // part.shape[1]
    return Quantized(part.format, part.blocks[:, start // 32 * group_bytes : end // 32 * group_bytes].contiguous())


SHARDS = {
    "one": (320,),
    "two, odd": (1, 320),
    "five, odd": (3, 64, 65, 200, 320),
    "eight": tuple(range(40, 321, 40)),
    "groups": (32, 64, 160, 192, 224, 288, 320),
}


@every_isa
@pytest.mark.parametrize("shards", SHARDS.values(), ids=SHARDS.keys())
def test_shards_meet_in_one_tree(isa: str, shards: tuple[int, ...]):
    """Row-parallel products whose bits would depend on which rank holds which shards."""
    random_ = generator(4)
    kernels = Build(isa, 2).kernels()
    for kind in FORMATS if not any(end % 32 for end in shards) else ("float32", "bfloat16"):
        for rows in (1, 15, 130):
            x = torch.randn(rows, 320, generator=random_).bfloat16()
            part, exact = matrix(kind, 45, 320, random_)
            out = kernels.linear(x, kernels.pack([part], shards=shards), dtype=torch.float32)
            sums = [
                kernels.linear(x[:, start:end], kernels.pack([cut(part, start, end)]), dtype=torch.float32)
                for start, end in zip((0, *shards), shards, strict=False)
            ]
            assert torch.equal(out, in_a_tree(sums)), (kind, rows)
            assert_near(out, *product(in_steps(x) if kind.startswith("Q") else x, exact, None))


@pytest.mark.parametrize("count", [3, 6, 7, 31, 255, 256])
def test_any_number_of_shards_meets_in_that_tree(count: int):
    """Room for fewer levels of sums than the tree has, with a gate beside it."""
    kernels, random_ = Build(ISAS[0], 2).kernels(), generator(5)
    x = torch.randn(20, count, generator=random_)
    gate, up = torch.randn(2, 3, count, generator=random_)
    columns = range(count)
    packed = kernels.pack([gate, up], gated=True, shards=[i + 1 for i in columns])
    both = [in_a_tree([x[:, i : i + 1] * part[:, i] for i in columns]) for part in (gate, up)]
    assert torch.equal(kernels.linear(x, packed), both[0] * both[1])


def test_quantized_shards_that_cut_a_group_are_held_dense():
    """Groups in which two shards meet would be summed by one of them."""
    kernels, random_ = Build(ISAS[0], 1).kernels(), generator(6)
    part, exact = matrix("Q4_0", 40, 96, random_)
    x = torch.randn(5, 96, generator=random_).bfloat16()
    out = kernels.linear(x, kernels.pack([part], shards=(48, 96)))
    assert torch.equal(out, kernels.linear(x, kernels.pack([exact.bfloat16()], shards=(48, 96))))


# --- what goes in, what comes out ---


@every_build
@pytest.mark.parametrize("kind", FORMATS)
def test_results_are_rounded_once_and_added_unrounded(build: Build, kind: str):
    """A residual stream that takes rounded sums, or a bfloat16 result that is not the float32 one rounded."""
    kernels, random_ = build.kernels(), generator(7)
    part, _ = matrix(kind, 50, 64, random_)
    packed = kernels.pack([part], [torch.randn(50, generator=random_)], activation="silu")
    for x_dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(17, 64, generator=random_).to(x_dtype)
        out = kernels.linear(x, packed, dtype=torch.float32)
        assert kernels.linear(x, packed).dtype == x_dtype
        assert torch.equal(kernels.linear(x, packed, dtype=torch.bfloat16), out.bfloat16())
        stream = torch.randn(17, 50, generator=random_)
        expected = stream + out
        assert kernels.linear(x, packed, add_to=stream) is stream
        assert torch.equal(stream, expected)


@every_isa
def test_rows_may_lie_apart(isa: str):
    """Views into wider rows, read and added to: q of q-k-v, and what lies between must stay."""
    kernels, random_ = Build(isa, 2).kernels(), generator(8)
    wide, stream = torch.randn(16, 100, generator=random_), torch.randn(16, 90, generator=random_)
    x, target, before = wide[:, 5:38], stream[:, 7:57], stream.clone()
    packed = kernels.pack([torch.randn(50, 33, generator=random_)])
    expected = kernels.linear(x.contiguous(), packed)
    assert torch.equal(kernels.linear(x, packed), expected)
    kernels.linear(x, packed, add_to=target)
    assert torch.equal(target, before[:, 7:57] + expected)
    assert torch.equal(stream[:, :7], before[:, :7])
    assert torch.equal(stream[:, 57:], before[:, 57:])


@every_isa
@pytest.mark.parametrize("kind", FORMATS)
def test_parts_are_stacked_with_their_biases(isa: str, kind: str):
    """q, k and v, or their biases, in each other's places; and matrices that come transposed."""
    kernels, random_ = Build(isa, 1).kernels(), generator(9)
    x = torch.randn(4, 64, generator=random_).bfloat16()
    parts = [matrix(kind, rows, 64, random_)[0] for rows in (33, 1, 40)]
    biases = [torch.randn(rows, generator=random_) for rows in (33, 1, 40)]
    out = kernels.linear(x, kernels.pack(parts, biases))
    one_by_one = [kernels.linear(x, kernels.pack([p], [b])) for p, b in zip(parts, biases, strict=True)]
    assert torch.equal(out, torch.cat(one_by_one, dim=1))
    if not isinstance(parts[0], Quantized):
        transposed = parts[0].T.contiguous().T
        assert torch.equal(kernels.linear(x, kernels.pack([transposed])), kernels.linear(x, kernels.pack(parts[:1])))


@every_isa
@pytest.mark.parametrize("kind", FORMATS)
def test_pack_copies_what_it_needs(isa: str, kind: str):
    """The loader lets go of what it packed: a view of a file."""
    kernels, random_ = Build(isa, 1).kernels(), generator(10)
    x = torch.randn(2, 64, generator=random_).bfloat16()
    (part, _), bias = matrix(kind, 9, 64, random_), torch.randn(9, generator=random_)
    shards = torch.tensor([32, 64])
    packed = kernels.pack([part], [bias], shards=shards.tolist())
    before = kernels.linear(x, packed)
    (part.blocks if isinstance(part, Quantized) else part).zero_()
    bias.zero_()
    assert torch.equal(kernels.linear(x, packed), before)


@every_isa
def test_float32_models_hold_quantized_matrices_dequantized(isa: str):
    """Rows of a float32 model that are rounded to 8 bits."""
    kernels, random_ = Build(isa, 1).kernels(torch.float32), generator(11)
    x = torch.randn(3, 64, generator=random_)
    for kind in ("Q8_0", "Q4_0", "Q4_1"):
        part, exact = matrix(kind, 40, 64, random_)
        assert torch.equal(kernels.linear(x, kernels.pack([part])), kernels.linear(x, kernels.pack([exact.float()])))


# --- what is not a number ---


@every_build
@pytest.mark.parametrize(("kind", "bits"), HELD)
def test_nan_and_infinity_stay_in_their_row(build: Build, kind: str, bits: int):
    """A request's NaN that reaches its neighbours, or that disappears."""
    kernels, random_ = build.kernels(bits=bits), generator(12)
    part, _ = matrix(kind, 40, 96, random_)
    for rows in (5, 120):
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(rows, 96, generator=random_).bfloat16()
            packed = kernels.pack([part, part], activation="silu", gated=True)
            clean = kernels.linear(x, packed)
            x[3, 50] = bad
            out = kernels.linear(x, packed)
            others = torch.arange(rows) != 3
            assert torch.equal(out[others], clean[others])
            assert out[3].isnan().all() if math.isnan(bad) else not out[3].isfinite().all()


@pytest.mark.parametrize("activation", [*FLOAT64])
@every_isa
def test_activations_at_the_ends(isa: str, activation: Activation | None):
    """Infinity times nothing: far out, activations are x or 0, and a NaN stays one."""
    kernels = Build(isa, 1).kernels(torch.float32)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 200.0, -200.0, 0.0, -1e-30])[:, None]
    out = kernels.linear(x, kernels.pack([torch.ones(1, 1)], activation=activation))
    expected = FLOAT64[activation](x.double()).nan_to_num(0.0, posinf=torch.inf, neginf=-torch.inf)
    if activation is None:
        expected = x.double()
    assert out[0].isnan()
    torch.testing.assert_close(out[1:].double(), expected[1:], atol=1e-12, rtol=1e-6)
