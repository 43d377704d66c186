"""The reference kernels behind sampling against definitions written out loop by loop."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    noise = KERNELS.add_gumbel_noise(torch.zeros(5, 10), torch.tensor(seeds), torch.tensor(positions))
    for row, seed, position in zip(noise.tolist(), seeds, positions, strict=True):
        expected = [scalar_noise(seed, position, token_id) for token_id in range(10)]
        assert row == pytest.approx(expected, abs=1e-6)


def test_noise_does_not_depend_on_the_batch():
    seeds, positions = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])
    logits = torch.randn(3, 4099)
    alone = KERNELS.add_gumbel_noise(logits[1:2].clone(), seeds[1:2], positions[1:2])
    together = KERNELS.add_gumbel_noise(logits, seeds, positions)
    assert together is logits
    assert torch.equal(together[1], alone[0])
    assert KERNELS.add_gumbel_noise(logits[:0], seeds[:0], positions[:0]).shape == (0, 4099)


def test_noise_of_many_rows_is_the_noise_of_each():
    """More counters than one call may take: rows are cut into groups."""
    seeds, positions = torch.arange(7), torch.arange(7) * 3
    many = KERNELS.add_gumbel_noise(torch.zeros(7, 200_000), seeds, positions)
    for row in (0, 3, 6):
        alone = KERNELS.add_gumbel_noise(torch.zeros(1, 200_000), seeds[row : row + 1], positions[row : row + 1])
        assert torch.equal(many[row], alone[0])


def test_noise_samples_the_softmax():
    """argmax(logits + noise) over many positions hits each token as often as its probability says (Gumbel-max)."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    draws = 4_000
    noisy = KERNELS.add_gumbel_noise(logits.repeat(draws, 1), torch.full((draws,), 42), torch.arange(draws))
    counts = KERNELS.argmax(noisy).bincount(minlength=5)
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
    filtered = logits.clone()
    assert KERNELS.filter_logits(filtered, top_k, top_p, min_p) is filtered
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


def test_argmax_gives_ties_to_the_lowest():
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [-torch.inf, -torch.inf, -5.0, -5.0], [3.0, 3.0, 3.0, 3.0]])
    assert KERNELS.argmax(logits).tolist() == [1, 2, 0]
