"""How far, and in how many steps, each method of diffusion models learns the task of examples/ddpo, on several seeds.

    python benchmarks/ddpo/learning.py --methods ddpo,grpo,nft,dpo --seeds 0,1,2

Every run is a process of its own on one thread. Results are kept in benchmarks/results/diffusion.json; runs that stand there
are run again where they are asked for, and others are left. Prints a table of all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLE = ROOT / "examples" / "ddpo" / "run.py"
OUT = HERE.parent / "results" / "diffusion.json"
GOAL = 0.9


def run(method: str, seed: int, folder: Path) -> dict[str, Any]:
    """What the example writes of one run."""
    command = [sys.executable, str(EXAMPLE), "--method", method, "--seed", str(seed), "--output_dir", str(folder)]
    command += ["--pipeline_dir", str(folder / "pipelines")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads((folder / f"{method}-{seed}" / "result.json").read_text())


def steps_to(curve: list[list[float]], goal: float) -> int | None:
    """The first optimizer step whose pictures were worth `goal` on the average."""
    return next((step for step, value, _ in curve if value >= goal), None)


def line(found: dict[str, Any]) -> str:
    reached = steps_to(found["curve"], GOAL)
    cells = [
        found["method"],
        found["seed"],
        f"{found['before']:.3f}",
        f"{found['after']:.3f}",
        found["steps"],
        "–" if found["method"] == "dpo" or reached is None else reached,
        f"{found['kl']:.2f}",
        f"{found['cpu_seconds']:.0f} s",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="ddpo,grpo,nft,dpo", help="of examples/ddpo, separated by commas")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, help="keep pages, pictures and the small pipelines here")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="trl-diffusion-"))
    known = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    for method in filter(None, arguments.methods.split(",")):
        for seed in map(int, arguments.seeds.split(",")):
            found = known[f"{method}-{seed}"] = run(method, seed, folder)
            arguments.out.write_text(json.dumps(known, indent=1) + "\n")
            print(line(found), flush=True)
    print(
        f"\n| method | seed | before | after | steps | steps to {GOAL} | KL | CPU |\n|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(line(known[name]) for name in sorted(known)))


if __name__ == "__main__":
    main()
