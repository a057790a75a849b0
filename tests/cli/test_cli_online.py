"""`trl grpo`, `trl rloo` and `trl online-dpo`, each in a process of its own: from a file, and from flags."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow

FILE = """
model_name_or_path: ./tiny
dataset_name: prompts.jsonl
reward_funcs:
  - accuracy_reward
  - get_length_reward(target=4)
reward_weights: [1.0, 0.1]
loss_type: dr_grpo
epsilon_high: 0.28
scale_rewards: false
use_adaptive_entropy: true
num_generations: 4
per_device_train_batch_size: 8
max_completion_length: 6
max_steps: 2
logging_steps: 1
log_completions: true
num_completions_to_print: 1
use_cpu: true
report_to: none
output_dir: by-file
"""
SHARED = (
    "--model_name_or_path tiny --dataset_name prompts.jsonl --max_completion_length 6 --max_steps 1 --logging_steps 1 "
    "--use_cpu --report_to none --save_strategy no"
)
COMMANDS = {
    "grpo": "grpo --config grpo.yaml --max_steps 1",
    "rloo": f"rloo {SHARED} --output_dir by-rloo --per_device_train_batch_size 4 --num_generations 2 --beta 0.01 "
    "--reward_funcs my_rewards:short",
    "online-dpo": f"online-dpo {SHARED} --output_dir by-online-dpo --per_device_train_batch_size 2 --beta 0.2 0.1 "
    "--reward_funcs ./my_rewards.py:of_answer",
    "unknown": f"grpo {SHARED} --reward_funcs acuracy_reward",
    "column": f"grpo {SHARED} --per_device_train_batch_size 8 --reward_funcs my_rewards.py:of_solutions",
    "fails": f"grpo {SHARED} --per_device_train_batch_size 8 --reward_funcs my_rewards.py:fails --output_dir fails",
}
REWARDS = """
def short(completions, **_):
    return [-len(c) for c in completions]

async def of_answer(completions, solution):
    return [float(s in c) - len(c) / 100 for c, s in zip(completions, solution)]

def of_solutions(completions, solutions):
    return [0.0] * len(completions)

def fails(completions):
    return [1 / 0 for _ in completions]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, dict[str, tuple[int, str, str]]]:
    """The folder, and of every command its status, output and messages."""
    from tests.conftest import MODELS, make_tokenizer

    folder = tmp_path_factory.mktemp("online")
    MODELS["llama"]().save_pretrained(folder / "tiny")
    make_tokenizer().save_pretrained(folder / "tiny")
    rows = [{"prompt": f"What is {i} + 1? ", "solution": str(i + 1)} for i in range(8)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "grpo.yaml").write_text(FILE)
    (folder / "my_rewards.py").write_text(REWARDS)
    # The installed command, which does not search the current folder for modules as `python -m` does.
    command = [str(Path(sys.executable).with_name("trl"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found = {}
    for pair in (("grpo", "rloo"), ("online-dpo", "unknown"), ("column", "fails")):
        processes = {
            name: subprocess.Popen(
                [*command, *COMMANDS[name].split()],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in pair
        }
        for name, process in processes.items():
            out, err = process.communicate(timeout=200)
            found[name] = (process.returncode, out, err)
    return folder, found


@pytest.mark.parametrize(
    ("name", "folder"), [("grpo", "by-file"), ("rloo", "by-rloo"), ("online-dpo", "by-online-dpo")]
)
def test_it_trains(runs, name, folder):
    where, found = runs
    status, out, err = found[name]
    assert status == 0, err
    assert "'reward'" in out
    assert (where / folder / "model.safetensors").is_file()


def test_options_and_rewards_of_a_file(runs):
    where, found = runs
    out = found["grpo"][1]
    for name in ("rewards/accuracy_reward/mean", "rewards/length_reward/mean", "entropy_coef", "sampling/masked_share"):
        assert f"'{name}'" in out
    table = pq.read_table(where / "by-file" / "completions" / "completions_00001.parquet").to_pylist()
    assert len(table) == 8
    assert {"accuracy_reward", "length_reward", "advantage"} <= set(table[0])


def test_options_of_flags(runs):
    assert "'rewards/short/mean'" in runs[1]["rloo"][1]
    assert "'rewards/of_answer/mean'" in runs[1]["online-dpo"][1]
    assert "'rewards/margins'" in runs[1]["online-dpo"][1]


def test_what_is_wrong_with_rewards_is_one_message(runs):
    _, found = runs
    messages = {
        "unknown": "Unknown reward function 'acuracy_reward'. Did you mean 'accuracy_reward'",
        "column": "'of_solutions' asks for 'solutions', which is no column of the dataset. Did you mean 'solution'",
        "fails": "Reward function 'fails' raised ZeroDivisionError: division by zero. Sample 0 of 8",
    }
    for name, words in messages.items():
        status, _, err = found[name]
        assert status == 2, err
        assert f"trl: error: {words}" in err or ("trl: error: " in err and words in err)
        assert "Traceback" not in err
