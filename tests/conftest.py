"""Before anything imports torch or triton: OpenMP threads of the tests soon sleep when they wait, as the workers' do,
and without a GPU Triton's kernels run in its interpreter."""

from __future__ import annotations

import importlib.util
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if importlib.util.find_spec("triton"):
        from support.interpreted import sum_in_one_order

        sum_in_one_order()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--overload-seconds", type=float, default=100.0, help="Length of the overload in which nothing may be lost."
    )
