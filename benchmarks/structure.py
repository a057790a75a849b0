"""How the package is built, in figures: what has to be read to follow a step, lengths, imports, shapes in docstrings.

    python benchmarks/structure.py                        print the figures
    python benchmarks/structure.py --out structure.json   and write them down

Every trainer runs on a tiny model, and each function of the package that it enters is noted: the runs of `parity_cases.py`,
without the trainer's construction. "run" is a run of one optimizer step, from the call of `train` (or `step`) to its end: its
start, a rollout, the step, its log, what is written at the end. "step" is an optimizer step in the middle of a run, one that is not
logged, on what was sampled before it. The rest is read from the source, which is never imported for it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import re
import statistics
import sys
import tempfile
import threading
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "trl"
MATHEMATICS = ("ops", "algorithms")
"""Folders whose public functions say the shapes of their tensors."""

SHAPE = re.compile(r"\[(?:…,?\s?|\.\.\.,?\s?)?[A-Z0-9][A-Z0-9a-z_+·*]*(?:,\s?[A-Z0-9…][A-Z0-9a-z_+·*]*)*\]|\bscalar\b")
"""`[N]`, `[N,C]`, `[…,V]`, `[B,T+1]`; or "scalar"."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


# ---- what a step runs through ----


@dataclass
class Touched:
    """Functions of the package that were entered, as (file, qualified name)."""

    functions: set[tuple[str, str]]

    def enter(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(str(PACKAGE)):
            file = str(Path(frame.f_code.co_filename).relative_to(ROOT))
            self.functions.add((file, frame.f_code.co_qualname))

    def figures(self) -> dict[str, Any]:
        imports = ("<module>", "LegacyImportFinder", "_is_old")  # which Python runs whenever something is imported
        names = {name for name in self.functions if not name[1].startswith(imports)}
        files = sorted({file for file, _ in names})
        return {"files": len(files), "functions": len(names), "read": files}


@contextlib.contextmanager
def watching() -> Iterator[Touched]:
    """Note the functions that are entered, in every thread that is started meanwhile."""
    touched = Touched(set())
    threading.setprofile(touched.enter)
    sys.setprofile(touched.enter)
    try:
        yield touched
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def run_of_one_step(case: Any, folder: Path) -> dict[str, Any]:
    """What a run of one optimizer step goes through."""
    import parity_cases

    for _ in range(2):  # the first time, modules are imported, which is no part of it
        trainer = parity_cases.make_trainer(case.changed(options={"max_steps": 1}), folder)
        with watching() as touched:
            if case.rows is None:
                trainer.step(*parity_cases.triplets(trainer.args.batch_size))
            else:
                trainer.train()
    return touched.figures()


def step_within(case: Any, folder: Path) -> dict[str, Any]:
    """What the second optimizer step of a run goes through: from the end of the first to its own."""
    import parity_cases
    from transformers import TrainerCallback

    trainer = parity_cases.make_trainer(case.changed(options={"max_steps": 2, "logging_steps": 10}), folder)
    if case.rows is None:
        trainer.step(*parity_cases.triplets(trainer.args.batch_size))
        with watching() as touched:
            trainer.step(*parity_cases.triplets(trainer.args.batch_size))
        return touched.figures()
    with contextlib.ExitStack() as stack:
        watched: list[Touched] = []

        class Watch(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                stack.close() if watched else watched.append(stack.enter_context(watching()))

        trainer.add_callback(Watch())
        trainer.train()
    return watched[0].figures()


def steps() -> dict[str, Any]:
    """Figures of every trainer, of a run of one step ("files", "functions", "read") and of a "step" within one."""
    import parity_cases

    found = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name, case in parity_cases.MAIN.items():
            found[name] = run_of_one_step(case, Path(folder)) | {"step": step_within(case, Path(folder))}
    return found


# ---- what the source says ----


def sources() -> dict[str, ast.Module]:
    """Every file of the package, parsed, by its path from the repository's root."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def functions_of(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Every function with its qualified name, those inside of others too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function | ast.ClassDef):
            name = f"{prefix}{node.name}"
            if isinstance(node, Function):
                yield name, node
            yield from functions_of(node, f"{name}.")
        else:
            yield from functions_of(node, prefix)


def lengths(files: Mapping[str, ast.Module]) -> dict[str, Any]:
    """Lines of functions, from `def` to the last line, docstring included."""
    found = [
        (node.end_lineno - node.lineno + 1, f"{file}: {name}")
        for file, tree in files.items()
        for name, node in functions_of(tree)
    ]
    counts = [count for count, _ in found]
    return {
        "functions": len(counts),
        "median": statistics.median(counts),
        "90th percentile": statistics.quantiles(counts, n=10)[-1],
        "longest": max(counts),
        "over 40": sorted(f"{name} ({count})" for count, name in found if count > 40),
    }


def code_lines(path: Path, tree: ast.Module) -> int:
    """Lines that hold code: neither blank nor only comment or docstring."""
    with path.open("rb") as file:
        skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
        tokens = [t for t in tokenize.tokenize(file.readline) if t.type not in skipped and t.type != tokenize.ENDMARKER]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    texts = (node for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    return len(lines - {line for node in texts for line in range(node.lineno, node.end_lineno + 1)})


def folders(files: Mapping[str, ast.Module]) -> dict[str, dict[str, int]]:
    """Files, lines, and lines of code by folder; `trl` itself is the files beside the folders."""
    found: dict[str, dict[str, int]] = {}
    for file, tree in files.items():
        path = ROOT / file
        parts = Path(file).parts
        counts = {"files": 1, "lines": len(path.read_text().splitlines()), "code": code_lines(path, tree)}
        for name in ("/".join(parts[:2]) if len(parts) > 2 else "trl", "total"):
            sums = found.setdefault(name, dict.fromkeys(counts, 0))
            for key, count in counts.items():
                sums[key] += count
    return found


def imports_of(file: str, tree: ast.Module, files: Mapping[str, ast.Module]) -> set[str]:
    """Files of the package that a file imports anywhere: at its top, for type checkers, or inside of functions."""

    def file_of(module: str) -> str | None:
        base = module.replace(".", "/")
        return next((name for name in (f"{base}.py", f"{base}/__init__.py") if name in files), None)

    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wanted |= {file_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = Path(file).parts[: -node.level or None] if node.level else ()
            module = ".".join((*above, *(node.module or "").split("."))).strip(".")
            wanted |= {file_of(f"{module}.{alias.name}") or file_of(module) for alias in node.names}
    return {name for name in wanted if name not in (None, file)}


def cycles(files: Mapping[str, ast.Module]) -> list[list[str]]:
    """Sets of files that import one another, directly or around."""
    graph = {file: imports_of(file, tree, files) for file, tree in files.items()}

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for name in graph[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {file: reached(file) for file in graph}
    rings = {
        tuple(sorted(other for other in reach[file] if file in reach[other])) for file in graph if file in reach[file]
    }
    return sorted(list(ring) for ring in rings)


def _public(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    """Public functions of a file and public methods of its public classes; none that is only a property."""
    for name, node in functions_of(tree):
        nested = any(name.startswith(f"{outer}.") for outer, _ in functions_of(tree) if outer != name)
        if not nested and not any(part.startswith("_") for part in name.split(".")):
            yield name, node


def _takes_tensors(node: Function) -> bool:
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    hints = [argument.annotation for argument in given] + [node.returns]
    return any("Tensor" in ast.unparse(hint) for hint in hints if hint is not None)


def _is_checked(node: Function) -> bool:
    return any(ast.unparse(decorator).startswith("shapes(") for decorator in node.decorator_list)


def without_shapes(files: Mapping[str, ast.Module]) -> list[str]:
    """Public functions of `MATHEMATICS` that take or give tensors, and declare no shape: by `@shapes`, or in the docstring."""
    return [
        f"{file}: {name}"
        for file, tree in files.items()
        if Path(file).parts[1] in MATHEMATICS
        for name, node in _public(tree)
        if _takes_tensors(node) and not SHAPE.search(ast.get_docstring(node) or "") and not _is_checked(node)
    ]


def measure() -> dict[str, Any]:
    """All figures."""
    files = sources()
    rings, silent = cycles(files), without_shapes(files)
    return {
        "steps": steps(),
        "folders": folders(files),
        "lengths": lengths(files),
        "cycles": rings,
        "without shapes": silent,
    }


# ---- output ----


def show(found: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """The figures as tables."""
    say(f"{'':22}{'a run of one step':>22}{'a step':>22}")
    for name, run in found["steps"].items():
        cells = (f"{each['files']} files, {each['functions']}" for each in (run, run["step"]))
        say("".join([f"{name:22}", *(f"{cell:>22}" for cell in cells)]))
    say(f"\n{'folder':22}{'files':>8}{'lines':>12}{'code':>10}")
    for name, counts in found["folders"].items():
        say(f"{name:22}{counts['files']:8}{counts['lines']:12,}{counts['code']:10,}")
    each = found["lengths"]
    say(
        f"\n{each['functions']:,} functions: median {each['median']:g} lines, 90 % under {each['90th percentile']:g}, "
        f"longest {each['longest']}"
    )
    for title, lines in (
        ("functions over 40 lines", each["over 40"]),
        ("cycles of files", [", ".join(ring) for ring in found["cycles"]]),
        ("public functions of ops/ and algorithms/ without shapes", found["without shapes"]),
    ):
        say("\n".join([f"{len(lines)} {title}", *(f"    {line}" for line in lines)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this file as JSON")
    given = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    found = measure()
    show(found)
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
