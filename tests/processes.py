"""Programs in processes of their own: one or two of them, under any engine, and what each tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import is_deepspeed_available

from tests.forked import SESSION
from trl.cli.launch import find_config

ROOT = Path(__file__).parents[1]

WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
"""Variables of processes that are tested as such: NCCL does not let two of them have one GPU, nor CUDA a fork go on."""

PATIENCE = 300
"""Seconds for a server to import everything."""

ALONE: list[str] = []
TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def under(engine: str) -> list[str]:
    """accelerate's launcher with a shipped configuration, for two processes; skips where the engine is not installed."""
    if engine.startswith("zero") and not is_deepspeed_available():
        pytest.skip("DeepSpeed is not installed: pip install 'trl[deepspeed]'")
    return ["-m", "accelerate.commands.launch", "--config_file", str(find_config(engine)), "--num_processes", "2"]


def environment(folder: Path) -> dict[str, str]:
    """This process's variables without its place among others, nor a GPU; what is fetched or cached goes to `folder`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    own = {"PATH": f"{Path(sys.executable).parent}:{kept['PATH']}", "PYTHONPATH": str(ROOT)}
    return {
        **kept,
        **own,
        **WITHOUT_GPU,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHON_EXEC": fast_python(),  # what torch's launcher starts its processes with
    }


@cache
def fast_python() -> str:
    """The path of a command that is an interpreter which has the libraries imported (see `tests.forked`).

    The first process of a test session that asks for it starts the server.
    """
    session, folder = os.environ[SESSION].split(maxsplit=1)
    address, command, errors = (Path(folder, name) for name in ("socket", "python", "errors"))
    with suppress(FileExistsError):
        Path(folder, "started").mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {ROOT}/tests/forked.py {address} "$@"\n')
        command.chmod(0o755)
        words = [sys.executable, "-m", "tests.forked", "--serve", str(address), session]
        variables = {**os.environ, **WITHOUT_GPU, "PYTHONPATH": str(ROOT), "HF_HOME": folder, "HF_HUB_OFFLINE": "1"}
        with errors.open("w") as stderr:
            subprocess.run(words, cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, stderr=stderr, check=True)
    end = time.monotonic() + PATIENCE
    while not address.exists():
        said = errors.read_text() if errors.exists() else ""
        assert "Traceback" not in said, said
        assert time.monotonic() < end, said
        time.sleep(0.05)
    return str(command)


def run(
    launcher: list[str], program: str | Path, folder: Path, *words: str, timeout: float = 900
) -> subprocess.CompletedProcess:
    """Run a program, or the text of one, to its end; its first word is `folder`."""
    if isinstance(program, str):
        folder.mkdir(exist_ok=True)
        (folder / "script.py").write_text(program)
        program = folder / "script.py"
    command = [fast_python(), *launcher, str(program), str(folder), *words]
    return subprocess.run(
        command, env=environment(folder), capture_output=True, text=True, timeout=timeout, check=False
    )


def run_well(launcher: list[str], program: str | Path, folder: Path, *words: str, timeout: float = 900) -> None:
    """Run a program to a good end."""
    done = run(launcher, program, folder, *words, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


def tell(folder: str | Path, name: str, found: Any) -> None:
    """What this process found, for `told`. Not by print: lines that processes write to one pipe may end up in each other."""
    with Path(folder, f"told-{os.environ.get('RANK', 0)}.jsonl").open("a") as file:
        file.write(json.dumps([name, found]) + "\n")


def told(folder: Path) -> dict[tuple[int, str], Any]:
    """What each process found, by its rank and the name of what it was about."""
    return {
        (int(path.stem.removeprefix("told-")), name): found
        for path in sorted(folder.glob("told-*.jsonl"))
        for name, found in map(json.loads, path.read_text().splitlines())
    }
