"""The Triton kernels go through Triton's compiler, down to the code of a GPU that need not be there.

The interpreter takes much that the compiler does not: types that depend on a branch, shapes that are no power of two.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

KERNELS = {
    "argmax_row", "attend", "combine_row", "convert_row", "embed_row", "experts_kernel", "filter_row",
    "linear_kernel", "merge", "noise_block", "norm_row", "place_head", "route_row",
}  # fmt: skip


def compiled(folder: Path, *arguments: str) -> set[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "support.compiled", *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(folder)},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return set(done.stdout.split())


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["86", "90"])
def test_one_of_each_kernel_compiles(capability: str, tmp_path: Path):
    """And fits the shared memory there is: twice as much on a Hopper as on a card for desks."""
    assert compiled(tmp_path, capability, "few") == KERNELS


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability: str, tmp_path: Path):
    assert compiled(tmp_path, capability, "all") == KERNELS
