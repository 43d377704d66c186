"""The CPU kernels for whole rows and for experts, in every build, against definitions in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from holdfast.core.spec import Activation
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.packing import PackedMatrix
from holdfast.kernels.interface import Routing
from support.cpu import (
    BFLOAT16_EPS,
    FORMATS,
    HELD,
    Build,
    every_build,
    every_isa,
    generator,
    in_steps,
    matrix,
    same_bits,
)

WIDTHS = [1, 7, 16, 33, 64, 257, 1024]
DTYPES = [torch.float32, torch.bfloat16]


def near(out: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` and half a step of the result's dtype."""
    rounding = BFLOAT16_EPS if out.dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(out.double(), expected.double(), atol=tolerance, rtol=rounding)


# --- embedding ---


@every_build
@pytest.mark.parametrize("kind", FORMATS)
def test_embedding_returns_exact_rows(build: Build, kind: str):
    """A row read from its neighbour's place, in any format and panel; scale, offset and what is added to."""
    kernels, random_ = build.kernels(), generator(0)
    part, exact = matrix(kind, 100, 96, random_)
    table, ids = kernels.pack([part]), torch.randint(0, 98, (300,), generator=random_)
    ids[:4] = torch.tensor([0, 31, 32, 97])
    assert torch.equal(kernels.embedding(ids, table), exact.float()[ids])
    assert torch.equal(kernels.embedding(ids, table, scale=1.7, offset=2), exact.float()[ids + 2] * 1.7)
    stream = torch.randn(300, 96, generator=random_)
    expected = stream + exact.float()[ids] * 0.3
    assert kernels.embedding(ids, table, scale=0.3, add_to=stream) is stream
    assert torch.equal(stream, expected)


@every_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embedding_of_odd_widths(isa: str, dtype: torch.dtype):
    """The last number of an odd row, which has no partner; a table of one number."""
    kernels = Build(isa, 1).kernels(dtype)
    for rows, width in ((1, 1), (33, 7), (40, 63)):
        table, ids = torch.randn(rows, width).to(dtype), torch.arange(rows)
        assert torch.equal(kernels.embedding(ids, kernels.pack([table])), table.float())


def test_embedding_of_a_whole_vocabulary():
    """Places that do not fit into 32 bits."""
    kernels = CpuKernels(torch.bfloat16, 2)
    table = torch.randn(151_936, 16).bfloat16()
    ids = torch.tensor([151_935, 0, 77_777])
    assert torch.equal(kernels.embedding(ids, kernels.pack([table])), table[ids].float())


# --- norms, conversion, soft-cap ---


@every_build
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_equal_their_definitions(build: Build, width: int, dtype: torch.dtype):
    """Rows that are no whole number of vectors, and results rounded on the way."""
    kernels, random_ = build.kernels(), generator(width)
    x = (torch.randn(9, width, generator=random_) * 30 + 5).to(dtype)
    weight, bias = torch.randn(2, width, generator=random_)
    exact = x.double()
    rms = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    centred = exact - exact.mean(-1, keepdim=True)
    layer = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    for out_dtype in DTYPES:
        near(kernels.rms_norm(x, weight, 1e-5, out_dtype), rms)
        near(kernels.layer_norm(x, weight, bias, 1e-5, out_dtype), layer + bias)
        near(kernels.layer_norm(x, weight, None, 1e-5, out_dtype), layer)
    for norm, args in ((kernels.rms_norm, (weight,)), (kernels.layer_norm, (weight, bias))):
        stream = torch.randn(9, width, generator=random_)
        expected = stream + norm(x, *args, 1e-5, torch.float32)
        assert norm(x, *args, 1e-5, torch.bfloat16, add_to=stream) is stream
        assert torch.equal(stream, expected)


@every_isa
def test_layer_norm_of_numbers_far_from_zero(isa: str):
    """A variance computed from squares, in which float32 loses everything."""
    x = torch.randn(3, 100, generator=generator(1)) + 10_000
    exact = x.double() - x.double().mean(-1, keepdim=True)
    exact /= (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    out = Build(isa, 1).kernels().layer_norm(x, torch.ones(100), None, 1e-5, torch.float32)
    near(out, exact, 1e-3)


@every_isa
def test_softcap_is_as_exact_near_zero_as_far_out(isa: str):
    """A tanh that loses small numbers or overflows; in place, and only there."""
    kernels = Build(isa, 1).kernels()
    wide = torch.randn(5, 90, generator=generator(2)) * torch.logspace(-8, 3, 5)[:, None]
    before, x = wide.clone(), wide[:, 3:80]
    expected = torch.tanh(x.double() / 7.0) * 7.0
    assert kernels.softcap(x, 7.0) is x
    torch.testing.assert_close(x.double(), expected, atol=0, rtol=1e-6)
    assert torch.equal(wide[:, :3], before[:, :3])
    assert torch.equal(wide[:, 80:], before[:, 80:])
    ends = kernels.softcap(torch.tensor([[torch.inf, -torch.inf, torch.nan, 0.0]]), 7.0)
    assert ends[0, [0, 1, 3]].tolist() == [7.0, -7.0, 0.0]
    assert ends[0, 2].isnan()


@every_isa
@pytest.mark.parametrize("width", WIDTHS)
def test_convert_rounds_as_torch_does(isa: str, width: int):
    """Ties to even, infinities that stay, NaNs that do not become infinities, and a tensor of its own."""
    kernels = Build(isa, 2).kernels()
    x = torch.randn(40, width, generator=generator(width))
    x[0, 0], x[1, 0], x[2, 0], x[3, 0] = torch.inf, -torch.inf, 1 + 2.0**-8, 1 + 3 * 2.0**-8
    x[4, 0], x[5, 0] = torch.nan, 3.4e38
    x.view(torch.int32)[6, 0] = 0x7F800001  # a NaN whose upper half is infinity's
    out = kernels.convert(x, torch.bfloat16)
    torch.testing.assert_close(out, x.bfloat16(), atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(kernels.convert(out, torch.float32), out.float(), atol=0, rtol=0, equal_nan=True)
    assert same_bits(kernels.convert(x, torch.float32), x)
    assert kernels.convert(x, torch.float32).data_ptr() != x.data_ptr()


@every_build
def test_rows_are_the_same_alone_and_in_company(build: Build):
    """Whole-row kernels that look at a neighbour, or that a thread's share of the rows changes; NaNs that spread."""
    kernels, random_ = build.kernels(), generator(3)
    x, weight = torch.randn(150, 77, generator=random_), torch.randn(77, generator=random_)
    x[3, 5], x[4, 76] = torch.nan, torch.inf
    for run in (
        lambda rows: kernels.rms_norm(rows, weight, 1e-5, torch.float32),
        lambda rows: kernels.layer_norm(rows, weight, weight, 1e-5, torch.float32),
        lambda rows: kernels.softcap(rows.clone(), 2.0),
        lambda rows: kernels.convert(rows, torch.bfloat16),
    ):
        together = run(x)
        alone = torch.cat([run(x[i : i + 1]) for i in range(len(x))])
        torch.testing.assert_close(together, alone, atol=0, rtol=0, equal_nan=True)
        bad = together.isnan().any(dim=-1).nonzero()[:, 0].tolist()
        assert bad in ([3], [3, 4]), "infinity over infinity is a NaN in the norms"


# --- experts ---


class Mixture:
    """E random experts in one format, and the answer row by row in float64."""

    def __init__(
        self,
        kernels: CpuKernels,
        count: int,
        *,
        kind: str = "bfloat16",
        bits: int = 8,
        hidden: int = 64,
        width: int = 96,
        seed: int = 0,
    ) -> None:
        random_ = generator(seed)
        self.kernels, self.kind, self.bits = kernels, kind, bits
        triples = [
            [matrix(kind, *shape, random_) for shape in ((width, hidden),) * 2 + ((hidden, width),)]
            for _ in range(count)
        ]
        self.exact = [[exact for _, exact in triple] for triple in triples]
        activation: Activation = "silu"
        self.up = [kernels.pack([gate, up], activation=activation, gated=True) for (gate, _), (up, _), _ in triples]
        self.down: list[PackedMatrix] = [kernels.pack([down]) for _, _, (down, _) in triples]

    def run(self, x: Tensor, scores: Tensor, routing: Routing, **options: Tensor) -> Tensor:
        return self.kernels.experts(x, scores, routing, self.up, self.down, **options)

    def expected(self, x: Tensor, scores: Tensor, routing: Routing) -> Tensor:
        round_ = partial(in_steps, bits=self.bits) if self.kind.startswith("Q") else Tensor.double
        out = torch.zeros(len(x), self.exact[0][2].shape[0], dtype=torch.float64)
        for row, shares in enumerate(scores.double().softmax(-1).tolist()):
            best = sorted(range(len(shares)), key=lambda expert: -shares[expert])[: routing.experts_per_token]
            total = sum(shares[expert] for expert in best) if routing.renormalize else 1.0
            for expert in best:
                gate, up, down = self.exact[expert]
                given = round_(x[row : row + 1])
                hidden = torch.nn.functional.silu(given @ gate.T) * (given @ up.T)
                out[row] += shares[expert] / total * (round_(hidden.to(x.dtype)) @ down.T)[0]
        return out


@every_build
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, 5])
def test_experts_equal_their_definition(build: Build, chosen: int, renormalize: bool):
    """A row that gets another's expert or share; the last expert is nobody's choice, the first everybody's."""
    random_ = generator(chosen)
    mixture = Mixture(build.kernels(torch.float32), 6, kind="float32", hidden=7, width=13)
    routing = Routing(chosen, renormalize)
    for rows in (1, 9, 130):
        x, scores = torch.randn(rows, 7, generator=random_), torch.randn(rows, 6, generator=random_)
        scores[:, 5], scores[:, 0] = -100.0, 3.0
        expected = mixture.expected(x, scores, routing)
        near(mixture.run(x, scores, routing), expected, 2e-5)
        stream = torch.randn(rows, 7, generator=random_)
        before = stream.clone()
        assert mixture.run(x, scores, routing, add_to=stream) is stream
        assert torch.equal(stream, before + mixture.run(x, scores, routing))


@every_isa
@pytest.mark.parametrize(("kind", "bits"), HELD[1:])
def test_experts_of_a_bfloat16_model(isa: str, kind: str, bits: int):
    """Formats whose rows are rounded again between the two products; more rows for one expert than a block holds."""
    random_ = generator(4)
    mixture, routing = Mixture(Build(isa, 2).kernels(bits=bits), 3, kind=kind, bits=bits), Routing(2, True)
    x, scores = torch.randn(170, 64, generator=random_).bfloat16(), torch.randn(170, 3, generator=random_)
    scores[:, 1] = 5.0
    out, expected = mixture.run(x, scores, routing), mixture.expected(x, scores, routing)
    assert out.dtype == torch.bfloat16
    # what is rounded between the products may fall to either side of a step
    assert (out.double() - expected).abs().max() < 0.01 * expected.abs().max()


@every_isa
@pytest.mark.parametrize(("kind", "bits"), HELD)
def test_experts_answer_a_row_alike_in_any_company(isa: str, kind: str, bits: int):
    """Sums that depend on how many rows an expert happens to get, or on their order."""
    random_ = generator(5)
    x, scores = torch.randn(140, 64, generator=random_).bfloat16(), torch.randn(140, 8, generator=random_)
    scores[:, 2] += 3.0
    routing = Routing(3, renormalize=True)
    one, two = (Mixture(Build(isa, threads).kernels(bits=bits), 8, kind=kind) for threads in (1, 2))
    together = two.run(x, scores, routing)
    alone = torch.cat([one.run(x[i : i + 1], scores[i : i + 1], routing) for i in range(len(x))])
    assert same_bits(together, alone)
    backwards = two.run(x.flip(0), scores.flip(0), routing).flip(0)
    assert same_bits(backwards, alone)


@every_isa
def test_an_expert_alone_is_an_mlp(isa: str):
    """E = 1: everything goes to the one there is, at a share of 1."""
    mixture, random_ = Mixture(Build(isa, 2).kernels(), 1), generator(6)
    x = torch.randn(20, 64, generator=random_).bfloat16()
    kernels = mixture.kernels
    hidden = kernels.linear(x, mixture.up[0], dtype=x.dtype if "bf16" in isa else torch.float32)
    expected = kernels.linear(hidden, mixture.down[0], dtype=x.dtype)
    assert torch.equal(mixture.run(x, torch.zeros(20, 1), Routing(1, renormalize=False)), expected)


@every_isa
def test_ties_between_experts_go_to_the_lowest(isa: str):
    """Each expert answers with its own power of two, so that a sum says who was asked."""
    kernels = Build(isa, 1).kernels(torch.float32)
    for count in (5, 16, 40):
        up = [kernels.pack([torch.ones(1, 1)]) for _ in range(count)]
        down = [kernels.pack([torch.tensor([[2.0**expert]])]) for expert in range(count)]
        scores = torch.zeros(3, count)
        scores[1, [1, 4]] = 1.0
        scores[2, 0] = -1.0
        asked = kernels.experts(torch.ones(3, 1), scores, Routing(3, renormalize=True), up, down) * 3
        assert asked[[0, 2], 0].tolist() == pytest.approx([1 + 2 + 4, 2 + 4 + 8])
        two = kernels.experts(torch.ones(3, 1), scores, Routing(2, renormalize=True), up, down) * 2
        assert two[1, 0].item() == pytest.approx(2 + 16)


@every_isa
@pytest.mark.parametrize("kind", FORMATS)
def test_experts_keep_a_nan_in_its_row(isa: str, kind: str):
    """A NaN among the numbers or the scores of a row, which must choose some experts all the same."""
    mixture, random_, routing = Mixture(Build(isa, 2).kernels(), 4, kind=kind), generator(7), Routing(2, False)
    x, scores = torch.randn(30, 64, generator=random_).bfloat16(), torch.randn(30, 4, generator=random_)
    clean = mixture.run(x, scores, routing)
    x[3, 8], scores[11, 2], scores[12] = torch.nan, torch.nan, -torch.inf
    out = mixture.run(x, scores, routing)
    bad = torch.tensor([row in (3, 11, 12) for row in range(30)])
    assert out[bad].isnan().all()
    assert torch.equal(out[~bad], clean[~bad])


@every_isa
@pytest.mark.parametrize("up_kind", FORMATS)
@pytest.mark.parametrize("down_kind", FORMATS)
def test_experts_may_be_held_in_two_formats(isa: str, up_kind: str, down_kind: str):
    """Files that keep some matrices finer than others: what lies between the products must suit the second."""
    kernels, random_ = Build(isa, 1).kernels(), generator(8)
    x = torch.randn(6, 64, generator=random_).bfloat16()
    (up, exact_up), (down, exact_down) = matrix(up_kind, 32, 64, random_), matrix(down_kind, 10, 32, random_)
    out = kernels.experts(x, torch.zeros(6, 1), Routing(1, False), [kernels.pack([up])], [kernels.pack([down])])
    hidden = (in_steps(x) if up_kind.startswith("Q") else x.double()) @ exact_up.T
    expected = (in_steps(hidden) if down_kind.startswith("Q") else hidden) @ exact_down.T
    assert (out.double() - expected).abs().max() < 0.02 * expected.abs().max()
