"""Whole models on the Triton kernels: near the reference, and the same bits in chunks and in company.

On the device where there is one (`make test-gpu`, every family), else a few through Triton's interpreter.
"""

from __future__ import annotations

import os
import random
from itertools import repeat
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

from holdfast.kernels.cuda.kernels import CudaKernels
from holdfast.kernels.reference import ReferenceKernels
from holdfast.models.inspect import inspect_model
from holdfast.models.load import load_decoder
from support.cases import CASES, QUANTIZED
from support.checkpoints import random_model, run_chunks, run_interleaved, save
from support.gguf_twin import write_twin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
FEW = tuple(
    pytest.param(name, marks=[pytest.mark.slow] if name != "llama, grouped queries, llama3 rope" else [])
    for name in ("llama, grouped queries, llama3 rope", "gemma3", "bloom, heads not a power of two", "qwen3_moe")
)
SHORT, LONG = (9, 5, 3), (300, 40, 70, 1, 33)


def prompts(lengths: tuple[int, ...]) -> list[list[int]]:
    dice = random.Random(1)
    return [[dice.randrange(3, 97) for _ in range(length)] for length in lengths]


def same_in_company_and_chunks(path: str, dtype: torch.dtype) -> None:
    decoder = load_decoder(inspect_model(path), CudaKernels(dtype), dtype, DEVICE)
    requests = prompts(LONG if DEVICE == "cuda" else SHORT)
    alone = [run_chunks(decoder, tokens, [len(tokens)]) for tokens in requests]
    company = run_interleaved(decoder, requests, 0, 4, chunks=(1, 1, 3, 64))
    assert all(map(torch.equal, company, alone))
    assert torch.equal(run_chunks(decoder, requests[0], repeat(4), 16), alone[0])


@pytest.mark.parametrize("name", CASES if DEVICE == "cuda" else FEW)
def test_logits_are_those_of_the_reference(name: str, tmp_path: Path):
    """Every kernel in the place it has in a model; a layout or an option that only the model brings."""
    path = save(random_model(**CASES[name]), tmp_path)
    requests = prompts(LONG if DEVICE == "cuda" else SHORT)
    logits = []
    for kernels, device in ((ReferenceKernels(torch.float32), "cpu"), (CudaKernels(torch.float32), DEVICE)):
        decoder = load_decoder(inspect_model(path), kernels, torch.float32, device)
        logits.append([run_chunks(decoder, tokens, [len(tokens)]).cpu() for tokens in requests[:2]])
    for expected, out in zip(*logits, strict=True):
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", CASES if DEVICE == "cuda" else FEW)
def test_a_request_is_the_same_alone_in_company_and_in_chunks(name: str, tmp_path: Path):
    same_in_company_and_chunks(save(random_model(**CASES[name]), tmp_path), torch.bfloat16)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"] if DEVICE == "cuda" else ["Q4_1"])
def test_so_is_one_of_quantized_weights(kind: str, tmp_path: Path):
    model = random_model(**QUANTIZED["whole groups: llama"])
    save(model, tmp_path)
    same_in_company_and_chunks(write_twin(model.config, tmp_path, tmp_path / "twin.gguf", kind=kind), torch.bfloat16)
