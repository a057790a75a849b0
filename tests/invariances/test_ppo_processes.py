"""PPO steps in two processes are those of one: weights, statistics and the KL coefficient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
import torch
from tests.conftest import MODELS, make_tokenizer
from trl.models.heads import with_value_head
from trl.trainers.ppo import PPOConfig, PPOTrainer

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
torch.manual_seed(0)
model, reference = with_value_head(MODELS["llama"]()), MODELS["llama"]()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
options = {"output_dir": sys.argv[1], "use_cpu": True, "batch_size": 8 // WORLD, "ppo_epochs": 2, "horizon": 50}
options |= {"use_score_scaling": True}
trainer = PPOTrainer(PPOConfig(**options), model, reference, make_tokenizer(), optimizer=optimizer)
torch.manual_seed(1)
queries = [torch.randint(3, 99, (2 + i % 3,)) for i in range(8)]
responses = [torch.randint(3, 99, (1 + i,)) for i in range(8)]
scores = torch.randn(8).tolist()
mine = slice(RANK * 8 // WORLD, (RANK + 1) * 8 // WORLD)
for _ in range(2):
    found = trainer.step(queries[mine], responses[mine], scores[mine])
if RANK == 0:
    names = ("ppo/loss/total", "ppo/policy/approxkl", "ppo/mean_scores", "objective/kl", "objective/kl_coef")
    weights = sum(p.detach().abs().sum() for p in model.parameters()).item()
    print("FOUND", json.dumps([found[name] for name in names] + [weights, trainer.algorithm.controller.coefficient]))
"""


def found(launcher: list[str], folder: Path) -> list[float]:
    folder.mkdir()
    script = folder / "train.py"
    script.write_text(SCRIPT)
    environment = {
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
    }
    command = [*launcher, str(script), str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=os.getcwd())
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


def test_two_processes_step_as_one(tmp_path):
    alone = found([sys.executable], tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert found(launcher, tmp_path / "two") == pytest.approx(alone, rel=1e-4, abs=1e-6)
