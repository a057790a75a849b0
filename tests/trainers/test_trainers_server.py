"""Trainers whose samples come from a server, or from a function of the user's."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.conftest import make_tokenizer
from tests.serve.support import serve
from tests.trainers.online_support import make_trainer, of_length
from trl.errors import DataError, EngineError
from trl.rollouts.dispatch import Retries
from trl.rollouts.server import ServerEngine

STEPS = {"max_steps": 4, "learning_rate": 1e-2, "seed": 3}


def engine_of(served, tmp_path):
    return ServerEngine(
        served.url, sync_dir=tmp_path / "weights", retries=Retries(1, 0.01), timeout=60, start_timeout=1
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_equal(found, expected):
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_training_on_a_server_is_training_in_process(make_model, tmp_path):
    """The same seeds sample the same tokens, on the weights of every step."""
    inside = make_trainer(make_model("llama", max_position_embeddings=128), tmp_path / "inside", **STEPS)
    inside.train()
    with serve(make_model("llama", seed=5, max_position_embeddings=128)) as served:
        model = make_model("llama", max_position_embeddings=128)
        outside = make_trainer(model, tmp_path / "outside", engine=engine_of(served, tmp_path), **STEPS)
        outside.train()
        outside.engine.close()
    assert_equal(weights(outside), weights(inside))
    logs = outside.state.log_history[0]
    assert logs["engine/sync_seconds"] > 0
    assert logs["engine/tokens_per_second"] > 0
    assert logs["sampling/kl"] < 1e-6


def test_a_server_that_is_lost_ends_the_run_with_a_checkpoint(make_model, tmp_path):
    """And the run that is resumed with another one is, to the bit, the run that was never stopped."""
    make = lambda: make_model("llama", max_position_embeddings=128)  # noqa: E731
    whole = make_trainer(make(), tmp_path / "whole", **STEPS)
    whole.train()
    with serve(make()) as served:
        trainer = make_trainer(make(), tmp_path / "parts", engine=engine_of(served, tmp_path), **STEPS)
        sample, calls = served.worker.engine.generate, []

        def dies(prompts, params, n):
            calls.append(n)
            if len(calls) > 5:  # a check of the weights and a rollout batch in every step: in the third one's sampling
                raise RuntimeError("out of memory")
            return sample(prompts, params, n)

        served.worker.engine.generate = dies
        with pytest.raises(EngineError, match=r"(?s)failed \(500\).*after step 2, with a checkpoint in .*checkpoint-2"):
            trainer.train()
        trainer.engine.close()
    with serve(make()) as served:
        again = make_trainer(make(), tmp_path / "parts", engine=engine_of(served, tmp_path), **STEPS)
        again.train(resume_from_checkpoint="last")
        again.engine.close()
    assert_equal(weights(again), weights(whole))


def episode(prompts, trainer):
    """Completions of which an environment wrote the middle, with a number of its own for each."""
    tokenizer = make_tokenizer()
    lengths = [3 + i % 3 for i in range(len(prompts))]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[10] * n for n in lengths],
        "logprobs": [[[-4.0, -9.0]] * n for n in lengths],
        "env_mask": [[1, 0, *[1] * (n - 2)] for n in lengths],
        "score": [float(n) for n in lengths],
    }


def test_rollouts_by_a_function(make_model, tmp_path):
    seen = {}

    def reward(prompts, completion_ids, score, **_):
        seen.update(prompts=prompts, score=score)
        return score

    trainer = make_trainer(make_model("llama"), tmp_path, reward, rollout_func=episode, max_steps=1)
    trainer.train()
    assert seen["prompts"] == [seen["prompts"][i - i % 4] for i in range(8)]
    assert seen["score"] == [3.0, 4.0, 5.0, 3.0, 4.0, 5.0, 3.0, 4.0]
    assert trainer.state.log_history[0]["reward"] == pytest.approx(3.875)
    group = trainer.sampler.groups([trainer.train_dataset[0]], 4, "train")[0]
    assert group.example.completions[0].mask == (1, 0, 1)
    assert group.example.completions[0].signals["sampler_logprobs"] == (-4.0, -4.0, -4.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda made: made.pop("logprobs"), "return a dict with prompt_ids, completion_ids, logprobs"),
        (lambda made: made["score"].pop(), "score has 7 entries for 8 prompts"),
        (lambda made: made["logprobs"][2].pop(), r"logprobs\[2\] has 4 entries for 5 tokens"),
        (lambda made: made["env_mask"][0].pop(), r"env_mask\[0\] has 2 entries for 3 tokens"),
        (lambda made: made["completion_ids"].__setitem__(1, []), r"logprobs\[1\] has 4 entries for 0 tokens"),
        (lambda made: made["prompt_ids"].__setitem__(1, [5]), r"prompt_ids\[1\] and prompt_ids\[0\] .* differ"),
        (lambda made: made["logprobs"].__setitem__(0, ["a"] * 3), r"logprobs\[0\] contains 'a', which is not a number"),
    ],
)
def test_a_function_that_gives_something_else(make_model, tmp_path, change, words):
    def wrong(prompts, trainer):
        made = copy.deepcopy(episode(prompts, trainer))
        change(made)
        return made

    trainer = make_trainer(make_model("llama"), tmp_path, of_length, rollout_func=wrong)
    with pytest.raises(DataError, match=words):
        trainer.train()


def test_placeholders_for_log_probabilities_are_refused_where_they_are_read(make_model, tmp_path):
    def placeholders(prompts, trainer):
        made = episode(prompts, trainer)
        return made | {"logprobs": [[0.0] * len(ids) for ids in made["completion_ids"]]}

    def run(**options):
        trainer = make_trainer(make_model("llama"), tmp_path, of_length, rollout_func=placeholders, **options)
        trainer.train()
        return trainer.state.global_step

    assert run(max_steps=1, overwrite_output_dir=True) == 1
    assert run(max_steps=1, overwrite_output_dir=True, num_iterations=2, recompute_old_logprobs=True) == 1
    for option in ({"num_iterations": 2}, {"importance_sampling_correction": True}):
        with pytest.raises(DataError, match="all logprobs are 0.*recompute_old_logprobs=True"):
            run(overwrite_output_dir=True, **option)
