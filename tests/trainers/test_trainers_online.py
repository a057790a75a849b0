"""The online loop: what is sampled, rewarded and learned from, and that nothing depends on how it was split.

That nothing depends on where it was stopped either is in tests/stops/test_stops_resume.py."""

from __future__ import annotations

import pytest
import torch

from tests.conftest import make_tokenizer
from tests.trainers.online_support import (
    Table,
    assert_same,
    config,
    encoded,
    even_prompts,
    gradient,
    letters,
    make_trainer,
    of_length,
    prompts,
)
from trl.algorithms.entropy_control import EntropyBonus
from trl.errors import ConfigError
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import OnlineConfig
from trl.types import Algorithm

# ---- the gradient of a step ----

KINDS = {
    "token": {"loss_type": "dapo"},
    "sequence": {"loss_type": "grpo", "beta": 0.1},
    "constant": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "sum": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "scale_rewards": "batch"},
}


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("token", "sequence", "entropy") else pytest.param(kind, marks=pytest.mark.long)
        for kind in KINDS
    ],
)
def test_splits_of_a_step_have_the_same_gradient(make_model, tmp_path, kind):
    whole = {"per_device_train_batch_size": 32, **KINDS[kind]}
    expected = gradient(make_model("llama"), tmp_path, **whole)
    assert max(value.abs().max() for value in expected[1].values()) > 1e-3
    for size, steps in ((8, 4), (2, 16)):
        splits = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        assert_same(gradient(make_model("llama"), tmp_path, **{**whole, **splits}), expected)
    for budget in (40, 150):
        assert_same(gradient(make_model("llama"), tmp_path, **whole, max_tokens_per_micro_batch=budget), expected)


def test_layouts_have_the_same_gradient(make_model, tmp_path):
    expected = gradient(make_model("llama"), tmp_path, layout="padded")
    for layout in ("packed", "shared"):
        assert_same(gradient(make_model("llama"), tmp_path, layout=layout), expected)


def test_several_rounds_in_a_step_are_one_round(make_model, tmp_path):
    """Two rounds of two prompts, sampled by the same weights, are a round of four."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    expected = gradient(make_model("llama"), tmp_path, **options)
    assert_same(gradient(make_model("llama"), tmp_path, **options, steps_per_generation=1), expected)


def test_an_encoder_decoder(make_model, tmp_path):
    expected = gradient(make_model("t5"), tmp_path)
    splits = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(gradient(make_model("t5"), tmp_path, **splits), expected)


AVERAGES = {
    "dapo": lambda losses, lengths: sum(x * n for x, n in zip(losses, lengths, strict=True)) / sum(lengths),
    "grpo": lambda losses, lengths: sum(losses) / len(losses),
    "dr_grpo": lambda losses, lengths: sum(x * n for x, n in zip(losses, lengths, strict=True)) / (8 * len(losses)),
    "luspo": lambda losses, lengths: sum(x * n for x, n in zip(losses, lengths, strict=True)) / len(losses),
}


@pytest.mark.parametrize("loss_type", AVERAGES)
def test_the_first_step_is_reinforce(make_model, tmp_path, loss_type):
    """Its loss is an average of −A, by hand: ρ is exactly 1 whatever the sampler says it was."""
    options = {"loss_type": loss_type, "scale_rewards": "none", "shuffle_dataset": False}
    trainer = make_trainer(make_model("llama"), tmp_path, engine=Table(), **options)
    trainer.train()
    groups = [[len(rollout) for rollout in rollouts] for rollouts in Table().generate(encoded(2), None, 4)]
    lengths = [n for group in groups for n in group]
    losses = [sum(group) / 4 - n for group in groups for n in group]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        AVERAGES[loss_type](losses, lengths), rel=1e-5, abs=1e-6
    )
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] == 0


def test_samples_of_the_engine_have_the_probabilities_of_the_model(make_model, tmp_path):
    trainer = make_trainer(make_model("llama"), tmp_path, temperature=0.7, max_steps=2)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["sampling/sampling_logp_difference/max"] < 1e-4
    assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert log["sampling/kl"] < 1e-6


# ---- rounds ----


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, [(2, 4)] * 4),
        ({"num_iterations": 2}, [(2, 4)] * 2),
        ({"steps_per_generation": 2}, [(4, 4)] * 2),
        ({"steps_per_generation": 2, "num_iterations": 2}, [(4, 4)]),
        ({"generation_batch_size": 16}, [(4, 4)] * 2),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, [(1, 4)] * 4),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 1}, [(2, 4)] * 8),
    ],
)
def test_rounds_are_sampled_when_they_are_needed(make_model, tmp_path, options, calls):
    engine = Table()
    make_trainer(make_model("llama"), tmp_path, engine=engine, max_steps=4, **options).train()
    assert engine.calls == calls


def test_old_probabilities_are_those_of_the_sampler_or_computed_again(make_model, tmp_path):
    """The model itself samples, so both are the same; and after the first step, the ratio has moved."""
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    logs = []
    for again in (False, True):
        trainer = make_trainer(make_model("llama"), tmp_path, letters, recompute_old_logprobs=again, **options)
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history[:2]])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-6)
    assert logs[0][0] != pytest.approx(logs[0][1], rel=1e-2)


def test_every_prompt_once_an_epoch(make_model, tmp_path):
    seen = []

    def reward(prompts, number, **_):
        seen.extend(number[::4])
        return [0.0] * len(prompts)

    rows = prompts(8, number=list(range(8)))
    make_trainer(make_model("llama"), tmp_path, reward, rows, engine=Table(), max_steps=-1, num_train_epochs=2).train()
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:]


def test_a_stream_of_prompts_starts_over(make_model, tmp_path):
    rows = prompts(3).to_iterable_dataset()
    trainer = make_trainer(make_model("llama"), tmp_path, rows=rows, engine=Table(), max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4
    assert trainer.prompts.cursor == 8


# ---- what is learned from ----


def scored_tokens(trainer):
    completions = [c for part in trainer.buffer.batch for example in part for c in example.completions]
    return sum(sum(c.mask or [1] * len(c)) for c in completions)


def test_truncated_completions_can_be_left_out(make_model, tmp_path):
    lengths = [len(r) for rollouts in Table().generate(encoded(8), None, 4) for r in rollouts]
    options = {"shuffle_dataset": False, "per_device_train_batch_size": 32, "mask_truncated_completions": True}
    trainer = make_trainer(make_model("llama"), tmp_path, engine=Table(), **options)
    trainer.train()
    assert 7 in lengths
    assert scored_tokens(trainer) == sum(n for n in lengths if n < 7)
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == pytest.approx(lengths.count(7) / 32)


def test_groups_without_variance_are_counted_dropped_or_replaced(make_model, tmp_path):
    options = {"shuffle_dataset": False, "per_device_train_batch_size": 16}
    counts = {}
    for choice in ("keep", "drop", "resample"):
        engine = Table()
        trainer = make_trainer(
            make_model("llama"), tmp_path, even_prompts, engine=engine, zero_variance=choice, **options
        )
        trainer.train()
        flat = trainer.state.log_history[0]["frac_reward_zero_std"]
        counts[choice] = flat, sum(len(e.completions) for e in trainer.buffer.batch[0]), engine.calls
    assert counts["keep"] == (0.5, 16, [(4, 4)])
    assert counts["drop"] == (0.5, 8, [(4, 4)])
    assert counts["resample"] == (0.0, 16, [(4, 4), (2, 4), (1, 4)])


def test_replacing_groups_has_a_bound(make_model, tmp_path):
    engine = Table()
    trainer = make_trainer(
        make_model("llama"),
        tmp_path,
        lambda prompts, **_: [0.0] * len(prompts),
        engine=engine,
        zero_variance="resample",
        max_resampling=2,
    )
    trainer.train()
    assert engine.calls == [(2, 4)] * 3
    assert trainer.state.global_step == 1


def test_a_round_of_which_nothing_is_left(make_model, tmp_path):
    model = make_model("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    options = {"zero_variance": "drop", "gradient_accumulation_steps": 4, "learning_rate": 1.0}
    make_trainer(model, tmp_path, lambda prompts, **_: [0.0] * len(prompts), engine=Table(), **options).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- an algorithm of one's own ----


class Filtered(Algorithm):
    """Learn from the best completion of each group alone."""

    def advantages(self, experience):
        best = torch.zeros_like(experience.rewards)
        for number in experience.group.unique():
            mine = (experience.group == number).nonzero().flatten()
            best[mine[experience.rewards[mine].argmax()]] = 1
        return experience.with_signals(best=best)

    def loss(self, scores, batch):
        return -scores.logprobs * batch.signals["best"][:, None], {"entropy": scores.entropy}


def test_an_algorithm_of_ones_own(make_model, tmp_path):
    mine: Algorithm = Filtered()
    trainer = OnlineTrainer(
        model=make_model("llama"),
        reward_funcs=letters,
        args=config(tmp_path, OnlineConfig, max_steps=25, per_device_train_batch_size=32, learning_rate=2e-2),
        train_dataset=prompts(),
        processing_class=make_tokenizer(),
        algorithm=mine,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history[:-1]]
    assert sum(rewards[-5:]) / 5 > 0.5 > 0.1 > sum(rewards[:3]) / 3


def own(algorithm, make_model, tmp_path, **options):
    given = {"loss_aggregation": "sequence", **options}
    data = {"train_dataset": prompts(), "processing_class": make_tokenizer(), "engine": Table()}
    args = config(tmp_path, OnlineConfig, **given)
    return OnlineTrainer(make_model("llama"), of_length, args, algorithm=algorithm, **data)


def test_an_algorithm_of_ones_own_asks_for_what_it_needs(make_model, tmp_path):
    """Nothing to learn but the entropy bonus, which rises by its steps; and all the signals of a round."""
    seen = set()

    class Bonus(Filtered):
        needs_reference = needs_entropy = True
        entropy_bonus = EntropyBonus(0.1, target=9.0, step=0.5)

        def advantages(self, experience):
            seen.update(experience.signals)
            return experience.with_signals(best=0 * experience.rewards)

    trainer = own(Bonus(), make_model, tmp_path, max_steps=3, learning_rate=0.05, lr_scheduler_type="constant")
    trainer.train()
    assert seen == {"sampler_logprobs", "old_logprobs", "ref_logprobs", "entropy"}
    logs = trainer.state.log_history[:3]
    assert [log["entropy_coef"] for log in logs] == pytest.approx([0.6, 1.1, 1.6])
    assert [log["loss"] for log in logs] == pytest.approx([0, -0.6 * logs[1]["entropy"], -1.1 * logs[2]["entropy"]])
    assert logs[2]["entropy"] > logs[0]["entropy"]


def test_probabilities_are_computed_again_where_samples_are_weighed_by_them(make_model, tmp_path):
    """Of an engine whose numbers are not the model's, in rounds of two steps: else every weight would be 1."""
    options = {"steps_per_generation": 2, "importance_sampling_correction": True, "max_steps": 1}
    trainer = make_trainer(make_model("llama"), tmp_path, engine=Table(), **options)
    trainer.train()
    signals = trainer.buffer.batch[0][0].completions[0].signals
    assert signals["old_logprobs"] != pytest.approx(signals["sampler_logprobs"], abs=1e-2)


def test_what_is_measured_of_samples_is_without_dropout(make_model, tmp_path):
    """As sampling is: the model's own numbers are those that it sampled with."""
    model = make_model("gpt2", resid_pdrop=0.5)
    options = {
        "steps_per_generation": 2,
        "recompute_old_logprobs": True,
        "beta": 0.1,
        "max_steps": 3,
        "learning_rate": 0.0,
    }
    trainer = make_trainer(model, tmp_path, **options)
    trainer.train()
    assert trainer.model.training
    for completion in (c for minibatch in trainer.buffer.batch for example in minibatch for c in example.completions):
        signals = completion.signals
        assert signals["old_logprobs"] == pytest.approx(signals["sampler_logprobs"], abs=1e-4)
        assert signals["ref_logprobs"] == pytest.approx(signals["sampler_logprobs"], abs=1e-4)


def test_an_algorithm_that_leaves_questions_open(make_model, tmp_path):
    class Two:
        advantages, loss = Filtered.advantages, Filtered.loss

    with pytest.raises(ConfigError, match="algorithm is a Two, .* derive the class from trl.types.Algorithm"):
        own(Two(), make_model, tmp_path)


def test_a_loss_per_completion(make_model, tmp_path):
    class PerCompletion(Filtered):
        def loss(self, scores, batch):
            return torch.arange(1.0, 1 + len(batch.mask)) + 0 * scores.logprobs.sum(-1), {}

    trainer = own(PerCompletion(), make_model, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(4.5)


def test_a_trainer_without_an_algorithm(make_model, tmp_path):
    with pytest.raises(ConfigError, match="needs algorithm="):
        make_trainer(make_model("llama"), tmp_path, cls=OnlineTrainer)
