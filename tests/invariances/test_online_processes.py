"""Online methods in two processes are those of one: losses, weights, metrics, and what is logged of completions."""

from __future__ import annotations

import pytest

from tests.processes import ALONE, TOGETHER, run_well, told

pytestmark = pytest.mark.slow

SCRIPT = """
import asyncio, os, sys
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator
from tests.conftest import MODELS, make_tokenizer
from tests.processes import tell
from tests.trainers.online_support import Table, even_prompts, of_length, prompts
from trl.training.collectives import gather_rows
from trl.trainers.grpo import GRPOTrainer
from trl.trainers.online_dpo import OnlineDPOTrainer
from trl.trainers.rloo import RLOOTrainer

WORLD, RANK = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
NOT_COMPARED = ("second", "runtime", "step_time", "padding_share", "flos", "num_tokens")


async def of_some(prompts, completion_ids, number, log_metric, log_extra):
    await asyncio.sleep(0.01 * RANK)
    for n in number:
        if n % 2:
            log_metric("odd", n)
            log_extra("odd", [n % 2 for n in number])
    return [None if len(ids) == 3 else len(ids) * (n + 1) for ids, n in zip(completion_ids, number, strict=True)]


def fails_where_odd(completion_ids, number):
    return [float("nan") if n % 2 and len(ids) > 2 else len(ids) for ids, n in zip(completion_ids, number, strict=True)]


def run(name, cls, reward, batch=16, evaluated=16, **options):
    torch.manual_seed(0)
    model = MODELS["llama"]()
    folder = f"{sys.argv[1]}/{name}"
    given = dict(
        output_dir=folder, use_cpu=True, per_device_train_batch_size=batch // WORLD, num_generations=4,
        max_completion_length=8, max_steps=3, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
        logging_steps=1, save_strategy="no", disable_tqdm=True, report_to=[], log_completions=True,
        num_completions_to_print=0, html_report=False)
    args = cls.config_class(**{**given, **options})
    rows = prompts(16, number=list(range(16)))
    judged = rows.select(range(evaluated))
    trainer = cls(model, reward, args, rows, judged, processing_class=make_tokenizer(), engine=Table())
    trainer.train()
    if RANK == 0:
        logs = [{k: v for k, v in log.items() if not any(word in k for word in NOT_COMPARED)}
                for log in trainer.state.log_history]
        weights = {n: p.double().sum().item() for n, p in trainer.accelerator.unwrap_model(model).named_parameters()}
        files = sorted(os.listdir(f"{folder}/completions"))
        table = pq.read_table(f"{folder}/completions/{files[0]}").to_pylist()
        rows = sorted((row["prompt"], row["completion"], round(row["advantage"], 3)) for row in table)
        tell(sys.argv[1], name, [logs, weights, files, rows])


run("several", GRPOTrainer, [of_some, of_length], reward_weights=[0.1, 1.0], scale_rewards="batch", beta=0.1,
    top_entropy_quantile=0.5, entropy_coef=0.01, loss_type="grpo")
run("steps", GRPOTrainer, of_length, batch=8, steps_per_generation=2, num_iterations=2, gradient_accumulation_steps=1,
    use_adaptive_entropy=True, entropy_target=10.0, entropy_coef_delta=0.01, loss_type="dr_grpo", max_steps=6)
run("flat", GRPOTrainer, even_prompts, zero_variance="drop", shuffle_dataset=False, max_steps=2)
run("fresh", GRPOTrainer, even_prompts, zero_variance="resample", shuffle_dataset=False, loss_type="bnpo")
run("failed", GRPOTrainer, fails_where_odd, on_reward_error="drop", loss_type="sapo", mask_truncated_completions=True)
run("rloo", RLOOTrainer, [of_some, of_length], normalize_advantages=True, missing_eos_penalty=1.0,
    shuffle_dataset=False, evaluated=13, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=16 // WORLD)
run("dpo", OnlineDPOTrainer, even_prompts, batch=4, shuffle_dataset=False, evaluated=5,  # none for the second process
    eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=16 // WORLD)

if WORLD == 2:  # any number of rows, of any width
    whole, start = gather_rows(torch.full((1 + RANK, 3 - RANK), 1.0 + RANK), Accelerator(cpu=True))
    assert (whole.tolist(), start) == ([[1, 1, 1], [2, 2, 0], [2, 2, 0]], RANK), (whole, start)
"""
KINDS = ("several", "steps", "flat", "fresh", "failed", "rloo", "dpo")


@pytest.mark.long
def test_two_processes_are_one(tmp_path):
    run_well(ALONE, SCRIPT, tmp_path / "one")
    run_well(TOGETHER, SCRIPT, tmp_path / "two")
    alone, together = told(tmp_path / "one"), told(tmp_path / "two")
    assert list(alone) == list(together) == [(0, kind) for kind in KINDS]
    for kind, (logs, weights, files, rows) in together.items():
        expected = alone[kind]
        for log, one in zip(logs, expected[0], strict=True):
            assert set(log) == set(one), kind
            assert log == pytest.approx(one, rel=1e-4, abs=1e-6), kind
        assert weights == pytest.approx(expected[1], rel=1e-5, abs=1e-6), kind
        assert files == expected[2], kind
        assert rows == expected[3], kind
