"""The online loop: what is sampled, rewarded and learned from, and that nothing depends on how it was split or stopped."""

from __future__ import annotations

import asyncio
import math
import random

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from tests.conftest import make_tokenizer
from trl.errors import ConfigError
from trl.rewards.call import RewardError
from trl.rollouts.engine import Prompt, Rollout
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.online import OnlineTrainer
from trl.trainers.online_config import OnlineConfig
from trl.trainers.online_dpo import OnlineDPOTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer
from trl.types import Algorithm


def prompts(count: int = 8, **columns) -> Dataset:
    return Dataset.from_dict({"prompt": [f"Say {'please ' * (i % 3)}{i}: " for i in range(count)], **columns})


def letters(completions, **_):
    """The share of the letter a."""
    return [text.count("a") / max(1, len(text)) for text in completions]


def of_length(completion_ids, **_):
    return [float(len(ids)) for ids in completion_ids]


class Table:
    """An engine whose samples are a function of the prompt and their number, whatever the model."""

    def __init__(self, longest: int = 7) -> None:
        self.longest = longest
        self.calls: list[tuple[int, int]] = []
        self.params = None

    def sync(self, model, step):
        pass

    def generate(self, prompts, params, n):
        self.calls.append((len(prompts), n))
        self.params = params
        return [[self._rollout(prompt.ids, i) for i in range(n)] for prompt in prompts]

    def _rollout(self, ids, i):
        numbers = random.Random(sum(ids) * 31 + i)
        length = numbers.randint(1, self.longest)
        tokens = tuple(numbers.randint(6, 90) for _ in range(length))
        return Rollout(tokens, (-4.5,) * length, "length" if length == self.longest else "stop")


def config(tmp_path, cls=GRPOConfig, **options):
    given = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
    }
    return cls(**{**given, **options})


def make_trainer(
    model, tmp_path, reward=of_length, rows=None, *, cls=GRPOTrainer, engine=None, peft=None, judge=None, **options
):
    return cls(
        model=model,
        reward_funcs=reward,
        args=config(tmp_path, cls.config_class, **options),
        train_dataset=prompts() if rows is None else rows,
        processing_class=make_tokenizer(),
        peft_config=peft,
        **{name: value for name, value in {"engine": engine, "judge": judge}.items() if value is not None},
    )


def gradient(model, tmp_path, **options):
    """(loss, gradients) of one step: with plain SGD at rate 1, what the step took away."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = {"learning_rate": 1.0, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0}
    trainer = make_trainer(model, tmp_path, engine=Table(), **{**sgd, "shuffle_dataset": False, **options})
    trainer.train()
    loss = trainer.state.log_history[0]["loss"]
    return loss, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def assert_same(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    for name, value in expected[1].items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-5, atol=2e-5 * scale + 1e-7, msg=lambda m, n=name: n + m
        )


# ---- the gradient of a step ----

KINDS = {
    "token": {"loss_type": "dapo"},
    "sequence": {"loss_type": "grpo", "beta": 0.1},
    "constant": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "sum": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "entropy": {"top_entropy_quantile": 0.5, "entropy_coef": 0.01, "scale_rewards": "batch"},
}


@pytest.mark.parametrize("kind", KINDS)
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
    groups = [[len(rollout) for rollout in rollouts] for rollouts in Table().generate(_encoded(2), None, 4)]
    lengths = [n for group in groups for n in group]
    losses = [sum(group) / 4 - n for group in groups for n in group]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(
        AVERAGES[loss_type](losses, lengths), rel=1e-5, abs=1e-6
    )
    assert trainer.state.log_history[0]["clip_ratio/region_mean"] == 0


def _encoded(count):
    tokenizer = make_tokenizer()
    return [Prompt(tokenizer(row["prompt"])["input_ids"]) for row in prompts(count)]


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


def noisy(completions, **_):
    return [text.count("a") + random.random() for text in completions]


RESUME = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_steps": 9,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
    "beta": 0.1,
    "sync_ref_model": True,
    "ref_model_sync_steps": 2,
}
TIMES = {"tokens_per_second", "train_runtime", "train_samples_per_second", "train_steps_per_second"}


def run(make_model, tmp_path, resume=None):
    random.seed(0)
    model = make_model("gpt2", resid_pdrop=0.1)
    trainer = make_trainer(model, tmp_path, noisy, prompts(8), **RESUME)
    trainer.train(resume_from_checkpoint=resume)
    log = [{k: v for k, v in entry.items() if k not in TIMES} for entry in trainer.state.log_history[:-1]]
    return model.state_dict(), log


def test_a_run_that_was_stopped_goes_on_to_the_bit(make_model, tmp_path):
    """In the middle of a round, at its end, and at the end of an epoch (8 steps); with dropout and a random reward."""
    weights, log = run(make_model, tmp_path)
    weights = {name: value.clone() for name, value in weights.items()}
    assert [entry["step"] for entry in log if "reward" in entry] == [1, 5, 9]
    for step in (3, 4, 8):
        found, again = run(make_model, tmp_path, str(tmp_path / f"checkpoint-{step}"))
        assert again == log
        assert all(torch.equal(found[name], value) for name, value in weights.items())


# ---- rewards ----


def test_columns_reach_reward_functions_by_name(make_model, tmp_path):
    given = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, **more):
        given.update(prompts=prompts, completions=completions, answer=answer, step=trainer_state.global_step, more=more)
        assert make_tokenizer().batch_decode(completion_ids, skip_special_tokens=True) == completions
        return [1.0] * len(prompts)

    rows = prompts(4, answer=["w", "x", "y", "z"])
    trainer = make_trainer(make_model("llama"), tmp_path, reward, rows, shuffle_dataset=False, engine=Table())
    trainer.train()
    assert given["prompts"] == [rows[0]["prompt"]] * 4 + [rows[1]["prompt"]] * 4
    assert given["answer"] == ["w"] * 4 + ["x"] * 4
    assert given["step"] == 0
    assert set(given["more"]) == {"log_metric", "log_extra"}


def test_reward_functions_log_columns_of_their_own(make_model, tmp_path):
    def reward(completions, log_extra, **_):
        log_extra("upper", [text.upper() for text in completions])
        return [0.0] * len(completions)

    make_trainer(make_model("llama"), tmp_path, reward, engine=Table(), log_completions=True).train()
    table = pq.read_table(tmp_path / "completions" / "completions_00001.parquet").to_pylist()
    assert [row["upper"] for row in table] == [row["completion"].upper() for row in table]


def test_conversations_give_conversations(make_model, tmp_path):
    def reward(prompts, completions, **_):
        assert prompts[0] == [{"role": "user", "content": "Hi 0"}]
        assert all(set(c[0]) == {"role", "content"} and c[0]["role"] == "assistant" for c in completions)
        return [float(len(c[0]["content"])) for c in completions]

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"Hi {i}"}] for i in range(2)]})
    make_trainer(make_model("llama"), tmp_path, reward, rows, shuffle_dataset=False).train()


def test_rewards_are_weighed_and_logged_by_name(make_model, tmp_path):
    async def waits(completions, **_):
        await asyncio.sleep(0)
        return [2.0] * len(completions)

    def sometimes(completions, log_metric, **_):
        log_metric("asked", 3.0)
        return [None, 1.0] * (len(completions) // 2)

    trainer = make_trainer(make_model("llama"), tmp_path, [waits, sometimes], reward_weights=[1.0, 0.5], engine=Table())
    trainer.train()
    log = trainer.state.log_history[0]
    assert (log["rewards/waits/mean"], log["rewards/sometimes/mean"]) == (2.0, 1.0)
    assert log["reward"] == 2.25
    assert log["asked"] == 3.0
    assert log["frac_reward_zero_std"] == 0


def test_a_reward_that_fails_names_itself_and_the_sample(make_model, tmp_path):
    def fragile(completion_ids, **_):
        return [1 / (len(ids) - 7) for ids in completion_ids]

    trainer = make_trainer(make_model("llama"), tmp_path, fragile, engine=Table())
    with pytest.raises(RewardError, match=r"'fragile' raised ZeroDivisionError: division by zero. Sample \d of 8"):
        trainer.train()


def test_samples_whose_reward_failed_can_be_dropped(make_model, tmp_path):
    def fragile(completion_ids, **_):
        return [float("nan") if len(ids) > 4 else len(ids) for ids in completion_ids]

    lengths = [len(r) for rollouts in Table().generate(_encoded(2), None, 4) for r in rollouts]
    trainer = make_trainer(
        make_model("llama"), tmp_path, fragile, engine=Table(), shuffle_dataset=False, on_reward_error="drop"
    )
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["failed_rewards"] == pytest.approx(sum(n > 4 for n in lengths) / 8)
    assert log["completions/mean_length"] == pytest.approx(sum(lengths) / 8)


# ---- what is learned from ----


def scored_tokens(trainer):
    completions = [c for part in trainer.rounds.round for example in part for c in example.completions]
    return sum(sum(c.mask or [1] * len(c)) for c in completions)


def test_truncated_completions_can_be_left_out(make_model, tmp_path):
    lengths = [len(r) for rollouts in Table().generate(_encoded(8), None, 4) for r in rollouts]
    options = {"shuffle_dataset": False, "per_device_train_batch_size": 32, "mask_truncated_completions": True}
    trainer = make_trainer(make_model("llama"), tmp_path, engine=Table(), **options)
    trainer.train()
    assert 7 in lengths
    assert scored_tokens(trainer) == sum(n for n in lengths if n < 7)
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == pytest.approx(lengths.count(7) / 32)


def even_prompts(prompts, completion_ids, **_):
    """Groups of even prompts have rewards that differ."""
    return [len(ids) * (int(p.split()[-1][0]) % 2 == 0) for p, ids in zip(prompts, completion_ids, strict=True)]


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
        counts[choice] = flat, sum(len(e.completions) for e in trainer.rounds.round[0]), engine.calls
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


class Filtered:
    """Learn from the best completion of each group alone."""

    needs_reference = needs_values = False

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


def test_a_loss_per_completion(make_model, tmp_path):
    class PerCompletion(Filtered):
        def loss(self, scores, batch):
            return torch.arange(1.0, 1 + len(batch.mask)) + 0 * scores.logprobs.sum(-1), {}

    args = config(tmp_path, OnlineConfig, loss_aggregation="sequence")
    data = {"train_dataset": prompts(), "processing_class": make_tokenizer()}
    trainer = OnlineTrainer(make_model("llama"), of_length, args, algorithm=PerCompletion(), engine=Table(), **data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(4.5)


def test_a_trainer_without_an_algorithm(make_model, tmp_path):
    with pytest.raises(ConfigError, match="needs algorithm="):
        make_trainer(make_model("llama"), tmp_path, cls=OnlineTrainer)


# ---- reference, adapters, evaluation, logs ----


@pytest.mark.parametrize("peft", [None, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])], ids=["full", "adapter"])
def test_the_reference_is_the_model_that_was_given(make_model, tmp_path, peft):
    options = {"beta": 0.1, "max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    trainer = make_trainer(make_model("llama"), tmp_path, letters, peft=peft, **options)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history[:2]]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 1e-4


def test_no_reference_without_a_penalty(make_model, tmp_path):
    assert make_trainer(make_model("llama"), tmp_path).reference is None
    assert make_trainer(make_model("llama"), tmp_path, cls=RLOOTrainer).reference is not None


def test_evaluation_samples_and_rewards(make_model, tmp_path):
    trainer = make_trainer(make_model("llama"), tmp_path, engine=Table(), num_generations_eval=2)
    trainer.eval_dataset = trainer.encode(prompts(3), "eval", "eval")
    metrics = trainer.evaluate()
    assert trainer.engine.calls == [(3, 2)]
    lengths = [len(r) for rollouts in Table().generate(_encoded(3), None, 2) for r in rollouts]
    assert metrics["eval_reward"] == pytest.approx(sum(lengths) / 6)
    assert trainer.evaluate()["eval_loss"] == metrics["eval_loss"]


def test_completions_are_shown_and_kept(make_model, tmp_path, capsys):
    trainer = make_trainer(
        make_model("llama"), tmp_path, engine=Table(), log_completions=True, num_completions_to_print=2, max_steps=2
    )
    trainer.train()
    shown = capsys.readouterr().out
    assert "Step 1" in shown
    assert "advantage" in shown
    table = pq.read_table(tmp_path / "completions" / "completions_00002.parquet").to_pylist()
    assert len(table) == 8
    assert list(table[0]) == ["step", "prompt", "completion", "of_length", "advantage"]
    assert sum(row["advantage"] for row in table) == pytest.approx(0, abs=1e-4)


def test_options_of_sampling_reach_the_engine(make_model, tmp_path):
    engine = Table()
    options = {
        "temperature": 0.6,
        "top_k": 5,
        "min_p": 0.1,
        "generation_kwargs": {"stop": "\n", "no_repeat_ngram_size": 2},
    }
    make_trainer(make_model("llama"), tmp_path, engine=engine, max_steps=2, **options).train()
    params = engine.params
    assert (params.temperature, params.top_k, params.min_p, params.stop) == (0.6, 5, 0.1, ("\n",))
    assert params.max_new_tokens == 8
    assert params.generation_config.no_repeat_ngram_size == 2


# ---- configurations ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_generations": 3}, "A round has 8 completions per process .* no multiple of num_generations=3"),
        ({"num_generations": 1}, "a group needs at least 2 completions"),
        ({"loss_type": "grop"}, "Unknown loss_type 'grop'. Did you mean 'grpo'"),
        ({"generation_batch_size": 12}, "generation_batch_size=12 has to be per_device_train_batch_size"),
        ({"use_vllm": True}, "use_vllm=True is not available in this version"),
        ({"zero_variance": "skip"}, "Unknown zero_variance 'skip'"),
        ({"scale_rewards": "groups"}, "Unknown scale 'groups'. Did you mean 'group'"),
        ({"num_generation": 4}, "GRPOConfig has no option 'num_generation'. Did you mean 'num_generations'"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **options)


def test_options_of_older_scripts(tmp_path):
    made = config(tmp_path, vllm_importance_sampling_cap=2.0, vllm_mode="server", scale_rewards=False)
    assert made.importance_sampling_clip_max == 2.0
    assert made.make_algorithm().scale == "none"
    older = RLOOConfig(output_dir=str(tmp_path), rloo_k=4, kl_coef=0.1)
    assert (older.num_generations, older.beta) == (4, 0.1)


def test_rewards_are_needed(make_model, tmp_path):
    with pytest.raises(ConfigError, match="reward_funcs is missing"):
        make_trainer(make_model("llama"), tmp_path, None)
    with pytest.raises(ConfigError, match="reward_weights has 2 entries for 1 reward functions"):
        make_trainer(make_model("llama"), tmp_path, letters, reward_weights=[1.0, 2.0])


# ---- online DPO ----


def test_online_dpo_learns_from_the_best_and_the_worst(make_model, tmp_path):
    options = {"num_generations": 4, "per_device_train_batch_size": 2, "loss_type": "sigmoid", "max_steps": 2}
    trainer = make_trainer(
        make_model("llama"), tmp_path, cls=OnlineDPOTrainer, engine=Table(), shuffle_dataset=False, **options
    )
    trainer.train()
    groups = Table().generate(_encoded(4)[2:], None, 4)
    pairs = [[len(c) for c in example.completions] for example in trainer.rounds.round[0]]
    assert pairs == [[max(map(len, g)), min(map(len, g))] for g in groups]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert trainer.state.log_history[0]["pairs"] == 1


def test_online_dpo_splits_have_the_same_gradient(make_model, tmp_path):
    whole = {"cls": OnlineDPOTrainer, "num_generations": 2, "per_device_train_batch_size": 8}
    expected = gradient(make_model("llama"), tmp_path, **whole)
    splits = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(gradient(make_model("llama"), tmp_path, **{**whole, **splits}), expected)


def test_a_judge_ranks(make_model, tmp_path):
    def judge(prompts, completions):
        return [-1 if i else max(range(2), key=lambda k: len(group[k])) for i, group in enumerate(completions)]

    options = {"num_generations": 2, "per_device_train_batch_size": 2}
    trainer = make_trainer(
        make_model("llama"), tmp_path, None, cls=OnlineDPOTrainer, engine=Table(), judge=judge, **options
    )
    trainer.train()
    assert trainer.state.log_history[0]["pairs"] == 0.5
    assert trainer.state.log_history[0]["rewards/judge/mean"] == 0.5
