"""`make chaos`: `holdfast chaos` on three plans of tiny models; ends with 1 unless all replies were as undisturbed.

python -m benchmarks.chaos [--kills N] [--seed S] [--phase PHASES] [--out FOLDER]

TP2 x PP2            one replica of 4 ranks: requests wait for it to come back
DP2 of TP2           two replicas of 2 ranks: requests go on in the other
EP4                  a Mixtral with 16 experts on 4 ranks, which move to where the load is meanwhile
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from holdfast.chaos.config import PHASES
from support.checkpoints import random_model, save
from support.skewed import EXPERTS, SHAPE, skewed_mixtral
from support.tiny import byte_tokenizer

TP, PP, DP, EP = (f"--{kind}-parallel-size" for kind in ("tensor", "pipeline", "data", "expert"))
BALANCED = ("--enable-eplb", "--num-redundant-experts", "4", "--eplb-step-interval", "100")
PLANS = {
    "TP2 x PP2": ("llama", (TP, "2", PP, "2")),
    "DP2 of TP2": ("llama", (TP, "2", DP, "2")),
    "EP4": ("mixtral", (TP, "4", EP, "4", *BALANCED)),
}


def write_models(folder: Path) -> dict[str, str]:
    models = {}
    for name in ("llama", "mixtral"):
        (folder / name).mkdir()
        size = byte_tokenizer(folder / name)
        if name == "llama":
            model = random_model(model_type="llama", **SHAPE, vocab_size=size)
        else:
            model = skewed_mixtral(**SHAPE, **EXPERTS, vocab_size=size)
        models[name] = save(model, folder / name)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each plan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", default=",".join(PHASES), help="as for holdfast chaos")
    parser.add_argument("--out", default="benchmarks/out/chaos", help="folder for reports and timelines")
    chosen = parser.parse_args()
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        for name, (model, flags) in PLANS.items():
            print(f"==> {name}", flush=True)
            file = out / name.replace(" ", "-")
            command = [sys.executable, "-m", "holdfast.cli.main", "chaos", models[model]]
            command += ["--kills", str(chosen.kills), "--seed", str(chosen.seed), "--max-tokens", "60"]
            command += ["--phase", chosen.phase]
            command += ["--json", f"{file}.json", "--plot", f"{file}.png", "--", *flags, "--max-model-len", "2048"]
            if subprocess.run(command, check=False).returncode:
                bad.append(name)
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
