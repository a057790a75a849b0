"""Rejection-sampling fine-tuning: which samples of a prompt it takes for the same, and steps of several rollout batches."""

from __future__ import annotations

import pytest
import torch

from tests.trainers.online_support import Table, make_trainer
from trl.algorithms.rft import first_of_each
from trl.errors import EngineError
from trl.trainers.rft import RFTTrainer, prompts_and_texts
from trl.types import Completion, Example


def test_samples_that_read_alike_are_one(tokenizer):
    """Padding and an end in a completion are not seen by rewards: with them, a sample is no other one."""
    a, b, end, pad = *tokenizer.encode("ab"), tokenizer.eos_token_id, tokenizer.pad_token_id
    completions = ([a, b, end], [a, pad, b, end], [a, b], [b, a])
    example = Example([a], tuple(Completion(ids) for ids in completions))
    identity = prompts_and_texts([example, Example([b], (Completion([a, b]),))], tokenizer)
    assert identity == [(0, "ab"), (0, "ab"), (0, "ab"), (0, "ba"), (1, "ab")]
    assert first_of_each(identity, [True] * 5) == [True, False, False, True, True]


class Failing(Table):
    """An engine that is gone after so many calls."""

    def __init__(self, calls):
        super().__init__()
        self.left = calls

    def generate(self, prompts, params, n):
        if len(self.calls) == self.left:
            raise EngineError("The engine is gone.")
        return super().generate(prompts, params, n)


def test_an_engine_that_fails_within_a_step_of_several_rollout_batches(make_model, tmp_path):
    """Steps of four improvement steps, three each on the same samples: the second one has to sample for its third."""
    options = {"gradient_accumulation_steps": 4, "steps_per_generation": 1, "n_improve_steps": 3, "save_steps": 1}
    options |= {"learning_rate": 1e-2, "max_steps": 3, "logging_steps": 3, "log_completions": True}

    def run(folder, calls=None):
        engine, model = Failing(calls), make_model("llama")
        return make_trainer(
            model, tmp_path / folder, cls=RFTTrainer, engine=engine, num_completions_to_print=0, **options
        )

    def ended(trainer):
        log = trainer.state.log_history[0]
        return {name: log[name] for name in ("loss", "reward", "kept_share", "percentile", "num_tokens")}

    whole, again = run("whole"), run("parts")
    whole.train()
    with pytest.raises(EngineError, match=r"is gone.\nTraining ends after step 1, with a checkpoint in .*checkpoint-1"):
        run("parts", 2).train()
    again.train(resume_from_checkpoint="last")
    assert ended(again) == ended(whole)
    for found, expected in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected)
