"""Two processes train as one does, under every engine: losses, gradient norms and saved weights after ten steps.

Each engine is started once, by accelerate's launcher and the configuration that is shipped, and trains all cases.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.processes import ALONE, run_well, under

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "train.py"
METHODS = ("sft", "reward", "dpo", "kto", "grpo", "ppo", "step")
CASES = [*METHODS, "bco", "early", "shared", "uneven", *(f"{name}+lora" for name in METHODS)]
EXACTNESS = {"ddp": 1e-5, "fsdp2": 1e-5, "zero2": 1e-4, "zero3": 1e-4}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_well(ALONE, PROGRAM, folder, *CASES)
    return folder


@pytest.fixture(scope="module", params=EXACTNESS)
def engine(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def together(engine, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(engine)
    run_well(under(engine), PROGRAM, folder, *CASES)
    return folder


def saved(folder: Path) -> dict:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(case, alone, together, engine):
    one, two = (json.loads((folder / f"{case}.json").read_text()) for folder in (alone, together))
    if case == "uneven":  # steps have rows twice where there are too few, evaluation counts each once
        one = {name: values for name, values in one.items() if name.startswith("eval_")}
    exactness = EXACTNESS[engine]
    assert one.pop("sampled", None) == two.pop("sampled", None)
    for name, values in one.items():
        assert two[name] == pytest.approx(values, abs=exactness, rel=exactness), name
    ours, theirs = (saved(folder / case / "model") for folder in (alone, together))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() <= exactness, name
    written = {path.name for path in (together / case / "model").iterdir()}
    assert written == {path.name for path in (alone / case / "model").iterdir()}
    assert ("model.safetensors" in written) is not case.endswith("+lora")
    if not case.endswith("+lora"):
        assert AutoConfig.from_pretrained(together / case / "model").architectures[0].startswith("Llama")
