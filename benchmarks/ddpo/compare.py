"""Classic DDPO side by side with that of TRL 0.11.4, the last release but one that had it.

    python benchmarks/ddpo/compare.py --trl-python path/to/trl-0.11.4-env/bin/python

    trl-0.11.4-env: pip install trl==0.11.4 transformers==4.46.3 diffusers==0.31.0 accelerate==0.34.2 peft==0.13.2 torch

Two things are compared. The loss, the estimate of the KL and the norm of the gradient of every step of the same trajectories,
at weights that have moved. And the time of an epoch: 16 pictures of 8 steps are sampled with guidance, rewarded, and trained on in
one optimizer step, in batches of 1, 4 and 16 pictures. Sides take turns, each run is a process of its own, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
OUT = HERE.parent / "results" / "ddpo.json"
ROOT = HERE.parents[1]
BATCHES = (1, 4, 16)


def call(python: str, *arguments: Any) -> None:
    """Run the worker under `python`; under this interpreter with the library beside this file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    if python == sys.executable:
        environment["PYTHONPATH"] = str(ROOT)
    command = [python, str(HERE / "worker.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tempfile.gettempdir())
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def measure(sides: dict[str, str], folder: Path, *, repeats: int) -> dict[str, Any]:
    call(sides["trl"], "make", folder)
    call(sides["trl"], "sample", folder)
    out = folder / "out.json"
    result: dict[str, Any] = {"versions": {}, "losses": {}, "seconds": {}}
    for side, python in sides.items():
        call(python, "losses", folder, out)
        found = json.loads(out.read_text())
        result["losses"][side], result["versions"][side] = found["losses"], found["versions"]
    for batch in BATCHES:
        seconds: dict[str, dict[str, list[float]]] = {side: {"cpu": [], "wall": []} for side in sides}
        for repeat in range(repeats):
            for side in sorted(sides, reverse=repeat % 2 == 0):
                call(sides[side], "epochs", folder, out, batch)
                for kind, values in json.loads(out.read_text())["seconds"].items():
                    seconds[side][kind] += values
        result["seconds"][batch] = seconds
        print(row(batch, seconds), flush=True)
    return result


def row(batch: int, seconds: dict[str, dict[str, list[float]]]) -> str:
    ours, theirs = (median(seconds[side]["cpu"]) for side in ("ours", "trl"))
    return f"| {batch} | {theirs:.2f} s | {ours:.2f} s | {ours / theirs:.2f} |"


def largest_gaps(losses: dict[str, list[list[float]]]) -> list[float]:
    """Of losses, KL and gradient norms: the largest difference, as a share of the larger number."""
    pairs = zip(*(zip(*losses[side], strict=True) for side in ("ours", "trl")), strict=True)
    return [max(abs(a - b) / max(abs(a), abs(b)) for a, b in zip(*each, strict=True)) for each in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", required=True, help="interpreter of an environment with trl==0.11.4")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each side and batch size")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    print("| pictures in a batch | TRL 0.11.4 | here | ratio |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="trl-ddpo-") as folder:
        sides = {"ours": sys.executable, "trl": arguments.trl_python}
        result = measure(sides, Path(folder), repeats=arguments.repeats)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    loss, kl, norm = largest_gaps(result["losses"])
    print(f"largest relative gaps: loss {loss:.1e}, KL {kl:.1e}, gradient norm {norm:.1e}")


if __name__ == "__main__":
    main()
