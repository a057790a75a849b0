"""Does the library run on the releases of its neighbours that it says it takes? One environment each, and a part of the tests.

    make lowest, make newest, make quantised             what is tried with every commit: about a minute each
    make releases                                        all of the matrix; some minutes each
    python benchmarks/releases.py 5.10.1 lowest          one of them: transformers 5.10.1, the others at their lower bounds
    python benchmarks/releases.py 5.10.1 lowest images   and there the tests of one group alone

An environment of the matrix has one release of transformers, and peft, datasets and accelerate either at the lower bounds of
pyproject.toml or as new as can be had; torch and the rest are those that this program runs with. The tests are those that a release
of a neighbour is likeliest to break: sampling and its cache, scoring, loading, adapters, images, reading of rows, and steps of the
trainers. What ran goes into results/releases.json and into the table of docs/releases.md.

With every commit a choice of those tests runs twice (`EVERY_COMMIT`): with everything but torch at the lower bounds of
pyproject.toml, and with the newest transformers and the rest as in constraints.txt. A third environment is that of constraints.txt
with bitsandbytes, which every program that imports peft would import too.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from site import getsitepackages
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "releases.json"
PAGE = ROOT / "docs" / "releases.md"
NEIGHBOURS = ("peft", "datasets", "accelerate")


def lower_bounds() -> dict[str, str]:
    """The lowest releases that pyproject.toml takes, by name."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return dict(each.split(">=") for each in needed)


TRANSFORMERS = (lower_bounds()["transformers"], "5.17.0", "5.23.0", "5.24.0")
"""The lowest first, the newest last."""
TESTS = {
    "sampling": ("tests/rollouts/test_rollouts_local.py",),
    "models": (
        "tests/models/test_models_score.py",
        "tests/models/test_models_load.py",
        "tests/models/test_models_adapters.py",
    ),
    "images": ("tests/vision/test_vision_encoding.py", "tests/vision/test_vision_sampling.py"),
    "rows": ("tests/data/test_data_encode.py", "tests/data/test_data_formats.py", "tests/data/test_data_mixture.py"),
    "trainers": ("tests/trainers/test_trainers_habits.py", "tests/trainers/test_trainers_parts.py"),
}
"""Test files by what they are of; each group is a run of pytest."""
LOCAL = "tests/rollouts/test_rollouts_local.py"
EVERY_COMMIT = {
    "sampling, the argument that carries the cache": (
        f"{LOCAL}::test_the_path_is_the_one_meant_for_the_architecture",
        f"{LOCAL}::test_greedy_is_generate_token_by_token",
        f"{LOCAL}::test_logprobs_are_those_of_score",
        f"{LOCAL}::test_adapters_are_sampled_from_and_can_be_switched_off",
        f"{LOCAL}::test_the_model_is_left_as_it_was",
        "tests/rollouts/test_rollouts_static.py::test_greedy_is_generate_token_by_token",
        "tests/models/test_models_heads.py::test_the_cache_comes_with_the_outputs_where_asked_for",
    ),
    "masks by type of layer, layouts": (
        "tests/models/test_models_attention.py",
        "tests/models/test_models_score.py::test_only_layouts_with_the_same_numbers_are_allowed",
        "tests/models/test_models_score.py::test_gradients_equal_those_of_labels",
    ),
    "loading, adapters, names in files": (
        "tests/models/test_models_load.py",
        "tests/models/test_models_adapters.py::test_a_folder_of_an_adapter_is_a_model",
        "tests/models/test_models_adapters.py::test_new_tokens_train_with_an_adapter_and_load_again",
        "tests/models/test_models_adapters.py::test_merging_changes_nothing_but_the_precision",
        "tests/models/test_models_heads.py::test_what_was_saved_comes_back",
        "tests/stops/test_stops_renamed.py",
    ),
    "images": (
        "tests/vision/test_vision_sampling.py::test_greedy_samples_are_those_of_generate",
        "tests/vision/test_vision_encoding.py::test_every_form_is_the_same_row",
    ),
    "rows": ("tests/data/test_data_mixture.py", "tests/data/test_data_formats.py"),
    "trainers, resuming": (
        "tests/trainers/test_trainers_habits.py",
        *(
            f"tests/stops/test_stops_resume.py::test_a_run_in_parts_is_the_whole_run[{name}]"
            for name in ("sft, packed", "sft, a stream", "reward", "dpo, an adapter", "kto", "grpo", "ppo")
        ),
    ),
    "command line": (
        "tests/cli/test_cli_parser.py",
        "tests/cli/test_cli_options.py",
        "tests/cli/test_cli_main.py::test_flags_train_an_adapter",
    ),
}
"""Tests that both environments of every commit run, by what they are of."""
QUANTISED = ("tests/models/test_models_quantised.py", "tests/cli/test_cli_train.py", "-k", "quantised")
NOT_RUN = ("tests/models/test_models_adapters.py::test_commands_take_the_folder_of_an_adapter",)
"""Programs of half a minute."""
OPTIONS = ["-p", "no:cacheprovider", "-o", "addopts=--strict-markers", "-W", "default", "--disable-warnings", "-rfE"]
"""Warnings are no errors here: every release has its own."""
PLACE = {
    "cwd": ROOT,
    "env": {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
}


def pins(age: str) -> list[str]:
    """The neighbours as pip is asked for them; `age` is "lowest" or "newest"."""
    lowest = lower_bounds()
    return [f"{name}=={lowest[name]}" for name in NEIGHBOURS] if age == "lowest" else list(NEIGHBOURS)


def environment(folder: str, packages: Sequence[str]) -> str:
    """Make an environment with these packages; returns its Python. All others are those of the environment that this program runs in."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = str(Path(folder, "bin", "python"))
    (site,) = Path(folder, "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text("\n".join(getsitepackages()) + "\n")
    quietly = ["--quiet", "--disable-pip-version-check", "--no-compile", "--upgrade"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", *quietly, *packages],
        capture_output=True,
        text=True,
    )
    if (
        done.returncode
    ):  # where it succeeds, it tells of packages that no test of these needs and that ask for newer ones
        raise SystemExit(done.stderr)
    return python


def every_commit(name: str) -> int:
    """Run what is tried with every commit in the "lowest", "newest" or "quantised" environment; returns the status of pytest."""
    packages = {
        "lowest": [f"{package}=={release}" for package, release in lower_bounds().items() if package != "torch"],
        "newest": [f"transformers=={TRANSFORMERS[-1]}"],
        "quantised": ["-c", str(ROOT / "constraints.txt"), "bitsandbytes"],
    }
    with TemporaryDirectory() as folder:
        python = environment(folder, packages[name])
        print(", ".join(f"{package} {release}" for package, release in versions(python).items()), flush=True)
        tests = [test for group in EVERY_COMMIT.values() for test in group]
        command = [python, "-m", "pytest", *QUANTISED] if name == "quantised" else pytest_command(python, tests)
        return subprocess.run(command, **PLACE).returncode


def tried(transformers: str, age: str, *only: str) -> dict[str, Any]:
    """Versions of an environment, and how many tests of each group (of these `only`) passed, failed and were skipped there."""
    with TemporaryDirectory() as folder:
        python = environment(folder, [f"transformers=={transformers}", *pins(age)])
        groups = {name: counts(pytest(python, files)) for name, files in TESTS.items() if name in (only or TESTS)}
        return {"transformers": transformers, "age": age, "versions": versions(python), "groups": groups}


def pytest_command(python: str, tests: Sequence[str]) -> list[str]:
    return [python, "-m", "pytest", *OPTIONS, *tests, *(f"--deselect={test}" for test in NOT_RUN)]


def pytest(python: str, files: Sequence[str]) -> str:
    """What pytest says of these files in an environment."""
    done = subprocess.run(pytest_command(python, files), capture_output=True, text=True, **PLACE)
    print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    return done.stdout


def versions(python: str) -> dict[str, str]:
    program = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    names = ["torch", "transformers", *NEIGHBOURS, "tokenizers", "huggingface_hub"]
    return json.loads(subprocess.check_output([python, "-c", program, *names], text=True))


def counts(output: str) -> dict[str, Any]:
    """Numbers of the last line of pytest, and the tests that failed."""
    last = output.strip().splitlines()[-1]
    found = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return {**found, "not_passed": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)}


def total(result: Mapping[str, Any], *outcomes: str) -> int:
    """How many tests of an environment had one of these outcomes."""
    return sum(group.get(outcome, 0) for group in result["groups"].values() for outcome in outcomes)


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as the table of the page."""
    names = ["transformers", *NEIGHBOURS]
    lines = [f"| {' | '.join([*names, *TESTS])} |", "|---" * (len(names) + len(TESTS)) + "|"]
    for each in sorted(results, key=lambda r: ([int(n) for n in r["transformers"].split(".")], r["age"])):
        cells = [each["versions"][name] for name in names] + [cell(each["groups"].get(name, {})) for name in TESTS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(group: Mapping[str, Any]) -> str:
    """How many tests passed, and what else there was; empty for a group that did not run."""
    numbers = {name: group[name] for name in ("passed", "failed", "error", "skipped") if group.get(name)}
    return ", ".join(str(number) if name == "passed" else f"{number} {name}" for name, number in numbers.items())


def keep(result: Mapping[str, Any]) -> None:
    """Write a result down beside earlier ones of the same versions, in place of the same groups, and all of them into the page."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = (result["transformers"], result["age"])
    earlier = [each for each in before if (each["transformers"], each["age"]) == same]
    alike = [each["groups"] for each in earlier if each["versions"] == result["versions"]]
    groups = {name: group for each in [*alike, result["groups"]] for name, group in each.items()}
    results = [each for each in before if each not in earlier] + [{**result, "groups": groups}]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"\| transformers \|.*?\n(?=\n)", lambda _: table(results) + "\n", page, flags=re.DOTALL))


def main(words: Sequence[str]) -> int:
    """Try one environment, or all of the matrix; returns 1 where a test failed."""
    if words in (["lowest"], ["newest"], ["quantised"]):
        return every_commit(*words)
    runs = [tuple(words)] if words else [(release, age) for release in TRANSFORMERS for age in ("lowest", "newest")]
    failed = 0
    for run in runs:
        keep(result := tried(*run))
        failed += total(result, "failed", "error") or not total(result, "passed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
