"""Exactness (docs/architecture.md, Contracts) of whole models on the CPU kernels: the bits of a request depend on the
model, the prompt, the parameters and the seed, and on nothing else."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import cycle, product, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_families import test_logits_equal_transformers as compare_with_transformers
from torch import Tensor

from holdfast.gateway.tokenizer import load_tokenizer
from holdfast.kernels.cpu.kernels import CpuKernels
from holdfast.kernels.cpu.library import ISA_VARIABLE
from holdfast.kernels.reference import ReferenceKernels
from holdfast.kernels.select import select_kernels
from holdfast.models.decoder import Decoder
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from support.builds import builds
from support.cases import CASES, LONG, QUANTIZED, SHAPES, WIDE
from support.checkpoints import random_model, run_chunks, run_interleaved, save
from support.gguf_twin import write_twin
from support.local import LocalEngine
from support.service import demo_model

BUILDS = builds()
pytestmark = pytest.mark.skipif(not BUILDS, reason="Holdfast was installed without a C compiler")

CONFIGS = CASES | QUANTIZED | SHAPES | LONG | WIDE
DTYPES = ("float32", "bfloat16")
FORMATS = ("Q8_0", "Q4_0", "Q4_1")
MODELS = [*product(CASES, DTYPES), *product(QUANTIZED, FORMATS)]
"""(which of `CONFIGS`, how its matrices are held)"""
SERVED = (
    "llama, grouped queries, llama3 rope",
    "gemma3",
    "mixtral",
    "qwen3_moe",
    "bloom, heads not a power of two",
    "gpt2",
)
THREADS = min(2, os.cpu_count() or 1)

Checkpoints = Callable[[str, str], str]
Request = tuple[list[int], dict[str, object]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """(which of `CONFIGS`, how its matrices are held) → the path of a random model, with room for long requests."""

    @cache
    def write(name: str, held: str) -> str:
        folder = tmp_path_factory.mktemp("model")
        model = random_model(**CONFIGS[name] | {"max_position_embeddings": 2304})
        path = save(model, folder)
        return write_twin(model.config, folder, folder / "twin.gguf", kind=held) if held in FORMATS else path

    return write


@pytest.fixture(params=BUILDS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A build of the kernels, asked for as users do."""
    monkeypatch.setenv(ISA_VARIABLE, request.param)
    return request.param


def random_tokens(dice: random.Random, count: int, vocab_size: int = 97) -> list[int]:
    return [dice.randrange(3, vocab_size) for _ in range(count)]


def some(choices: Iterable[Any], fast: Sequence[Any]) -> list[Any]:
    """As parameters of a test; those not in `fast` are slow."""
    return [
        choice
        if choice in fast
        else pytest.param(*([choice] if isinstance(choice, str) else choice), marks=pytest.mark.slow)
        for choice in choices
    ]


def dtype_of(held: str) -> torch.dtype:
    return torch.float32 if held == "float32" else torch.bfloat16


def load(path: str, kernels: CpuKernels | ReferenceKernels) -> Decoder:
    return load_decoder(inspect_model(path), kernels, kernels.dtype, "cpu")


# --- logits ---


def some_requests(length: int, company: int, seed: int) -> list[list[int]]:
    """One of `length` tokens and `company` shorter ones."""
    dice = random.Random(seed)
    return [random_tokens(dice, length)] + [random_tokens(dice, dice.randint(1, 24)) for _ in range(company)]


def ways_that_differ(
    judge: Decoder, decoder: Decoder, requests: Sequence[Sequence[int]], *, block_size: int = 16, seed: int = 0
) -> list[str]:
    """Those in which `decoder` comes to other logits than `judge` does with each request alone, at once, in blocks
    of 4."""
    expected = [run_chunks(judge, tokens, [len(tokens)]) for tokens in requests]
    ways = {
        f"in chunks of {size}": [run_chunks(decoder, requests[0], repeat(size), block_size)]
        for size in (1, 7, 64, 512)
    }
    ways["in company"] = run_interleaved(decoder, requests, seed, block_size, chunks=(1, 1, 7, 64))
    return [way for way, logits in ways.items() if not all(map(torch.equal, logits, expected))]


def check_logits(
    path: str, held: str, isa: str, requests: Sequence[Sequence[int]], *, bits: int = 8, **options: int
) -> None:
    """No `ways_that_differ`; the judge has one thread, the other decoder two."""
    judge, decoder = (
        load(path, CpuKernels(dtype_of(held), threads, isa=isa, activation_bits=bits)) for threads in (1, THREADS)
    )
    weights = (decoder.embed.table, decoder.blocks[0].attention.qkv.weight, decoder.blocks[0].attention.o.weight)
    assert {weight.format for weight in weights} == {held}
    assert ways_that_differ(judge, decoder, requests, **options) == []


@settings(max_examples=25, deadline=None, phases=[Phase.reuse, Phase.generate])  # shrinking takes minutes
@given(
    model=st.sampled_from(MODELS),
    build=st.sampled_from(BUILDS or ["none"]),
    bits=st.sampled_from([8, 16]),
    length=st.integers(1, 300),
    company=st.integers(2, 64),
    block_size=st.sampled_from([1, 4, 7, 16, 32, 48]),
    seed=st.integers(0, 2**32),
)
def test_logits_of_random_requests(
    checkpoint: Checkpoints,
    *,
    model: tuple[str, str],
    build: str,
    bits: int,
    length: int,
    company: int,
    block_size: int,
    seed: int,
):
    """A kernel that sums in another order when a row has other neighbours, more of them, or its keys elsewhere."""
    requests = some_requests(length, company, seed)
    check_logits(checkpoint(*model), model[1], build, requests, bits=bits, block_size=block_size, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize(("name", "held"), MODELS)
def test_logits_of_every_model(checkpoint: Checkpoints, name: str, held: str, build: str):
    """The same fault in what one family, format and instruction set alone use: random choice may take long to get
    there."""
    check_logits(checkpoint(name, held), held, build, some_requests(700, 63, seed=1))


@pytest.mark.parametrize("build", some(BUILDS, fast=BUILDS[:1]))
@pytest.mark.parametrize("held", [*DTYPES, *FORMATS])
def test_logits_of_wide_products(checkpoint: Checkpoints, held: str, build: str):
    """Sums over more columns than stay in a cache: put aside, and taken up again."""
    check_logits(checkpoint("wide experts", held), held, build, some_requests(200, 20, seed=2))


@pytest.mark.parametrize("build", some(BUILDS, fast=BUILDS[:1]))
@pytest.mark.parametrize(
    ("name", "dtype"),
    some(product(LONG, DTYPES), fast=[("one KV head", "bfloat16"), ("alibi", "float32"), ("wide window", "float32")]),
)
def test_logits_of_long_contexts(checkpoint: Checkpoints, name: str, dtype: str, build: str):
    """Attention over several thousand keys: parts of them by one thread or by several, all at once or one token at a
    time."""
    check_logits(checkpoint(name, dtype), dtype, build, some_requests(2100, 6, seed=2))


def test_torch_fails_the_comparison(checkpoint: Checkpoints):
    """A comparison that finds nothing to object to in kernels that are known to change their order of summation."""
    path = checkpoint(SERVED[0], "bfloat16")
    judge, decoder = (load(path, ReferenceKernels(torch.bfloat16)) for _ in range(2))
    assert ways_that_differ(judge, decoder, some_requests(100, 20, seed=3)) != []


# --- tokens and logprobs, as served ---

SAMPLING: list[dict[str, object]] = [
    {"logprobs": 2},
    {"temperature": 1.0, "seed": 1 << 40, "logprobs": 0},
    {"temperature": 0.8, "seed": 12, "top_p": 0.7, "frequency_penalty": 0.4, "logprobs": 1},
    {"temperature": 1.5, "seed": 13, "top_k": 9, "logit_bias": {5: 3.0, 40: -100.0}, "logprobs": 1},
    {"repetition_penalty": 1.4, "presence_penalty": 0.3, "logprobs": 3},
    {"temperature": 1.0, "seed": -14, "min_p": 0.05, "prompt_logprobs": 1, "logprobs": 1},
]


def requests_to_serve(vocab_size: int) -> list[Request]:
    """Every way to sample, twice, for prompts that begin alike: more than one block of 16."""
    dice = random.Random(3)
    start = random_tokens(dice, 48, vocab_size)
    prompts = [
        start[: dice.randint(20, 48)] + random_tokens(dice, dice.randint(1, 30), vocab_size) for _ in range(12)
    ]
    return [
        (prompt, params | {"max_tokens": 24, "ignore_eos": True}) for prompt, params in zip(prompts, cycle(SAMPLING))
    ]


def serve(engine: LocalEngine, requests: Sequence[Request]) -> dict[str, list[tuple[object, ...]]]:
    """What the requests produce alone, in a crowd, after prefix hits and after preemption: those must happen."""
    engine.schedule(prefix_caching=False)
    ways = {"alone": [answer for request in requests for answer in engine.run([request])]}
    engine.schedule(prefix_caching=False, max_num_batched_tokens=50)
    ways["in a crowd"] = engine.run(requests)
    engine.schedule()
    engine.run(requests[::2])
    ways["after hits"] = engine.run(requests)
    assert engine.scheduler.stats().prefix_hits > 0
    engine.schedule(num_blocks=16, max_num_batched_tokens=50)
    ways["after preemption"] = engine.run(requests)
    assert engine.scheduler.stats().preemptions > 0
    return {way: [answer.content for answer in answers] for way, answers in ways.items()}


def served_ways_that_differ(path: str, dtype: str, requests: Sequence[Request], **options: Any) -> list[str]:
    """Those in which the requests come out otherwise than alone on one thread; each number of threads starts an
    engine of its own."""
    found, expected = [], None
    for threads in (1, THREADS):
        engine = LocalEngine(path, dtype=dtype, num_blocks=128, cpu_threads=threads, **options)
        ways = serve(engine, requests)
        expected = expected or ways["alone"]
        found += [f"{way}, {threads} threads" for way, answers in ways.items() if answers != expected]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", some([*CASES, *SHAPES], fast=[*SERVED, "heads of 80"]))
def test_served_answers(checkpoint: Checkpoints, name: str, dtype: str):
    """A scheduler, step program, cache or sampler through which a request's company, a cached prefix, being
    preempted or the number of threads reaches its tokens or the bits of their logprobs."""
    requests = requests_to_serve(CONFIGS[name].get("vocab_size", 97))
    assert served_ways_that_differ(checkpoint(name, dtype), dtype, requests) == []


@pytest.mark.parametrize("activations", some(["int8", "int16"], fast=["int16"]))
def test_served_answers_of_every_build(checkpoint: Checkpoints, isa: str, activations: str):
    """The same, of quantized experts, on kernels asked for by the environment."""
    path, requests = checkpoint("whole groups: mixtral", "Q4_1"), requests_to_serve(97)
    assert served_ways_that_differ(path, "bfloat16", requests, quantized_activations=activations) == []


@pytest.mark.slow
def test_served_answers_of_the_demo_model():
    """The same, at the size of a real model: more units of work than threads, a vocabulary to filter."""
    assert served_ways_that_differ(demo_model(), "bfloat16", requests_to_serve(49152)) == []


def test_torch_fails_the_comparison_of_answers(checkpoint: Checkpoints):
    """As above. The CPU kernels leave float16 to torch."""
    path = checkpoint(SERVED[0], "float32")
    assert served_ways_that_differ(path, "float16", requests_to_serve(97)[:6]) != []


# --- every build ---


@pytest.mark.parametrize("name", some(CASES, fast=[*SERVED, "falcon 7b: multi-query", "opt"]))
def test_every_build_equals_transformers(isa: str, name: str, tmp_path: Path):
    """A mistake in what only one instruction set is compiled with. Exact kernels may still be wrong ones."""
    assert select_kernels("cpu").name == f"cpu-{isa}"
    compare_with_transformers(CASES[name], "cpu", tmp_path)


@pytest.mark.parametrize(("held", "bits"), [("bfloat16", 8), *product(FORMATS, (8, 16))])
@pytest.mark.parametrize("name", some(QUANTIZED, fast=["whole groups: llama"]))
def test_every_build_rounds_no_more_than_it_must(checkpoint: Checkpoints, isa: str, name: str, held: str, bits: int):
    """A mistake too small to turn the text: the scale of a neighbouring group, a sum kept in bfloat16.

    The measure is what bfloat16 does to the logits of the same weights on torch's kernels; rows rounded to 8 bits,
    where weights are quantized, have about twice that. The median over short requests: a rounding that sends a token
    to another expert is no mistake, but changes it and those after it entirely."""
    path, dice = checkpoint(name, held), random.Random(4)
    requests = [random_tokens(dice, 3) for _ in range(40)]
    plain, rounded = ReferenceKernels(torch.float32), ReferenceKernels(torch.bfloat16)
    exact, torchs, ours = (
        torch.cat(run_interleaved(load(path, kernels), requests))
        for kernels in (plain, rounded, CpuKernels(torch.bfloat16, activation_bits=bits))
    )

    def error(logits: Tensor) -> float:
        return (logits - exact).square().mean(1).sqrt().median().item()

    assert error(ours) < error(torchs) * (3.5 if held in FORMATS and bits == 8 else 1.25)


def test_every_build_serves_the_demo_model(isa: str):
    """A real model's sizes, Q4_1 matrices and vocabulary, as `make serve` runs it: wrong text, or company that
    changes it."""
    tokenizer = load_tokenizer(demo_model())
    texts = ["The capital of France is", "Water boils at", "My favourite colour", "Once upon a time there was"]
    requests = [
        (tokenizer.encode(text), params | {"max_tokens": 5})
        for text, params in zip(texts, SAMPLING[: len(texts)], strict=True)
    ]
    engine = LocalEngine(demo_model(), dtype="bfloat16", num_blocks=64, cpu_threads=THREADS)
    assert engine.runner.decoder.kernels.name == f"cpu-{isa}"
    alone = [answer for request in requests for answer in engine.run([request])]
    assert "Paris" in tokenizer.decode(alone[0].token_ids)
    engine.schedule(max_num_batched_tokens=9)
    together = engine.run(requests)
    assert [answer.content for answer in together] == [answer.content for answer in alone]
