"""Does a change leave all numbers of training as they are? Three optimizer steps of every trainer, to the last bit.

    python benchmarks/parity.py record before.json        before the change
    python benchmarks/parity.py compare before.json       after it: prints every number that differs

Recorded are the losses and metrics of each step and of an evaluation afterwards, and digests of the weights before and
after. Runs are on CPUs, in one thread, from fixed seeds: with all weights and with an adapter, in every layout, and in two
processes. Only public names are used, so that files may move and be renamed. Numbers depend on the processor and on the
versions of torch and others in the last bit; both are in the record, and `compare` says where they differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy")
NOT_OURS = re.compile(r"^time/|_runtime$|_per_second$|^step_time$|^total_flos$|memory|^epoch$|^step$")
"""Metrics that the clock or the machine has a part in, and what `transformers` counts by itself."""

Run = dict[str, Any]
Record = dict[str, Any]


# ---- in a worker ----


def digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def weights_digest(model: Any) -> str:
    """A digest of all parameters, whatever they are called."""
    tensors = (parameter.detach().contiguous() for parameter in model.parameters())
    return digest(
        sorted(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes() for tensor in tensors)
    )


def number(value: Any) -> float | int | str:
    """A scalar as it is; a digest of an array."""
    if isinstance(value, bool | int | float | str):
        return value
    import numpy as np

    array = np.asarray(value)
    return (
        array.item()
        if array.ndim == 0
        else digest([str(array.dtype).encode(), str(array.shape).encode(), array.tobytes()])
    )


def collect(logs: Sequence[Mapping[str, Any]]) -> dict[str, list]:
    """Values by name, in the order in which they were logged."""
    found: dict[str, list] = {}
    for log in logs:
        for name, value in log.items():
            if not NOT_OURS.search(name):
                found.setdefault(name, []).append(number(value))
    return found


def run_case(case: Any, folder: Path, *, rank: int) -> Run:
    """What a case gives in this process; where it fails, the error in its place, so that the others are compared."""
    import parity_cases

    try:
        trainer = parity_cases.make_trainer(case, folder)
        before = weights_digest(trainer.model)
        logs = stepped(trainer, rank) if case.rows is None else trained(trainer)
    except Exception as error:
        traceback.print_exc()
        return {"failed": [f"{type(error).__name__}: {error}"]}
    return {"weights before": [before], **collect(logs), "weights after": [weights_digest(trainer.model)]}


def trained(trainer: Any) -> list[dict[str, Any]]:
    """What is logged by training and by an evaluation afterwards."""
    trainer.train()
    trainer.evaluate()
    return trainer.state.log_history


def stepped(trainer: Any, rank: int) -> list[dict[str, Any]]:
    """Statistics of `PPOTrainer.step`, on triplets of this process's own."""
    import parity_cases

    size = trainer.args.batch_size
    batches = [parity_cases.triplets(size, first=rank * size, seed=step) for step in range(parity_cases.STEPS)]
    return [trainer.step(*batch) for batch in batches]


def work(names: Sequence[str], folder: Path) -> None:
    """Run cases in this process, which may be one of several, and write what each gives."""
    import parity_cases
    import torch

    torch.set_num_threads(1)
    rank, cases = int(os.environ.get("RANK", 0)), parity_cases.all_cases()
    for name in names:
        found = run_case(cases[name], folder / "run", rank=rank)
        with (folder / f"rank-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([name, found]) + "\n")
        if rank == 0:
            print(
                f"{name}: loss {found.get('loss') or found.get('ppo/loss/total') or found}", file=sys.stderr, flush=True
            )


# ---- in the program ----


def launch(names: Sequence[str], world: int) -> dict[str, Run]:
    """Run cases in a fresh process, or as many as they need; results of the second process are named as such."""
    if not names:
        return {}
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
        own = {"PYTHONPATH": str(ROOT), "HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        own |= {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, *launcher, str(Path(__file__).resolve()), "work", folder, *names]
        subprocess.run(command, env={**kept, **own}, stdout=subprocess.DEVNULL, check=True)
        found: dict[str, Run] = {}
        for rank in range(world):
            lines = Path(folder, f"rank-{rank}.jsonl").read_text().splitlines()
            found |= {name + (f", rank {rank}" if rank else ""): run for name, run in map(json.loads, lines)}
        return found


def machine() -> dict[str, str]:
    """What numbers depend on besides this code."""
    import torch

    found = {"python": platform.python_version(), "processor": torch.backends.cpu.get_cpu_capability()}
    return found | {name: version(name) for name in PACKAGES}


def record(only: str) -> Record:
    """Run all cases whose name matches."""
    sys.path.insert(0, str(ROOT))
    import parity_cases

    cases = {name: case for name, case in parity_cases.all_cases().items() if re.search(only, name)}
    runs: dict[str, Run] = {}
    for world in sorted({case.world for case in cases.values()}):
        runs |= launch([name for name, case in cases.items() if case.world == world], world)
    return {"machine": machine(), "runs": runs}


def differences(before: Mapping[str, Run], after: Mapping[str, Run]) -> Iterator[str]:
    """A line for every number that differs, and for every case or name that is only in one of them."""
    for case in [*before, *(case for case in after if case not in before)]:
        if case not in before or case not in after:
            yield f"{case}: {'vanished' if case in before else 'new'}"
            continue
        old, new = before[case], after[case]
        for name in [*old, *(name for name in new if name not in old)]:
            if name not in old or name not in new:
                yield f"{case} · {name}: {'vanished' if name in old else 'new'} {old.get(name, new.get(name))}"
                continue
            for step in range(max(len(old[name]), len(new[name]))):
                a, b = (
                    json.dumps(values[step]) if step < len(values) else "nothing" for values in (old[name], new[name])
                )
                if a != b:
                    yield f"{case} · {name}[{step}]: {a} → {b}"


def compare(file: Path, only: str) -> int:
    """Run the cases of a record again, and print what differs; gives the program's exit status."""
    then = json.loads(file.read_text())
    now = record(only)
    for name, value in then["machine"].items():
        if now["machine"][name] != value:
            print(f"The record was made with {name} {value}, this is {now['machine'][name]}: last bits may differ.")
    known = {name: run for name, run in then["runs"].items() if re.search(only, name)}
    lines = list(differences(known, now["runs"]))
    print("\n".join(lines))
    values = sum(len(values) for run in known.values() for values in run.values())
    print(f"{len(lines)} differences in {values:,} numbers of {len(known)} runs.")
    return 1 if lines else 0


def write(found: Record, file: Path) -> None:
    """A line per case, so that a change of one shows as a line."""
    runs = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in found["runs"].items())
    file.write_text(f'{{"machine": {json.dumps(found["machine"])},\n"runs": {{\n{runs}\n}}}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("record", "run everything and write it down"), ("compare", "run again and print differences")):
        command = commands.add_parser(name, help=about)
        command.add_argument("file", type=Path)
        command.add_argument("--only", default="", help="cases whose name matches this regular expression")
    worker = commands.add_parser("work")
    worker.add_argument("folder", type=Path)
    worker.add_argument("names", nargs="+")
    given = parser.parse_args()
    if given.command == "work":
        work(given.names, given.folder)
    elif given.command == "record":
        write(record(given.only), given.file)
    else:
        sys.exit(compare(given.file, given.only))


if __name__ == "__main__":
    main()
