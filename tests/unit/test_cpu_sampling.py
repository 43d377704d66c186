"""Sampling on the CPU kernels in every build: against the reference, and the same bits in all of them."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.reference import ReferenceKernels
from support.cpu import ISAS, Build, every_build, every_isa, generator, same_bits

REFERENCE = ReferenceKernels()
VOCABULARIES = [1, 2, 31, 97, 49152]


# --- argmax ---


some_logits = st.sampled_from([-torch.inf, -1.0, -0.0, 0.0, 1e-45, 2.0, torch.inf, torch.nan, -torch.nan])


@every_isa
@given(st.lists(some_logits, min_size=1, max_size=70))
@settings(max_examples=100, deadline=None)
def test_argmax_is_the_first_of_the_largest(isa: str, row: list[float]):
    """Ties that go to whichever lane had them, zeros of two signs, infinities, and NaNs, which count as largest."""
    nans = [i for i, x in enumerate(row) if math.isnan(x)]
    expected = nans[0] if nans else row.index(max(row))
    assert Build(isa, 1).kernels().argmax(torch.tensor([row])).tolist() == [expected]


@every_build
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_argmax_of_many_rows(build: Build, vocab_size: int):
    """A row's answer in another's place; rows that lie apart; a largest number at either end."""
    logits = torch.randn(12, vocab_size + 5, generator=generator(vocab_size))[:, :vocab_size]
    logits[0, -1], logits[1, 0], logits[2], logits[3] = 9.0, 9.0, -torch.inf, 4.0
    before = logits.clone()
    expected = [row.tolist().index(row.max().item()) for row in logits]
    chosen = build.kernels().argmax(logits)
    assert (chosen.dtype, chosen.tolist()) == (torch.int64, expected)
    assert torch.equal(logits, before)


# --- noise ---

SEEDS = torch.tensor([0, 1, 2**63 - 1, -1, -(2**62), 0x123456789ABCDEF])
POSITIONS = torch.tensor([0, 7, 131071, 5, 2, 2**31 - 1])


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_noise_is_the_definition_and_the_same_bits_in_every_build(vocab_size: int):
    """A seed that samples other tokens on another processor; a vocabulary that is no whole number of counters."""
    expected = REFERENCE.add_gumbel_noise(torch.zeros(6, vocab_size), SEEDS, POSITIONS)
    found = []
    for isa in ISAS:
        logits = torch.zeros(6, vocab_size)
        found.append(Build(isa, 2).kernels().add_gumbel_noise(logits, SEEDS, POSITIONS))
        assert found[-1] is logits
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
        assert same_bits(logits, found[0])


@every_build
def test_noise_does_not_depend_on_the_batch(build: Build):
    """A row's draw that changes with its neighbours, its place or where it lies; what lies between rows stays."""
    kernels, random_ = build.kernels(), generator(0)
    wide = torch.randn(6, 4110, generator=random_)
    before, logits = wide.clone(), wide[:, :4099]
    rows = [logits[i : i + 1].clone() for i in range(6)]
    kernels.add_gumbel_noise(logits, SEEDS, POSITIONS)
    for i, row in enumerate(rows):
        assert torch.equal(kernels.add_gumbel_noise(row, SEEDS[i : i + 1], POSITIONS[i : i + 1]), logits[i : i + 1])
    assert torch.equal(wide[:, 4099:], before[:, 4099:])
    assert kernels.add_gumbel_noise(logits[:0], SEEDS[:0], POSITIONS[:0]).shape == (0, 4099)


@every_isa
def test_noise_leaves_what_was_filtered(isa: str):
    """A token outside top-k that the noise brings back, or moves the noise of the others."""
    kernels, random_ = Build(isa, 1).kernels(), generator(1)
    logits = torch.randn(6, 301, generator=random_)
    out = kernels.add_gumbel_noise(logits.clone(), SEEDS, POSITIONS)
    for kept in (0.5, 0.01):
        hidden = torch.rand(6, 301, generator=random_) > kept
        filtered = logits.masked_fill(hidden, -torch.inf)
        kernels.add_gumbel_noise(filtered, SEEDS, POSITIONS)
        assert torch.equal(filtered, out.masked_fill(hidden, -torch.inf))
    logits[2, 40], logits[3, 3] = torch.nan, torch.inf
    kernels.add_gumbel_noise(logits, SEEDS, POSITIONS)
    assert logits.isnan().nonzero().tolist() == [[2, 40]]
    assert logits[3, 3] == torch.inf


@every_isa
def test_noise_samples_the_softmax(isa: str):
    """argmax(logits + noise) over many positions hits each token as often as its probability says (Gumbel-max)."""
    kernels, draws = Build(isa, 2).kernels(), 40_000
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    noisy = kernels.add_gumbel_noise(logits.repeat(draws, 1), torch.full((draws,), 42), torch.arange(draws))
    counts = kernels.argmax(noisy).bincount(minlength=5)
    expected = logits.softmax(-1) * draws
    assert ((counts - expected).abs() < 5 * expected.sqrt()).all(), (counts, expected)


# --- filters ---


def limits(*settings_: tuple[int, float, float]) -> list[Tensor]:
    """(top_k, top_p, min_p) per row → the three tensors."""
    top_k, top_p, min_p = zip(*settings_, strict=True)
    return [torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p)]


def assert_filtered(kernels: CpuKernels, logits: Tensor, settings_: list[tuple[int, float, float]]) -> None:
    """As the reference does it; where there is a logarithm or a sum of masses, the last of the distinct logits that
    stay may be the next."""
    out, expected = logits.clone(), logits.clone()
    assert kernels.filter_logits(out, *limits(*settings_)) is out
    REFERENCE.filter_logits(expected, *limits(*settings_))
    for row, mine, theirs, setting in zip(logits, out, expected, settings_, strict=True):
        kept = mine > -torch.inf
        assert torch.equal(mine[kept], row[kept])
        assert kept[row.argmax()] or row.max() == -torch.inf
        if kept.any():
            assert torch.equal(kept, row >= row[kept].min()), "equal logits stay or go together"
        values = row.unique()
        ends = [torch.searchsorted(values, x[x > -torch.inf].min()) for x in (mine, theirs) if (x > -torch.inf).any()]
        assert not ends or (ends[0] - ends[1]).abs() <= (setting[1] < 1 or setting[2] > 0), setting


some_settings = st.tuples(
    st.sampled_from([0, 1, 2, 3, 40, 96, 97, 98, 2000, 2**40]),
    st.sampled_from([1.0, 0.999, 0.9, 0.37, 0.01, 1e-9]),
    st.sampled_from([0.0, 1e-6, 0.05, 0.5, 1.0]),
)


@every_isa
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([1, 2, 31, 97, 3000]),
    settings_=st.lists(some_settings, min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_filters_equal_the_reference(isa: str, seed: int, vocab_size: int, settings_: list[tuple[int, float, float]]):
    """Any three filters together over flat rows, peaked ones, ties, and rows that were filtered before."""
    dice, random_ = random.Random(seed), generator(seed)
    rows = torch.randn(len(settings_), vocab_size, generator=random_)
    for row in rows:
        row.mul_(dice.choice((0.0, 0.01, 1.0, 5.0, 40.0)))
        if dice.random() < 0.3:
            row.round_()
        if dice.random() < 0.3:
            row[torch.rand(vocab_size, generator=random_) < dice.choice((0.1, 0.9))] = -torch.inf
    rows[:, dice.randrange(vocab_size)] += 0.5
    rows[:, dice.randrange(vocab_size)].nan_to_num_(neginf=1.0)  # a row without any is another test's
    assert_filtered(Build(isa, 2).kernels(), rows, settings_)


@every_isa
def test_filters_of_a_whole_vocabulary(isa: str):
    """More distinct logits than a round of buckets tells apart, and many in one bucket."""
    random_ = generator(2)
    settings_ = [
        (50, 1.0, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.02),
        (1000, 0.95, 0.001),
        (0, 0.5, 0.0),
        (40000, 0.999, 0.0),
    ]
    for spread in (1e-3, 1.0, 8.0):
        logits = torch.randn(6, 49152, generator=random_) * spread + 10.0
        assert_filtered(Build(isa, 2).kernels(), logits, settings_)


@every_isa
def test_filters_at_their_ends(isa: str):
    """Limits that leave everything or one token; a row of ties; rows of -inf, or with an infinity or a NaN."""
    kernels = Build(isa, 1).kernels()

    def kept(row: list[float], top_k: int, top_p: float, min_p: float) -> list[int]:
        out = kernels.filter_logits(torch.tensor([row]), *limits((top_k, top_p, min_p)))
        return [i for i, x in enumerate(out[0].tolist()) if x != -math.inf]

    row = [0.0, 5.0, 1.0, 5.0, -3.0]
    for off in ((0, 1.0, 0.0), (5, 1.0, 0.0), (99, 1.0, 0.0)):
        assert kept(row, *off) == [0, 1, 2, 3, 4]
    for tight in ((1, 1.0, 0.0), (0, 1e-9, 0.0), (0, 0.0, 0.0), (0, 1.0, 1.0), (1, 1e-9, 1.0)):
        assert kept(row, *tight) == [1, 3], "ties stay together"
    assert kept(row, 3, 1.0, 0.0) == [1, 2, 3]
    for setting in ((1, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.5), (3, 0.9, 0.1)):
        assert kept([1.5] * 40, *setting) == list(range(40))
        assert kept([7.0], *setting) == [0]
        assert kept([-math.inf] * 20, *setting) == []
        assert kept([0.0, math.inf, 2.0], *setting)[:1] == [1]
        assert len(kept([0.0, math.nan, 2.0], *setting)) == 3, "no distribution to filter"
    assert kept([-0.0, 0.0, -1.0], 1, 1.0, 0.0) == [0, 1]
    assert kept([0.0, -200.0, -300.0], 0, 0.999999, 0.0) == [0]
    assert kept([-1e38, 1e38, 3e38], 2, 1.0, 0.0) == [1, 2]


@every_build
def test_filters_do_not_depend_on_the_batch(build: Build):
    """A limit or a sum that comes from another row, on any thread; what lies between rows stays."""
    kernels, random_ = build.kernels(), generator(3)
    wide = torch.randn(9, 1010, generator=random_) * 3
    before, logits = wide.clone(), wide[:, :997]
    settings_ = [(i * 7 % 4 * 10, 1.0 - i * 0.1, i % 3 * 0.01) for i in range(9)]
    rows = [logits[i : i + 1].clone() for i in range(9)]
    kernels.filter_logits(logits, *limits(*settings_))
    for i, row in enumerate(rows):
        assert torch.equal(kernels.filter_logits(row, *limits(settings_[i])), logits[i : i + 1])
    assert torch.equal(wide[:, 997:], before[:, 997:])


def test_top_k_is_the_same_in_every_build():
    """Counting depends on no rounding: a set that differs is a bug."""
    logits = torch.randn(4, 5000, generator=generator(4))
    outs = [Build(isa, 1).kernels().filter_logits(logits.clone(), *limits(*[(100, 1.0, 0.0)] * 4)) for isa in ISAS]
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert (outs[0] > -torch.inf).sum(dim=-1).tolist() == [100] * 4
