"""Two processes train as one does, under every engine: losses, gradient norms and saved weights after ten steps.

Each engine is started once, by accelerate's launcher and the configuration that is shipped, and trains its cases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.processes import ALONE, run_well, under

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "train.py"
FULL = ("sft", "reward", "dpo", "kto", "grpo", "ppo", "step")
LORA = tuple(f"{name}+lora" for name in FULL)
OTHERS = ("early", "shared", "uneven", "few", "rloo", "reinforce", "online_dpo", "critic")
"""A reference computed beforehand, or that shares layers, or moves; too few rows, or prompts; value models, and epochs
cut short."""
CASES = {
    "ddp": (*FULL, "grpo+lora", "uneven", "bf16", "graphs"),
    "fsdp2": ("sft", "grpo", "step", "dpo+lora", "few"),
    "zero3": ("sft", "grpo", "ppo", "dpo+lora", "uneven"),
}
if os.environ.get("TRL_TEST_LONG"):
    CASES = {
        "ddp": (*FULL, *LORA, "bco", "early", "shared", "uneven", "t5", "bf16", "graphs", "graphs_critic"),
        "fsdp2": (*FULL, *LORA, *OTHERS, "t5"),
        "zero1": ("sft", "grpo", "step"),
        "zero2": (*FULL, "step+lora", "shared", "critic"),
        "zero3": (*FULL, *LORA, *OTHERS),
    }
EXACTNESS = {"ddp": 1e-5, "fsdp2": 1e-5, "zero1": 1e-4, "zero2": 1e-4, "zero3": 1e-4}
BF16 = 5e-3
"""Roundings of bfloat16 depend on which sequences are computed together."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_well(ALONE, PROGRAM, folder, *dict.fromkeys(case for cases in CASES.values() for case in cases))
    return folder


@pytest.fixture(scope="module")
def under_engine(tmp_path_factory) -> Callable[[str], Path]:
    @cache
    def launch(engine: str) -> Path:
        folder = tmp_path_factory.mktemp(engine)
        run_well(under(engine), PROGRAM, folder, *CASES[engine])
        return folder

    return launch


def saved(folder: Path) -> dict:
    files = sorted(folder.rglob("*.safetensors"))
    return {(str(file.relative_to(folder)), name): t for file in files for name, t in load_file(file).items()}


@pytest.mark.parametrize(("engine", "case"), [(engine, case) for engine in CASES for case in CASES[engine]])
def test_two_processes_train_as_one(engine, case, alone, under_engine):
    together, exactness = under_engine(engine), BF16 if case in ("bf16", "graphs_critic") else EXACTNESS[engine]
    one, two = (json.loads((folder / f"{case}.json").read_text()) for folder in (alone, together))
    if case == "uneven":  # steps have rows twice where there are too few, evaluation counts each once
        one = {name: values for name, values in one.items() if name.startswith("eval_")}
    assert one.pop("sampled", None) == two.pop("sampled", None)
    for name, values in one.items():
        assert two[name] == pytest.approx(values, abs=exactness, rel=exactness), name
    ours, theirs = (saved(folder / case / "model") for folder in (alone, together))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= exactness, name
    written, expected = (sorted(p.name for p in (f / case / "model").rglob("*")) for f in (together, alone))
    assert written == expected
    assert ("model.safetensors" in written) is not case.endswith("+lora")
    if not case.endswith("+lora"):
        found = AutoConfig.from_pretrained(together / case / "model").architectures[0]
        assert found.startswith("T5" if case == "t5" else "Llama")
