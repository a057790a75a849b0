"""Measure `PPOTrainer.generate` and `step` side by side with those of TRL 0.11.4, the last release that had `step`.

    python benchmarks/ppo_step.py --trl-python path/to/trl-0.11.4-env/bin/python --repeats 3

A round is what a script does with a batch of queries: sample responses of a fixed length, score them, `step`. Rounds are
timed from the queries to the end of `step`. Runs are processes of their own and take turns, as in run.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import time
from pathlib import Path
from typing import Any

import run
import synthetic
from workloads import WARMUP, Target, Workload

QUERY, RESPONSE = 32, 48
"""Tokens."""

BY_SIDE = {"ours": {"use_cpu": True, "bf16": False, "report_to": "none"}, "trl": {}}
"""Further options of the configuration: float32 on the CPU, which is TRL 0.11.4's default where there is no other device."""


def query_rows(count: int, *, seed: int) -> list[synthetic.Row]:
    """Queries of random words' token ids."""
    rng = random.Random(seed)
    return [{"ids": [rng.randrange(1_000, synthetic.VOCABULARY) for _ in range(QUERY)]} for _ in range(count)]


PPO_STEP = Workload(
    name="ppo-step",
    about="generate and step: 32 queries of 32 tokens, responses of 48, mini-batches of 8, 4 epochs",
    trainer="PPOTrainer",
    config_class="PPOConfig",
    rows=query_rows,
    rows_per_step=32,
    config={"batch_size": 32, "mini_batch_size": 8, "ppo_epochs": 4, "learning_rate": 1e-6},
    targets={"trl": Target(time=0.6)},
    same_batches=False,
)


# ---- in a worker ----


def make_trainer(side: str, directory: Path, seed: int, overrides: dict[str, Any]) -> Any:
    """`PPOTrainer` of whichever `trl` this interpreter has, on the saved policy with a fresh value head."""
    from transformers import AutoModelForCausalLM

    trl = importlib.import_module("trl")
    options = PPO_STEP.config | BY_SIDE[side] | {"seed": seed} | overrides
    base = AutoModelForCausalLM.from_pretrained(directory / PPO_STEP.material)
    model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(base)
    return trl.PPOTrainer(trl.PPOConfig(**options), model, None, synthetic.tokenizer())


def play(trainer: Any, queries: list[Any]) -> tuple[float, int]:
    """One round. Returns the seconds that sampling took, and the number of sampled tokens."""
    import torch

    started = time.perf_counter()
    options = {"do_sample": True, "top_k": 0, "min_new_tokens": RESPONSE, "max_new_tokens": RESPONSE}
    responses = trainer.generate(queries, batch_size=len(queries), return_prompt=False, pad_token_id=0, **options)
    seconds = time.perf_counter() - started
    trainer.step(queries, responses, [torch.tensor(float(ids.sum() % 7)) for ids in responses])
    return seconds, sum(map(len, responses))


def work(arguments: argparse.Namespace) -> None:
    """Play the rounds of one side and write what was measured."""
    import torch
    import worker

    recorder = worker.Recorder()
    started = time.perf_counter()
    trainer = make_trainer(arguments.side, arguments.dir, arguments.seed, arguments.options)
    recorder.prepared(trainer.model, started)
    rows = [torch.tensor(row["ids"]) for row in PPO_STEP.read_rows(arguments.dir)]
    counter = worker.Counter(pad=0)
    counter.watch(trainer.model.pretrained_model.get_input_embeddings())
    for number in range(WARMUP + arguments.steps):
        counter.clear()
        wall, processor = time.perf_counter(), time.process_time()
        generating, sampled = play(trainer, rows[number * 32 : (number + 1) * 32])
        if number >= WARMUP:
            recorder.step_seconds.append(time.perf_counter() - wall)
            recorder.cpu_seconds.append(time.process_time() - processor)
            recorder.sampling_seconds.append(generating)
            recorder.tokens.append(counter.tokens)
            recorder.positions.append(counter.positions)
            recorder.sampled.append(sampled)
    recorder.peak_mib = worker.memory_mib("VmHWM")
    arguments.out.write_text(json.dumps(recorder.result(arguments.side)))


# ---- the comparison ----


def compare(arguments: argparse.Namespace) -> None:
    """Let the sides take turns, and print the tables."""
    run.compare_sides(arguments, [PPO_STEP], synthetic.write_material, worker=Path(__file__))


def main() -> None:
    parser = run.sides_parser(__doc__, "0.11.4", [PPO_STEP.name], out="ppo_step.json")
    run.play_part(parser.parse_args(), work, compare)


if __name__ == "__main__":
    main()
