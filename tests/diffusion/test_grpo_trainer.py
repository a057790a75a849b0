"""DiffusionGRPO's trainer: steps that do not depend on how they were split, stops, files, and bad input."""

import json
import math

import diffusers
import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from tests.diffusion.pipelines import PIPELINES
from tests.diffusion.support import LORA, ROLLOUTS, Poison, online, weights_of
from tests.diffusion.support import ROWS as PROMPTS
from trl.algorithms.surrogates import CISPO, SAPO, Clip
from trl.errors import ConfigError, DataError, MissingPackageError, ModelError
from trl.rewards.call import RewardError
from trl.rewards.images import brightness_reward
from trl.trainers.diffusion.batch_ddpo import DiffusionDDPOTrainer
from trl.trainers.diffusion.grpo import DiffusionGRPOConfig, DiffusionGRPOTrainer
from trl.trainers.diffusion.nft import DiffusionNFTTrainer
from trl.training.nonfinite import NonFiniteError


def trainer(*arguments, **options):
    return online(DiffusionGRPOTrainer, *arguments, **options)


# ---- steps ----


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_steps_do_not_depend_on_the_split(tmp_path, name):
    """Micro-batches of pictures, forward passes of a few steps: the same rollouts, the same two optimizer steps."""
    plain = trainer(tmp_path / "a", name, optim="sgd", beta=0.1)
    plain.train()
    split = trainer(
        tmp_path / "b",
        name,
        optim="sgd",
        beta=0.1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        max_steps_per_micro_batch=2,
        sample_batch_size=3,
    )
    split.train()
    before = weights_of(trainer(tmp_path / "c", name))
    moved = (weights_of(plain) - before).norm()
    assert moved > 1e-6
    assert (weights_of(plain) - weights_of(split)).norm() < 1e-4 * moved


def test_pictures_are_sampled_so_many_at_once(tmp_path):
    run = trainer(tmp_path, sample_batch_size=3, max_steps=1)
    run.get_train_dataloader()
    rows = []
    handle = run.module.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["hidden_states"])), with_kwargs=True
    )
    run.roll_out()
    handle.remove()
    assert rows == [6] * 3 + [2] * 3  # 4 pictures of 3 steps, each with its negative


def test_a_rollout_batch_may_be_gone_through_several_times(tmp_path):
    run = trainer(tmp_path, steps_per_generation=2, num_iterations=2, per_device_train_batch_size=2, max_steps=8)
    seen = []
    plain = run.roll_out
    run.roll_out = lambda: seen.append(run.state.global_step) or plain()
    run.train()
    assert seen == [0, 4]


def test_the_ratio_moves_once_weights_have(tmp_path):
    run = trainer(tmp_path, num_iterations=2, max_steps=2)
    run.train()
    first, second = (row["sampling/logp_difference"] for row in run.state.log_history[:2])
    assert first < 1e-5
    assert second > 10 * first


def test_the_reference_is_the_model_as_it_was(tmp_path):
    for lora in (True, False):
        run = trainer(tmp_path / str(lora), lora=lora, beta=0.1, learning_rate=1e-3)
        run.train()
        kl = [row["kl"] for row in run.state.log_history[:2]]
        assert kl[0] == pytest.approx(0, abs=1e-9)
        assert kl[1] > 1e-9


def test_a_window_of_steps(tmp_path):
    run = trainer(tmp_path, num_inference_steps=5, sde_window_size=2, sde_window_range=[1, 5], max_steps=3)
    windows = []
    plain = run.collate

    def collate(items):
        windows.append(sorted({item.step for item in items}))
        return plain(items)

    run.collate = collate
    run.train()
    assert {len(window) for window in windows} == {2}
    assert all(window[0] >= 1 and window[1] == window[0] + 1 for window in windows)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epsilon": 0.1}, Clip(0.1, 0.1)),
        ({"epsilon": 0.1, "epsilon_high": 0.2}, Clip(0.1, 0.2)),
        ({"loss_type": "cispo"}, CISPO(5.0)),
        ({"loss_type": "cispo", "epsilon_high": 3.0}, CISPO(3.0)),
        ({"loss_type": "sapo"}, SAPO()),
    ],
)
def test_how_ratios_are_bounded(tmp_path, options, expected):
    assert DiffusionGRPOConfig(str(tmp_path), **ROLLOUTS, **options).make_algorithm().surrogate == expected


@pytest.mark.parametrize("trainer_class", [DiffusionGRPOTrainer, DiffusionDDPOTrainer])
def test_a_share_of_the_steps(tmp_path, trainer_class):
    """The first of them, with the most noise."""
    run = online(trainer_class, tmp_path, "sd", num_inference_steps=5, timestep_fraction=0.6, max_steps=1)
    steps, plain = set(), run.collate
    run.collate = lambda items: steps.update(item.step for item in items) or plain(items)
    run.train()
    assert steps == {0, 1, 2}
    assert run.state.num_input_tokens_seen == 4 * 3
    with pytest.raises(ConfigError, match=r"timestep_fraction=1\.5"):
        online(trainer_class, tmp_path, timestep_fraction=1.5)


def test_pictures_of_a_prompt_may_begin_from_one_noise(tmp_path):
    run = trainer(tmp_path, same_initial_noise=True, max_steps=1)
    found = []
    plain = run.experience
    run.experience = lambda batch: found.append(batch) or plain(batch)
    run.train()
    first = found[0].trajectories.latents[:, 0]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_prompts_are_encoded_once(tmp_path):
    run = trainer(tmp_path, max_steps=4)
    asked = []
    plain = run.denoiser.encode
    run.denoiser.encode = lambda prompts: asked.extend(prompts) or plain(prompts)
    run.train()
    assert sorted(asked) == sorted(["", *PROMPTS["prompt"]])


def test_rewards_are_given_columns_and_pictures(tmp_path):
    seen = {}

    def reward(prompts, images, pil_images, target, **rest):
        seen.update(prompts=prompts, images=images, pil=pil_images, target=target, rest=rest)
        return [0.0, 1.0] * (len(prompts) // 2)

    pipeline = PIPELINES["sd3"]()
    rows = PROMPTS.add_column("target", [1, 2, 3, 4])
    args = DiffusionGRPOConfig(output_dir=str(tmp_path), **{**ROLLOUTS, "max_sequence_length": 8, "max_steps": 1})
    DiffusionGRPOTrainer(model=pipeline, reward_funcs=reward, args=args, train_dataset=rows, peft_config=LORA).train()
    assert seen["images"].shape == (4, 3, 16, 16)
    assert seen["pil"][0].size == (16, 16)
    assert [PROMPTS["prompt"].index(prompt) + 1 for prompt in seen["prompts"]] == seen["target"]
    assert set(seen["rest"]) == {"trainer_state"}


# ---- stops ----


def test_resumes_to_the_bit_in_the_middle_of_a_rollout_batch(tmp_path):
    options = {
        "steps_per_generation": 2,
        "num_iterations": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "ema_decay": 0.5,
        "beta": 0.1,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    resumed = trainer(tmp_path / "whole", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert all(torch.equal(whole.ema.weights[name], value) for name, value in resumed.ema.weights.items())
    rows = [next(row for row in run.state.log_history if row["step"] == 6) for run in (whole, resumed)]
    assert rows[0]["loss"] == rows[1]["loss"]
    assert rows[0]["reward"] == rows[1]["reward"] if "reward" in rows[0] else True


def test_a_rollout_batch_is_left_behind_with_ignore_data_skip(tmp_path):
    for skips in (True, False):
        run = trainer(tmp_path, ignore_data_skip=not skips)
        run.get_train_dataloader()
        run.load_state_dict({"cursor": 8, "rollouts": 2, "buffer": {"position": 3, "served": 3, "batch": []}})
        assert (run.prompts.cursor, run.buffer.position) == (8, 3 if skips else 0)


def test_full_weights_resume_to_the_bit(tmp_path):
    options = {"lora": False, "learning_rate": 1e-4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path, "sd", **options)
    whole.train()
    resumed = trainer(tmp_path, "sd", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_steps_that_are_not_finite_are_skipped(tmp_path):
    run = trainer(tmp_path, max_steps=3)
    before = weights_of(run)
    run.add_callback(Poison(run, at={0}))
    run.train()
    assert run.steps.skipped == 1
    assert weights_of(run).isfinite().all()
    assert not torch.equal(weights_of(run), before)


def test_several_of_them_end_the_run_and_name_the_pictures(tmp_path):
    run = trainer(tmp_path, max_steps=5, max_skipped_steps=2)
    run.add_callback(Poison(run, at=range(5)))
    with pytest.raises(NonFiniteError, match="step 0 of a picture of 'a "):
        run.train()


# ---- files ----


def test_an_adapter_is_saved_as_pipelines_load_it(tmp_path):
    run = trainer(tmp_path, "sd")
    run.train()
    run.save_model(str(tmp_path / "saved"))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"latents": noise, "num_inference_steps": 2, "output_type": "pt"}
    expected = run.pipeline("a red circle", **call).images
    fresh = PIPELINES["sd"]().to(run.args.device)
    fresh.set_progress_bar_config(disable=True)
    assert not torch.allclose(fresh("a red circle", **call).images, expected, atol=1e-4)
    fresh.load_lora_weights(str(tmp_path / "saved"))
    assert torch.allclose(fresh("a red circle", **call).images, expected, atol=1e-5)


def test_the_card_tells_of_the_adapter_the_options_and_the_rewards(tmp_path):
    run = trainer(tmp_path, "sd", logging_steps=1)
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "An adapter of" in card
    assert "pipeline.load_lora_weights(" in card
    assert "| `num_generations` |" in card
    assert "| `reward` |" in card


def test_without_an_adapter_the_whole_pipeline_is_saved_with_averaged_weights(tmp_path):
    run = trainer(tmp_path, "sd", lora=False, ema_decay=0.5, learning_rate=1e-3)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    saved = diffusers.StableDiffusionPipeline.from_pretrained(str(tmp_path / "saved"))
    name = next(iter(run.ema.weights))
    found = dict(saved.unet.named_parameters())[name]
    assert torch.equal(found, run.ema.weights[name].cpu())
    assert not torch.equal(found, dict(run.module.named_parameters())[name].cpu())


class Watch(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self, run):
        self.run, self.seen = run, [weights_of(run)]

    def on_step_end(self, *_, **__):
        self.seen.append(weights_of(self.run))


def test_averaged_weights_by_hand(tmp_path):
    """θ' ← ¼ θ' + ¾ θ once after every step, also where an epoch ends with it."""
    run = trainer(tmp_path, ema_decay=0.25, max_steps=5)
    watch = Watch(run)
    run.add_callback(watch)
    run.train()
    expected, *after = watch.seen
    for weights in after:
        expected = 0.25 * expected + 0.75 * weights
    assert len(after) == 5
    assert {row["advantages/clipped"] for row in run.state.log_history if "loss" in row} == {0.0}
    assert run.state.epoch > 1
    with run.averaged():
        assert torch.allclose(weights_of(run), expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(weights_of(run), after[-1])


def test_pictures_before_and_after(tmp_path):
    run = trainer(tmp_path, num_pictures=3, picture_steps=1, max_steps=2)
    run.train()
    rows = [json.loads(line) for line in (tmp_path / "pictures.jsonl").read_text().splitlines()]
    assert [(row["step"], row["number"]) for row in rows] == [(step, i) for step in range(3) for i in range(3)]
    assert all((tmp_path / row["file"]).is_file() for row in rows)
    assert len({row["reward"] for row in rows if row["number"] == 0}) == 3


def test_evaluation_samples_the_same_pictures_each_time(tmp_path):
    run = trainer(tmp_path)
    run.eval_dataset = PROMPTS
    first, second = run.evaluate(), run.evaluate()
    assert first["eval_reward"] == second["eval_reward"] == first["eval_rewards/brightness_reward/mean"]


# ---- bad input ----


@pytest.mark.parametrize("make", [DiffusionGRPOTrainer, DiffusionNFTTrainer])
def test_a_rollout_batch_without_rewards_is_a_step_that_learns_nothing(tmp_path, make, caplog):
    """A run that ended there, or a process that left a step to the others, would be the worse."""
    batches = iter([[None] * 4, [1.0, 2.0, 3.0, 4.0]])
    run = online(make, tmp_path, reward=lambda prompts: next(batches))
    run.train()
    empty, learned = run.state.log_history[:2]
    assert (empty["loss"], empty["grad_norm"], "reward" in empty) == (0, 0, False)
    assert (learned["grad_norm"] > 0, learned["reward"]) == (True, 2.5)
    assert caplog.text.count("4 of 4 samples got no reward") == 1


def test_groups_that_are_all_dropped(tmp_path):
    run = trainer(tmp_path, reward=lambda prompts: [1.0] * len(prompts), zero_variance="drop")
    run.train()
    assert run.state.global_step == 2
    assert [row["loss"] for row in run.state.log_history[:2]] == [0, 0]


def test_rewards_of_the_wrong_count(tmp_path):
    with pytest.raises(RewardError, match="'short' gave 1 reward for 4 samples"):
        trainer(tmp_path, reward=named("short", lambda images: [1.0])).train()


def test_rewards_that_are_not_numbers_name_the_picture(tmp_path):
    function = named("odd", lambda images: [1.0, 1.0, math.nan, 1.0])
    with pytest.raises(RewardError, match=r"'odd' gave nan .*Sample 3 of 4.*picture 3, 16 × 16 pixels"):
        trainer(tmp_path, reward=function).train()
    with pytest.raises(RewardError, match=r"Fix the function\.$"):  # on_reward_error is no option here
        trainer(tmp_path, reward=function).train()


def named(name, function):
    function.__name__ = name
    return function


def test_rewards_of_texts_are_none_of_pictures(tmp_path):
    with pytest.raises(ConfigError, match="has the argument 'completions', which is not a column"):
        trainer(tmp_path, reward=named("short", lambda completions: [0.0]))
    with pytest.raises(ConfigError, match="reward_funcs holds 'org/model'"):
        trainer(tmp_path, reward="org/model")


def test_prompts_that_are_no_texts(tmp_path):
    args = DiffusionGRPOConfig(output_dir=str(tmp_path), **ROLLOUTS)
    rows = Dataset.from_dict({"prompt": [["a"], ["b"]]})
    with pytest.raises(DataError, match="Row 1, column 'prompt': a list"):
        DiffusionGRPOTrainer(model=PIPELINES["sd"](), reward_funcs=brightness_reward, args=args, train_dataset=rows)
    rows = Dataset.from_dict({"text": ["a"]})
    with pytest.raises(DataError, match="no column 'prompt'. It has text"):
        DiffusionGRPOTrainer(model=PIPELINES["sd"](), reward_funcs=brightness_reward, args=args, train_dataset=rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"guidance_scale": 0}, "guidance_scale=0"),
        ({"noise_level": 0}, "noise_level=0"),
        ({"num_generations": 3}, "4 pictures per process"),
        ({"num_generations": 1}, "at least 2 pictures"),
        ({"sde_window_size": 9}, "sde_window_size=9"),
        ({"sde_window_range": [0, 2]}, "without sde_window_size"),
        ({"sde_window_size": 1, "timestep_fraction": 0.5}, r"timestep_fraction=0.5 .* sde_window_range=\[0, 1\]"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt="),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"pad_token": "x"}, "pad_token='x' has no effect"),
        ({"flow_solver": "ode"}, "flow_solver"),
        ({"nois_level": 1}, "Did you mean 'noise_level'"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        trainer(tmp_path, **options)


def test_models_that_are_no_pipelines(tmp_path):
    args = DiffusionGRPOConfig(output_dir=str(tmp_path), **ROLLOUTS)
    with pytest.raises(ModelError, match="A Linear is not a pipeline"):
        DiffusionGRPOTrainer(torch.nn.Linear(1, 1), brightness_reward, args, PROMPTS)
    with pytest.raises(ConfigError, match="holds no pipeline"):
        DiffusionGRPOTrainer(str(tmp_path), brightness_reward, args, PROMPTS)


def test_without_diffusers_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("trl.imports.is_available", lambda module: False)
    with pytest.raises(MissingPackageError, match=r'pip install "trl\[diffusion\]"'):
        DiffusionGRPOConfig(output_dir=str(tmp_path), **ROLLOUTS)


def test_a_safety_checker_is_taken_off_and_that_is_said(tmp_path, caplog):
    pipeline = PIPELINES["sd"]()
    pipeline.safety_checker = lambda *_: None
    trainer(tmp_path, "sd", pipeline=pipeline)
    assert "Removing the pipeline's safety checker" in caplog.text
    assert pipeline.safety_checker is None
