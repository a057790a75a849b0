"""Measure our trainers side by side with TRL's and with a plain `transformers.Trainer`.

    python benchmarks/run.py --trl-python path/to/trl-env/bin/python --workloads sft-padded,sft-packed --repeats 3

    python benchmarks/run.py --device cuda --trl-python path/to/trl-env/bin/python --budget 480 --only gpu-sft,gpu-grpo

Every run is a process of its own; the sides take turns, so that a machine that slows down slows all of them. On a GPU the
workloads are those of `gpu_workloads.py`, and each side keeps one process, which gives its memory back after every run: time
there is dear, and a process needs ten seconds to import what it runs. Every run is on disk when it is done, as a line of
`<out>.jobs.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import report
import synthetic
from gpu_workloads import GPU_WORKLOADS
from workloads import WARMUP, WORKLOADS, Workload

WORKER = Path(__file__).with_name("worker.py")


class WorkerFailed(RuntimeError):
    """A worker stopped; the message is all that it wrote."""


@dataclass(frozen=True)
class Bench:
    """How to run a worker: where the material lies, which interpreter each side has, and the settings they share.

    `worker` takes the command line of worker.py and writes what that writes.
    """

    directory: Path
    interpreters: dict[str, str]
    options: dict[str, dict[str, Any]]
    steps: int
    seed: int
    threads: int
    worker: Path = WORKER
    device: str = "cpu"
    tiny: bool = False
    plain: bool = False
    """Whether ours runs norms and rotations as architectures write them."""
    limit: float | None = None
    """Seconds that a run may take."""
    deadline: float = float("inf")
    """The moment, by `time.monotonic`, after which no run is begun."""
    log: Path | None = None
    warmup: int = WARMUP
    standing: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    """The process of each side that has one, on a GPU."""

    def run(self, workload: Workload, side: str) -> dict[str, Any]:
        """What the worker of this side measured.

        Raises WorkerFailed with everything that the worker wrote.
        """
        words = ["--side", side, "--workload", workload.name]
        words += ["--dir", str(self.directory), "--steps", str(self.steps), "--seed", str(self.seed)]
        words += [] if self.warmup == WARMUP else ["--warmup", str(self.warmup)]
        words += ["--options", json.dumps(self.options.get(side, {})), "--device", self.device]
        words += [*(["--tiny"] if self.tiny else []), *(["--plain"] if self.plain and side == "ours" else [])]
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise WorkerFailed(f"{side} on {workload.name} was left out: the budget is spent.")
        limit = None if self.limit is None and left == float("inf") else min(left, self.limit or left)
        try:
            found = (self._ask if self.device == "cuda" else self._run_once)(side, words, limit)
        except subprocess.TimeoutExpired as late:
            raise WorkerFailed(f"{side} on {workload.name} took more than {late.timeout:.0f} s.") from late
        if "failed" in found:
            raise WorkerFailed(f"{side} on {workload.name} stopped:\n{found['failed']}")
        if self.log is not None:
            with self.log.open("a") as log:
                log.write(json.dumps({"workload": workload.name, "side": side} | found) + "\n")
        return found

    def _run_once(self, side: str, words: list[str], limit: float | None) -> dict[str, Any]:
        """What a worker that runs to its end measured; `failed` is all that it wrote, if that was not a result."""
        out = self.directory / "run.json"
        command = [self.interpreters[side], str(self.worker), *words, "--out", str(out)]
        options = {"env": self._environment(), "cwd": self.directory, "capture_output": True, "text": True}
        done = subprocess.run(command, timeout=limit, **options)
        return {"failed": done.stdout + done.stderr} if done.returncode else json.loads(out.read_text())

    def _ask(self, side: str, words: list[str], limit: float | None) -> dict[str, Any]:
        """The answer of the side's standing worker; `failed` is all that it wrote, if it ended in place of answering."""
        self.start(side)
        worker = self.standing[side]
        print(json.dumps(words), file=worker.stdin, flush=True)
        late = not select.select([worker.stdout], [], [], limit)[0]
        if not late and (answer := worker.stdout.readline()):
            return json.loads(answer)
        worker.kill()
        self.standing.pop(side).communicate()
        if late:
            raise subprocess.TimeoutExpired(words, limit)
        return {"failed": self._said(side).read_text()}

    def _said(self, side: str) -> Path:
        return self.directory / f"{side}.log"

    def start(self, side: str) -> None:
        """Start the side's standing worker, if it has none."""
        if side in self.standing:
            return
        with self._said(side).open("w") as said:
            self.standing[side] = subprocess.Popen(
                [self.interpreters[side], str(self.worker), "--serve"],
                env=self._environment(), cwd=self.directory,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
            )  # fmt: skip

    def close(self) -> None:
        for worker in self.standing.values():
            worker.communicate()

    def _environment(self) -> dict[str, str]:
        """The caller's, with a fixed number of threads, no network and no path by which one side could import the other."""
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        threads = {name: str(self.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        return kept | threads | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.directory / "hub")}

    def measure(self, workload: Workload, *, repeats: int) -> dict[str, list[dict[str, Any]]]:
        """The runs of every side, in rounds; every other round goes through the sides backwards."""
        sides = [side for side in workload.sides if side in self.interpreters]
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for k in range(repeats):
            for side in sides if k % 2 == 0 else reversed(sides):
                runs[side].append(run := self.run(workload, side))
                pace = report.seconds(run, per_token=False) / self.steps
                print(f"{workload.name}  {side}  {k + 1}/{repeats}  {pace:.2f} s/step", file=sys.stderr, flush=True)
        return runs


def summarise(workload: Workload, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The part of the result that this workload fills."""
    compared = {
        side: report.compare(runs["ours"], runs[side], same_batches=workload.same_batches, per_token=workload.per_token)
        for side in runs
        if side != "ours" and "ours" in runs
    }
    return {
        "about": workload.about,
        "trainer": workload.trainer,
        "config": dict(workload.config),
        "per_token": workload.per_token,
        "targets": {side: asdict(target) for side, target in workload.targets.items()},
        "comparisons": compared,
        "runs": {side: [{k: v for k, v in run.items() if k != "versions"} for run in runs[side]] for side in runs},
    }


def run_all(bench: Bench, workloads: Sequence[Workload], *, repeats: int, out: Path) -> tuple[dict[str, Any], bool]:
    """Measure the workloads one after the other; `out` is written after each. A workload that fails is left out.

    Returns the result and whether every workload ran.
    """
    settings = {"steps": bench.steps, "warmup": bench.warmup, "repeats": repeats, "seed": bench.seed}
    settings |= {"threads": bench.threads, "cores": os.cpu_count(), "options": bench.options, "device": bench.device}
    settings |= {"plain": True} if bench.plain else {}
    for side in bench.interpreters if bench.device == "cuda" else ():
        bench.start(side)  # all import what they need at once
    result: dict[str, Any] = {"settings": settings, "versions": {}, "workloads": {}}
    for workload in workloads:
        workload.write_rows(bench.directory, steps=bench.steps, seed=bench.seed, warmup=bench.warmup)
        try:
            runs = bench.measure(workload, repeats=repeats)
        except WorkerFailed as failure:
            print(failure, file=sys.stderr)
            continue
        result["versions"] |= {side: runs[side][0]["versions"] for side in runs}
        result["workloads"][workload.name] = summarise(workload, runs)
        out.write_text(json.dumps(result, indent=1) + "\n")
    bench.close()
    return result, len(result["workloads"]) == len(workloads)


# ---- for programs with a worker of their own ----


def sides_parser(about: str, release: str, workloads: Iterable[str], *, out: str) -> argparse.ArgumentParser:
    """Options of a program that compares us with one release of TRL, and of the workers that it starts."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help=f"interpreter of an environment with trl=={release}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed steps or rounds of a run")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--busy", action="store_true", help="others use the machine: leave out what the clock says")
    inner = parser.add_argument_group("of a worker, which this program starts")
    inner.add_argument("--side", choices=("ours", "trl"))
    inner.add_argument("--workload", choices=list(workloads))
    inner.add_argument("--dir", type=Path)
    inner.add_argument("--options", type=json.loads, default={})
    inner.add_argument("--device", choices=("cpu",), default="cpu")
    return parser


def play_part(
    arguments: argparse.Namespace,
    work: Callable[[argparse.Namespace], None],
    compare: Callable[[argparse.Namespace], None],
) -> None:
    """What the command line asks for: a worker's part, or the comparison."""
    if arguments.side:
        work(arguments)
    elif arguments.trl_python:
        compare(arguments)
    else:
        sys.exit("--trl-python is missing: an environment of its own with TRL is what we are compared with.")


def compare_sides(
    arguments: argparse.Namespace,
    workloads: Sequence[Workload],
    write: Callable[..., None],
    *,
    worker: Path,
    grids: Sequence[Callable[[dict[str, Any]], report.Grid]] = (),
) -> None:
    """Let ours and TRL's take turns on what `write(directory, seed=…)` saves, and print the tables and further `grids`."""
    interpreters = {"ours": sys.executable, "trl": arguments.trl_python}
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as scratch:
        directory = Path(scratch)
        write(directory, seed=arguments.seed)
        bench = Bench(directory, interpreters, {}, arguments.steps, arguments.seed, arguments.threads, worker=worker)
        result, complete = run_all(bench, workloads, repeats=arguments.repeats, out=arguments.out)
    if arguments.busy:
        result = report.without_clock(result)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    finish(result, complete, grids)


def finish(
    result: dict[str, Any], complete: bool, further: Sequence[Callable[[dict[str, Any]], report.Grid]] = ()
) -> None:
    """Print the tables and `further` ones, and end the program; in failure where a workload did not run."""
    for grid in (*report.tables(result), *(make(result) for make in further)):
        report.show(grid)
    print(report.settings_line(result))
    sys.exit(0 if complete else 1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL; without it TRL is left out")
    parser.add_argument("--workloads", "--only", help="names or beginnings of names, separated by commas; default: all")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="also decides which workloads there are"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds after which no further run is begun, and the last one ends"
    )
    parser.add_argument("--limit", type=float, help="seconds that one run may take")
    parser.add_argument(
        "--tiny", action="store_true", help="run a GPU's jobs with the smallest model, to see that they run"
    )
    parser.add_argument("--plain", action="store_true", help="run our norms and rotations as architectures write them")
    parser.add_argument("--sides", default="ours,trl,transformers", help="which sides to run; default: all")
    parser.add_argument("--options", type=json.loads, default={}, help="config fields of ours to change, as JSON")
    parser.add_argument("--trl-options", type=json.loads, default={}, help="config fields of TRL to change, as JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of a run")
    parser.add_argument(
        "--warmup", type=int, help="steps before those: 2, and 6 on a GPU, where sizes are captured then"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the model's weights and the rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmark.json"))
    arguments = parser.parse_args()
    if arguments.warmup is None:
        arguments.warmup = 6 if arguments.device == "cuda" else WARMUP
    known = GPU_WORKLOADS if arguments.device == "cuda" or arguments.tiny else WORKLOADS
    wanted = [""] if arguments.workloads is None else arguments.workloads.split(",")
    if wrong := [name for name in wanted if not any(workload.startswith(name) for workload in known)]:
        parser.error(f"unknown workload {wrong[0]!r}; known: {', '.join(known)}")
    arguments.workloads = [known[name] for name in known if name.startswith(tuple(wanted))]
    return arguments


def main() -> None:
    arguments = parse()
    found = {"ours": sys.executable, "transformers": sys.executable, "trl": arguments.trl_python}
    interpreters = {side: found[side] for side in arguments.sides.split(",") if found[side]}
    with tempfile.TemporaryDirectory(prefix="trl-bench-") as scratch:
        directory = Path(scratch)
        synthetic.write_material(directory, seed=arguments.seed)
        options = {"ours": arguments.options, "trl": arguments.trl_options}
        bench = Bench(
            directory,
            interpreters,
            options,
            arguments.steps,
            arguments.seed,
            arguments.threads,
            device=arguments.device,
            tiny=arguments.tiny,
            plain=arguments.plain,
            limit=arguments.limit,
            deadline=float("inf") if arguments.budget is None else time.monotonic() + arguments.budget,
            warmup=arguments.warmup,
            log=arguments.out.with_suffix(".jobs.jsonl").absolute(),
        )
        result, complete = run_all(bench, arguments.workloads, repeats=arguments.repeats, out=arguments.out)
    finish(result, complete)


if __name__ == "__main__":
    main()
