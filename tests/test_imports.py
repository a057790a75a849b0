"""Imports point down only, `algorithms` and `ops` need torch alone, and `import trl` loads nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from trl.compat.names import REMOVED

ROOT = Path(__file__).parent.parent / "trl"
LEVELS = [
    {
        "errors",
        "types",
        "imports",
        "lazy",
        "compat",
        "transfer",
        "option_types",
        "option_bounds",
        "option_names",
        "hub",
    },
    {"ops"},
    {"algorithms"},
    {"vision", "label"},
    {"data"},
    {"models"},
    {"rollouts", "rewards", "training", "report", "diffusion", "label"},
    {"callbacks"},
    {"trainers"},
    {"classic", "core", "demo", "evaluation", "sweep"},
    {"cli", "__main__"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}
TORCH_ONLY = ("ops", "algorithms")
HEAVY = ("transformers", "datasets", "accelerate", "peft", "rich")


def imported(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file):
    package = file.relative_to(ROOT).parts[0].removesuffix(".py")
    if package == "__init__":
        return
    for name in imported(file):
        parts = name.split(".")
        assert parts[0] != "trlx", f"{file} imports {name}: trlx is a front of trl, which knows nothing of it"
        if parts[0] == "trl" and len(parts) > 1 and parts[1] in LEVEL:
            assert LEVEL[parts[1]] <= LEVEL[package], f"{file} imports {name}, which lies above it"
        if package in TORCH_ONLY:
            assert parts[0] not in HEAVY, f"{file} imports {name}: {package} needs torch alone"


def test_no_file_is_part_of_a_cycle():
    """Imports for type checkers alone included."""
    modules = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in FILES}
    graph = {
        name: {other for other in imported(file) if other in modules and other != name}
        for name, file in modules.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


BROUGHT = {
    "markupsafe",
    "numpy",
    "pandas",
    "psutil",
    "pyarrow",
    "referencing",
    "safetensors",
    "tokenizers",
    "tqdm",
    "yaml",
}
"""What declared dependencies need themselves."""
OF_EXTRAS = {
    "starlette": {"cli/serve/app.py", "cli/serve/streaming.py", "label/server.py"},
    "uvicorn": {"label/server.py"},
    "triton": {
        "ops/triton_gate.py",
        "ops/triton_head.py",
        "ops/triton_rotary.py",
        "rollouts/fused.py",
        "rollouts/triton_decode.py",
    },
}
"""Files that are imported only once what they need is known to be there."""


def test_what_a_file_imports_at_its_top_is_installed_with_trl():
    """In an environment that has no extras, such as that of `pip install -e .`."""
    declared = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    names = {re.split(r"[>=\[]", each)[0] for each in declared}
    there = {"PIL" if name == "pillow" else name for name in names} | BROUGHT | set(sys.stdlib_module_names) | {"trl"}
    for file in FILES:
        if "sandbox/inside" in file.as_posix():
            continue  # read by a process of its own
        inside = file.relative_to(ROOT).as_posix()
        for node in ast.parse(file.read_text()).body:
            found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for top in {name.split(".")[0] for name in found} - there:
                assert inside in OF_EXTRAS.get(top, ()), (
                    f"{inside} imports {top}, which pyproject.toml does not require"
                )


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def names_bound(target: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_comprehension_hides_a_name_of_its_module(file):
    """Python 3.12 runs comprehensions in the function around them, where such a name can be found unbound."""
    tree, bound = ast.parse(file.read_text()), set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound = bound.union(*map(names_bound, targets))
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            hidden = bound & set().union(*(names_bound(generator.target) for generator in node.generators))
            assert not hidden, f"{file}, line {node.lineno}: the variable {hidden} has the name of something above"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_trl_is_lazy():
    assert not loaded_after("import trl") & {"torch", "numpy", *HEAVY}


def test_the_process_of_a_reward_function_starts_without_torch():
    assert not loaded_after("import trl.rewards.worker") & {"torch", "numpy", *HEAVY}


def test_algorithms_load_without_transformers():
    found = loaded_after("import trl.algorithms.sft, trl.algorithms.dpo, trl.algorithms.kto, trl.algorithms.reward")
    assert "torch" in found
    assert not found & set(HEAVY)


def test_every_public_name_loads():
    import trl.rewards

    for package in (trl, trl.rewards):
        for name in package.__all__:
            assert getattr(package, name) is not None


def test_a_misspelt_name_gets_a_suggestion():
    import trl

    with pytest.raises(AttributeError, match="no attribute 'SFTTrianer'. Did you mean 'SFTTrainer'"):
        trl.SFTTrianer  # noqa: B018


@pytest.mark.parametrize("path", ["trl.trainer", "trl.trainer.sft_trainer", "trl.models", "trl.models.utils"])
def test_import_paths_of_other_releases_lead_to_trl(path):
    from trl import CPOTrainer

    assert importlib.import_module(path).CPOTrainer is CPOTrainer


def test_a_name_of_another_release_says_what_to_do():
    with pytest.raises(ImportError, match=r"trl.GKDTrainer is of another release .*`advantages` and `loss`"):
        from trl.experimental.gkd import GKDTrainer  # noqa: F401
    with pytest.raises(
        ImportError, match=r"trl.GMPOConfig .* use `GRPOTrainer` with `GRPOConfig\(loss_type=\"gmpo\"\)`"
    ):
        from trl import GMPOConfig  # noqa: F401


PROBES = [
    ("trl", "GKDTrainer"),
    ("trl.core", "PPODecorators"),
    ("trl.models", "PreTrainedModelWrapper"),
    ("trl.data_utils", "anything"),
    ("trl.mergekit_utils", "MergeConfig"),
    ("trl.models.modeling_sd_base", "anything"),
    ("trl.trainer", "utilities"),
    ("trl.trainer.utils", "_ChunkedLogProbFunction"),
    ("trl.trainer.sft_trainer", "unwrap_model_for_generation"),
    ("trl.experimental.gkd", "GKDTrainer"),
]


@pytest.mark.parametrize(("path", "name"), PROBES)
def test_who_looks_for_a_name_is_told_that_there_is_none(path, name):
    """As `import unsloth` looks; who imports it by name gets the words."""
    assert not hasattr(importlib.import_module(path), name)
    with pytest.raises(ImportError):
        exec(f"from {path} import {name}")
    with pytest.raises(ImportError):
        importlib.import_module(f"{path}.{name}")


def test_an_old_path_says_what_it_does_not_have():
    from trl.trainer import ppo_trainer

    assert ppo_trainer.__name__ == "trl.trainer.ppo_trainer"
    with pytest.raises(
        ImportError, match=r"trl.trainer.utils is a path of other .* called 'SFTTrianer'. Did you mean 'SFTT"
    ):
        from trl.trainer.utils import SFTTrianer  # noqa: F401
    with pytest.raises(ImportError, match="trl.core is a path of other .* called 'WANDB_PADDING'"):
        from trl.core import WANDB_PADDING  # noqa: F401
    with pytest.raises(ImportError, match="nothing here is called 'pad_to_length'"):
        from trl.trainer.utils import pad_to_length  # noqa: F401


def test_no_name_is_both_here_and_elsewhere():
    import trl

    assert not set(trl.__all__) & set(REMOVED)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("trl.nonsense")
