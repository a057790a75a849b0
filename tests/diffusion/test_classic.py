"""Classic DDPO and AlignProp: the listings of their users, identities, stops, and bad input."""

import dataclasses
import math
import random

import pytest
import torch
from transformers import HfArgumentParser

from tests.diffusion.pipelines import PIPELINES
from tests.diffusion.support import Poison
from trl import (
    AlignPropConfig,
    AlignPropTrainer,
    DDPOConfig,
    DDPOTrainer,
    DefaultDDPOStableDiffusionPipeline,
)
from trl.errors import ConfigError, DataError
from trl.rewards.call import RewardError
from trl.trainers.diffusion.alignprop import Asked

SHORT = {
    "num_epochs": 2,
    "sample_num_steps": 2,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 2,
    "train_gradient_accumulation_steps": 1,
    "sample_guidance_scale": 1.0,
    "train_learning_rate": 1e-2,
    "mixed_precision": "no",
}


def prompt_function():
    return random.choice(["a red circle", "a blue square"]), {"kind": "drawing"}


def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3)), {"prompts": len(prompts)}


def pipeline_of(**options):
    made = DefaultDDPOStableDiffusionPipeline(PIPELINES["sd"](), **options)
    made.set_progress_bar_config(disable=True)
    return made


def ddpo(folder, *, reward=brightness, prompts=prompt_function, hook=None, pipeline=None, **options):
    torch.manual_seed(0)
    random.seed(0)
    config = DDPOConfig(**{**SHORT, "logdir": str(folder), **options})
    return DDPOTrainer(config, reward, prompts, pipeline or pipeline_of(), image_samples_hook=hook)


def weights_of(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters() if p.requires_grad])


# ---- the interface ----


def test_the_classic_listing(tmp_path, monkeypatch):
    """As users wrote it, but for the model's name and the numbers that make it short."""
    PIPELINES["sd"]().save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    seen = []

    def image_outputs_logger(image_data, global_step, accelerate_logger):
        images, prompts, _, rewards, _ = image_data[-1]
        result = {
            f"{prompt:.25} | {reward.item():.2f}": image
            for image, prompt, reward in zip(images, prompts, rewards, strict=True)
        }
        accelerate_logger.log_images(result, step=global_step)
        seen.append((global_step, result))

    parser = HfArgumentParser((DDPOConfig,))
    words = ["--num_epochs=2", "--train_gradient_accumulation_steps=1", "--sample_num_steps=3", "--sample_batch_size=2"]
    words += ["--train_batch_size=2", "--sample_num_batches_per_epoch=2", "--per_prompt_stat_tracking=True"]
    words += ["--per_prompt_stat_tracking_buffer_size=32"]
    (ddpo_config,) = parser.parse_args_into_dataclasses(args=words)
    ddpo_config.project_kwargs = {
        "logging_dir": "./logs",
        "automatic_checkpoint_naming": True,
        "total_limit": 5,
        "project_dir": "./save",
    }
    pipeline = DefaultDDPOStableDiffusionPipeline(
        str(tmp_path / "model"), pretrained_model_revision="main", use_lora=True
    )
    trainer = DDPOTrainer(ddpo_config, brightness, prompt_function, pipeline, image_samples_hook=image_outputs_logger)
    trainer.train()
    trainer.save_pretrained("saved")
    assert [step for step, _ in seen] == [0, 2]
    assert next(iter(seen[0][1].values())).shape == (3, 16, 16)
    assert (tmp_path / "save" / "checkpoint-4").is_dir()
    again = DefaultDDPOStableDiffusionPipeline("saved")
    state = {name: p for name, p in again.unet.named_parameters() if "lora_B" in name}
    trained = dict(trainer.model.named_parameters())
    assert state
    assert all(torch.equal(p, trained[name].cpu()) for name, p in state.items())


def test_every_option_of_other_releases_has_its_default():
    expected = {
        "run_name": "", "seed": 0, "log_with": None, "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {},
        "tracker_project_name": "trl", "logdir": "logs", "num_epochs": 100, "save_freq": 1, "num_checkpoint_limit": 5,
        "mixed_precision": "fp16", "allow_tf32": True, "resume_from": "", "sample_num_steps": 50, "sample_eta": 1.0,
        "sample_guidance_scale": 5.0, "sample_batch_size": 1, "sample_num_batches_per_epoch": 2, "train_batch_size": 1,
        "train_use_8bit_adam": False, "train_learning_rate": 3e-4, "train_adam_beta1": 0.9, "train_adam_beta2": 0.999,
        "train_adam_weight_decay": 1e-4, "train_adam_epsilon": 1e-8, "train_gradient_accumulation_steps": 1,
        "train_max_grad_norm": 1.0, "train_num_inner_epochs": 1, "train_cfg": True, "train_adv_clip_max": 5.0,
        "train_clip_range": 1e-4, "train_timestep_fraction": 1.0, "per_prompt_stat_tracking": False,
        "per_prompt_stat_tracking_buffer_size": 16, "per_prompt_stat_tracking_min_count": 16,
        "async_reward_computation": False, "max_workers": 2, "negative_prompts": "",
    }  # fmt: skip
    found = DDPOConfig().to_dict()
    assert found.pop("exp_name") is not None
    assert found == expected
    alone = {f.name for f in dataclasses.fields(AlignPropConfig)} - set(expected) - {"exp_name"}
    assert alone == {
        "log_image_freq", "truncated_backprop_rand", "truncated_backprop_timestep", "truncated_rand_backprop_minmax"
    }  # fmt: skip
    assert AlignPropConfig().train_learning_rate == 1e-3


def test_the_pipeline_has_log_probabilities(tmp_path):
    pipeline = pipeline_of()
    out = pipeline(
        ["a red circle", "a blue square"],
        num_inference_steps=3,
        guidance_scale=2.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    assert out.images.shape == (2, 3, 16, 16)
    assert (len(out.latents), len(out.log_probs)) == (4, 3)
    pipeline.scheduler.set_timesteps(3)
    denoiser = pipeline.denoiser
    for t in range(3):
        with torch.no_grad():
            texts = denoiser.collate([denoiser.encode([p])[0] for p in ("a red circle", "a blue square")])
            times = pipeline.scheduler.timesteps[t].float().expand(2)
            guided = type(denoiser)(pipeline.sd_pipeline, guidance_scale=2.0)
            noise = guided.output(pipeline.unet, out.latents[t], times, texts, guided.encode_negative())
            found = pipeline.scheduler_step(noise, times, out.latents[t], 1.0, prev_sample=out.latents[t + 1])
        assert torch.allclose(found.log_probs, out.log_probs[t], atol=1e-5)


def test_the_pipeline_begins_with_latents_that_are_given():
    pipeline, latents = pipeline_of(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = pipeline(["a red circle"] * 2, num_inference_steps=2, guidance_scale=1.0, latents=latents, callback=None)
    assert torch.equal(out.latents[0], latents)
    with pytest.raises(ConfigError, match="cross_attention_kwargs is not supported"):
        pipeline(["a red circle"], cross_attention_kwargs={"scale": 0.5})


def test_loops_of_ones_own(tmp_path):
    run = ddpo(tmp_path, save_freq=2)
    before = weights_of(run)
    step = 0
    for epoch in (1, 2):
        step = run.step(epoch, step)
    assert step == 4
    assert not torch.equal(weights_of(run), before)
    assert (tmp_path / "checkpoint_2" / "pytorch_lora_weights.safetensors").is_file()
    assert not (tmp_path / "checkpoint_1").exists()


def test_one_s_own_loop_learns_as_train_does(tmp_path):
    """One epoch of one optimizer step: the same pictures, the same step."""
    options = {"num_epochs": 1, "train_gradient_accumulation_steps": 2}
    loop = ddpo(tmp_path / "a", **options)
    loop.step(0, 0)
    plain = ddpo(tmp_path / "b", **options)
    plain.train()
    assert torch.allclose(weights_of(loop), weights_of(plain), atol=1e-6)


def test_losses_of_one_step(tmp_path):
    """`calculate_loss` on what was sampled: ρ = 1, so the loss is −mean A, and nothing is clipped."""
    run = ddpo(tmp_path, sample_guidance_scale=2.0)
    batch = run.sample_epoch()
    trajectories, denoiser = batch.trajectories, run.denoiser
    texts = run.texts(batch.prompts)["embeds"]
    negative = run.embeddings.negative()["embeds"].cpu().expand_as(texts)
    advantages = torch.tensor([1.0, -0.5, 2.0, 0.5])
    loss, kl, clipped = run.calculate_loss(
        trajectories.latents[:, 0],
        denoiser.pipeline.scheduler.timesteps[0].expand(4),
        trajectories.latents[:, 1],
        trajectories.logprobs[:, 0],
        advantages,
        torch.cat([negative, texts]),
    )
    assert loss.item() == pytest.approx(-0.75, abs=1e-4)
    assert kl.item() == pytest.approx(0, abs=1e-9)
    assert clipped.item() == 0


def test_inner_epochs_and_a_share_of_steps(tmp_path):
    run = ddpo(tmp_path, num_epochs=1, train_num_inner_epochs=2, train_timestep_fraction=0.5)
    run.train()
    assert run.state.global_step == 4
    assert run.state.num_input_tokens_seen == 2 * 4 * 1
    assert any(row["approx_kl"] > 0 for row in run.state.log_history if "approx_kl" in row)


def test_training_without_guidance(tmp_path):
    options = {"num_epochs": 1, "sample_guidance_scale": 2.0, "train_gradient_accumulation_steps": 2}
    plain, unguided = ddpo(tmp_path / "a", **options), ddpo(tmp_path / "b", train_cfg=False, **options)
    plain.train()
    unguided.train()
    assert [run.state.log_history[0]["approx_kl"] > 0 for run in (plain, unguided)] == [False, True]


def test_asynchronous_rewards_are_the_same(tmp_path):
    found = []
    for flag in (False, True):
        run = ddpo(tmp_path / str(flag), async_reward_computation=flag, num_epochs=1)
        run.train()
        found.append(weights_of(run))
    assert torch.equal(*found)


def test_resumes_to_the_bit_in_the_middle_of_an_epoch(tmp_path):
    options = {"num_epochs": 3, "per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 2}
    whole = ddpo(tmp_path, **options)
    whole.args.save_steps = 1
    whole.train()
    resumed = ddpo(tmp_path, resume_from=str(tmp_path / "checkpoint-3"), **options)
    random.seed(99)
    resumed.train()
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert whole.statistics_of_prompts.state_dict() == resumed.statistics_of_prompts.state_dict()


def test_steps_of_one_s_own_loop_that_are_not_finite_are_skipped(tmp_path):
    run = ddpo(tmp_path, train_gradient_accumulation_steps=2)
    Poison(run, at={0})
    before = weights_of(run)
    run.step(0, 0)
    assert torch.equal(weights_of(run), before)
    run.step(1, 1)
    assert run.steps.skipped == 1
    assert weights_of(run).isfinite().all()
    assert not torch.equal(weights_of(run), before)


def test_a_folder_of_checkpoints_is_resumed_from_its_newest(tmp_path):
    ddpo(tmp_path, num_epochs=1, train_gradient_accumulation_steps=2).train()
    resumed = ddpo(tmp_path, num_epochs=2, train_gradient_accumulation_steps=2, resume_from=str(tmp_path))
    resumed.train()
    assert resumed.state.global_step == resumed.rollouts == 2


# ---- bad input ----


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (lambda i, p, m: [1.0] * len(p), "returned a list: it has to return two values"),
        (lambda i, p, m: ([1.0], {}), "returned 1 rewards for 2 pictures"),
        (lambda i, p, m: ([1.0, math.nan], {}), "returned nan for picture 2 of the epoch"),
    ],
)
def test_rewards_that_nothing_can_be_learned_from(tmp_path, reward, words):
    with pytest.raises(RewardError, match=words):
        ddpo(tmp_path, reward=reward).train()


def test_prompts_that_are_no_texts(tmp_path):
    with pytest.raises(DataError, match="prompt_function: prompt is a int"):
        ddpo(tmp_path, prompts=lambda: (3, {})).train()
    for make in (ddpo, alignprop):  # a text of two letters is no prompt with its metadata
        with pytest.raises(DataError, match="prompt_function returned 'ab': .*two values"):
            make(tmp_path / make.__name__, prompts=lambda: "ab").train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sample_num_steps": 0}, "sample_num_steps=0"),
        ({"train_num_inner_epochs": 0}, "train_num_inner_epochs=0"),
        ({"sample_eta": 0.0}, "sample_eta=0.0"),
        ({"train_batch_size": 8}, "multiple of train_batch_size=8"),
        ({"sample_guidance_scale": 0}, "guidance_scale=0"),
        ({"sample_batch_size": 3}, "sample_batch_size=3 has to be a multiple of train_batch_size=2"),
        ({"train_gradient_accumulation_steps": 3}, "4 pictures on each of 1 processes"),
        ({"train_timestep_fraction": 0}, "train_timestep_fraction=0"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8'"),
        ({"log_with": "mlflow"}, "log_with='mlflow'"),
        ({"accelerator_kwargs": {"cpu": True}}, "accelerator_kwargs"),
        (
            {"per_prompt_stat_tracking": True, "per_prompt_stat_tracking_min_count": 99},
            "min_count=99 and buffer_size=16",
        ),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        ddpo(tmp_path, **options)


def test_arguments_of_the_wrong_kind(tmp_path):
    with pytest.raises(ConfigError, match="config is a AlignPropConfig: give a DDPOConfig"):
        DDPOTrainer(AlignPropConfig(), brightness, prompt_function, pipeline_of())
    with pytest.raises(ConfigError, match="a StableDiffusionPipeline without sd_pipeline"):
        DDPOTrainer(DDPOConfig(), brightness, prompt_function, PIPELINES["sd"]())
    with pytest.raises(ConfigError, match="use DiffusionGRPOTrainer"):
        DefaultDDPOStableDiffusionPipeline(PIPELINES["sd3"]())


# ---- AlignProp ----


def alignprop(folder, *, reward=brightness, prompts=prompt_function, hook=None, **options):
    torch.manual_seed(0)
    random.seed(0)
    short = {"num_epochs": 2, "sample_num_steps": 3, "sample_guidance_scale": 1.0, "train_batch_size": 2}
    short |= {"train_learning_rate": 1e-2}
    short |= {"mixed_precision": "no", "truncated_rand_backprop_minmax": (0, 3), "logdir": str(folder)}
    config = AlignPropConfig(**{**short, **options})
    return AlignPropTrainer(config, reward, prompts, pipeline_of(), image_samples_hook=hook)


def test_alignprop_raises_its_reward(tmp_path):
    """The same pictures are brighter after than before."""
    seen = []

    def hook(shown, step, tracker):
        seen.append((step, shown["images"].shape))

    run = alignprop(tmp_path, num_epochs=6, hook=hook)
    batch = run.collate([Asked("a red circle", seed, {}) for seed in range(8)]).to(run.args.device)

    def reward():
        with torch.no_grad():
            return 10 - run.loss(run.model, batch)[0].mean().item()

    before = reward()
    run.train()
    assert reward() > before + 0.001
    logged = run.state.log_history[0]
    assert logged["loss"] == pytest.approx(10 - logged["reward"], rel=1e-5)
    assert seen[1] == (0, (2, 3, 16, 16))


def test_alignprop_truncates(tmp_path):
    """Gradients of the last step alone, and of all: both reach the weights, and differ."""
    found = []
    for first in (2, 0):
        run = alignprop(tmp_path, truncated_backprop_rand=False, truncated_backprop_timestep=first, num_epochs=1)
        batch = run.collate(run.roll_out()[0]).to(run.args.device)
        loss, _ = run.loss(run.model, batch)
        loss.mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
    assert found[0].norm() > 0
    assert (found[0] - found[1]).norm() > 1e-3 * found[1].norm()


def test_alignprop_resumes_to_the_bit(tmp_path):
    whole = alignprop(tmp_path, num_epochs=3)
    whole.train()
    resumed = alignprop(tmp_path, num_epochs=3, resume_from=str(tmp_path / "checkpoint-2"))
    resumed.train()
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_alignprop_needs_gradients(tmp_path):
    with pytest.raises(RewardError, match="without a gradient"):
        alignprop(tmp_path, reward=lambda images, prompts, metadata: (images.detach().mean((1, 2, 3)), {})).train()


def test_gradients_through_the_classic_pipeline():
    pipeline = pipeline_of()
    pipeline.get_trainable_layers()
    out = pipeline.rgb_with_grad(
        ["a red circle"], num_inference_steps=3, guidance_scale=2.0, truncated_backprop_rand=False
    )
    out.images.mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in pipeline.unet.parameters())
