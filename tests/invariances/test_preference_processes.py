"""Two processes train as one does: losses, gradients, metrics and statistics of a window are those of all processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import json, os, sys
import torch
from tests.invariances.test_preference_invariance import classifier, labelled, margins, pairs
from tests.conftest import MODELS, make_tokenizer
from trl.trainers.dpo import DPOTrainer
from trl.trainers.kto import KTOTrainer
from trl.trainers.reward import RewardTrainer

SHOWN = ("loss", "grad_norm", "kl", "delta", "rewards/margins", "margin", "min_reward", "max_reward", "num_tokens")
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def language_model(seed):
    torch.manual_seed(seed)
    return MODELS["llama"]()


def run(kind, rows, model, ref_model=None, **options):
    args = kind.config_class(
        output_dir=sys.argv[1], use_cpu=True, per_device_train_batch_size=8 // WORLD, num_train_epochs=2, optim="sgd",
        learning_rate=0.1, max_grad_norm=0.0, logging_steps=1, save_strategy="no", disable_tqdm=True, **options)
    given = {} if ref_model is None else {"ref_model": ref_model}
    trainer = kind(model, args=args, train_dataset=rows, eval_dataset=rows, tokenizer=make_tokenizer(), **given)
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        logs = [{k: v for k, v in log.items() if k.removeprefix("eval_") in SHOWN} for log in trainer.state.log_history]
        print("FOUND", json.dumps(logs))


run(DPOTrainer, pairs(), language_model(0), language_model(1))
run(DPOTrainer, pairs(), language_model(0), precompute_ref_log_probs=True)
run(KTOTrainer, labelled(), language_model(0), language_model(1))
run(KTOTrainer, labelled(), language_model(0), language_model(1), loss_type="bco")
run(RewardTrainer, margins(), classifier(None))
"""


def found(launcher: list[str], folder: Path) -> list[list[dict[str, float]]]:
    script = folder / "train.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "home"),
        "HOME": str(folder),
    }
    command = [*launcher, str(script), str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line.removeprefix("FOUND ")) for line in done.stdout.splitlines() if line.startswith("FOUND ")]


def test_two_processes_are_one(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    alone = found([sys.executable], tmp_path / "one")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = found(launcher, tmp_path / "two")
    assert len(alone) == len(together) == 5
    for one, two in zip(alone, together, strict=True):
        assert one[0]["loss"] > 0
        for a, b in zip(one, two, strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
