"""`make chaos`: `holdfast chaos` on four plans of tiny models; ends with 1 unless all replies were as undisturbed.

python -m benchmarks.chaos [--kills N] [--seed S] [--phase PHASES] [--plans NAMES] [--out FOLDER]

TP2xPP2      one replica of 4 ranks: requests wait for it to come back
DP2-of-TP2   two replicas of 2 ranks: requests go on in the other, and faults need not wait: it gets most of them
EP4          a Mixtral with 16 experts on 4 ranks, which move to where the load is meanwhile
2-machines   two replicas of 2 ranks, one of them on another machine: machines, and the way between them, are lost too
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from holdfast.chaos.config import ALL
from support.checkpoints import random_model, save
from support.skewed import EXPERTS, SHAPE, skewed_mixtral
from support.tiny import byte_tokenizer

TP, PP, DP, EP = (f"--{kind}-parallel-size" for kind in ("tensor", "pipeline", "data", "expert"))
BALANCED = ("--enable-eplb", "--num-redundant-experts", "4", "--eplb-step-interval", "100")
SMALL = ("--max-model-len", "2048", "--max-num-seqs", "8", "--max-num-batched-tokens", "128")
"""Requests have to queue, and prompts take several steps."""
PLANS = {
    "TP2xPP2": ("llama", 0.2, 0, (TP, "2", PP, "2")),
    "DP2-of-TP2": ("llama", 0.4, 0, (TP, "2", DP, "2")),
    "EP4": ("mixtral", 0.2, 0, (TP, "4", EP, "4", *BALANCED)),
    "2-machines": ("llama", 0.2, 1, (TP, "2", DP, "2")),
}
"""Model, share of the faults, machines beside the first, flags."""


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of all plans together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", default=ALL, help="as for holdfast chaos")
    parser.add_argument("--plans", default=",".join(PLANS), help="with commas between")
    parser.add_argument("--out", default="benchmarks/out/chaos", help="folder for reports and timelines")
    chosen = parser.parse_args()
    out = Path(chosen.out)
    out.mkdir(parents=True, exist_ok=True)
    plans = {name: PLANS[name] for name in chosen.plans.split(",")}
    shares = sum(share for _, share, _, _ in plans.values())
    bad = []
    with tempfile.TemporaryDirectory() as folder:
        models = write_models(Path(folder))
        for name, (model, share, machines, flags) in plans.items():
            print(f"==> {name}", flush=True)
            kills = max(1, round(chosen.kills * share / shares))
            command = [sys.executable, "-m", "holdfast.cli.main", "chaos", models[model]]
            command += ["--kills", str(kills), "--seed", str(chosen.seed), "--max-tokens", "60"]
            command += ["--phase", chosen.phase, "--machines", str(machines)]
            command += ["--json", f"{out / name}.json", "--plot", f"{out / name}.png", "--", *flags, *SMALL]
            if subprocess.run(command, check=False).returncode:
                bad.append(name)
    sys.exit(f"failed: {', '.join(bad)}" if bad else 0)


if __name__ == "__main__":
    main()
