"""DiffusionNFT's and Diffusion-DPO's trainers: identities, splits, resuming, bad input."""

import math
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.diffusion.support import LORA, OPTIONS, ROLLOUTS, Poison, online, options_for, pairs, pipeline_of, weights_of
from trl.diffusion.forward_process import NoisedPicture
from trl.errors import ConfigError, DataError, RowError
from trl.trainers.diffusion.dpo import DiffusionDPOConfig, DiffusionDPOTrainer, as_tensor, check_pictures
from trl.trainers.diffusion.nft import DiffusionNFTConfig, DiffusionNFTTrainer
from trl.training.nonfinite import NonFiniteError
from trl.types import Experience
from trl.vision.images import ORIENTATION


def nft(folder, name="sd3", **options):
    return online(DiffusionNFTTrainer, folder, name, **{"guidance_scale": 1.0, **options})


def dpo(folder, name="sd3", *, rows=None, lora=True, **options):
    args = DiffusionDPOConfig(output_dir=str(folder), **{**OPTIONS, **options_for(name), **options})
    torch.manual_seed(0)
    return DiffusionDPOTrainer(
        model=pipeline_of(name), args=args, train_dataset=rows or pairs(), peft_config=LORA if lora else None
    )


def logged(run, name):
    return [row[name] for row in run.state.log_history if name in row]


# ---- steps ----


@pytest.mark.parametrize("make", [nft, dpo])
@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_steps_do_not_depend_on_the_split(tmp_path, make, name):
    plain = make(tmp_path / "a", name, optim="sgd", max_steps=1)
    plain.train()
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps_per_micro_batch": 2}
    other = make(tmp_path / "b", name, optim="sgd", max_steps=1, **split)
    other.train()
    before = weights_of(make(tmp_path / "c", name))
    moved = (weights_of(plain) - before).norm()
    assert moved > 1e-6
    assert (weights_of(plain) - weights_of(other)).norm() < 1e-4 * moved


@pytest.mark.parametrize("make", [nft, dpo])
def test_resumes_to_the_bit(tmp_path, make):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = make(tmp_path, **options)
    whole.train()
    resumed = make(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights_of(whole), weights_of(resumed))


def test_nft_resumes_in_the_middle_of_a_rollout_batch(tmp_path):
    options = {"steps_per_generation": 2, "per_device_train_batch_size": 2, "max_steps": 4, "old_decay_max": 0.9}
    options |= {"old_decay_rate": 0.5, "save_strategy": "steps", "save_steps": 3}
    whole = nft(tmp_path, **options)
    whole.train()
    resumed = nft(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights_of(whole), weights_of(resumed))
    assert all(torch.equal(whole.old.weights[name], value) for name, value in resumed.old.weights.items())


@pytest.mark.parametrize("make", [nft, dpo])
def test_steps_that_are_not_finite(tmp_path, make):
    run = make(tmp_path, max_steps=3)
    run.add_callback(Poison(run, at={0}))
    run.train()
    assert run.steps.skipped == 1
    assert weights_of(run).isfinite().all()
    run = make(tmp_path, max_steps=3, max_skipped_steps=2)
    run.add_callback(Poison(run, at=range(3)))
    with pytest.raises(NonFiniteError, match="at noise level"):
        run.train()


# ---- NFT ----


@pytest.mark.parametrize("lora", [True, False])
def test_nft_begins_at_its_old_policy_and_reference(tmp_path, lora):
    run = nft(tmp_path, lora=lora, max_steps=3, old_decay_rate=0.3, learning_rate=1e-3)
    run.train()
    assert logged(run, "old_distance")[0] == logged(run, "ref_distance")[0] == 0
    assert logged(run, "ref_distance")[2] > logged(run, "old_distance")[2] > 0


def test_nft_fits_good_pictures_by_the_new_policy_and_bad_ones_by_its_reflection(tmp_path):
    run = nft(tmp_path, beta=0, nft_beta=1.0)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(2, *run.denoiser.latent_shape, generator=generator)
    items = [NoisedPicture((clean[i],), "a circle", 0.5, i, {"optimality": float(i == 0)}) for i in range(2)]
    batch = run.collate(items).to(run.args.device)
    noised = batch.noised(run.denoiser)
    with torch.no_grad():
        old = run._output(run.module, noised)
        for p in run.module.parameters():
            p.add_(p.requires_grad * 0.2 * torch.randn(p.shape, generator=generator).to(p))
        new = run._output(run.module, noised)
        loss, metrics = run.loss(run.module, batch)
    assert not torch.allclose(new, old, atol=1e-2)
    for i, velocity in enumerate((new[0], 2 * old[1] - new[1])):
        error = 0.5 * (velocity - noised.target[i])
        assert loss[i, 0].item() == pytest.approx((error.square().mean() / error.abs().mean()).item(), rel=1e-4)
    distance = (new - old).square().flatten(1).mean(1)
    assert torch.allclose(metrics["old_distance"], distance, rtol=1e-4)


@pytest.mark.parametrize(("clip", "expected"), [(4.0, [0.375, 0.625, 0.5, 0.5]), (0.5, [0.0, 1.0, 0.5, 0.5])])
def test_nft_optimality_of_pictures_by_hand(tmp_path, clip, expected):
    """r = ½ + A / 2c: of a group's rewards 0 and 2, each 1 from their mean; and of equal ones."""
    run = nft(tmp_path, advantage_clip=clip, scale_rewards="none")
    rewards, group = torch.tensor([0.0, 2.0, 7.0, 7.0]), torch.tensor([0, 0, 1, 1])
    found = run.advantages(Experience(rewards, group, torch.ones(4, 1)))
    assert found.signals["optimality"].tolist() == pytest.approx(expected)


def test_nft_samples_by_the_old_policy(tmp_path):
    """With decay 0 the old policy is the trained one of the rollout batch's beginning; with more it lags behind."""
    run = nft(tmp_path, max_steps=1, learning_rate=1e-3)
    before = weights_of(run).clone()
    run.train()
    assert torch.equal(torch.cat([w.flatten() for w in run.old.weights.values()]), before)
    with run.sampling_policy():  # the second rollout batch: decay 0.001
        sampling = weights_of(run)
    assert torch.allclose(sampling, torch.lerp(before, weights_of(run), 0.999), atol=1e-6)


def test_nft_counts_noisy_versions(tmp_path):
    run = nft(tmp_path, max_steps=1, noise_levels=3)
    run.train()
    assert run.state.num_input_tokens_seen == 4 * 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nft_beta": 0}, "nft_beta=0"),
        ({"old_decay_max": 1.0}, "old_decay_max=1.0"),
        ({"noise_levels": 0}, "noise_levels=0"),
        ({"num_generations": 1}, "at least 2 pictures"),
    ],
)
def test_nft_options_that_cannot_be(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        DiffusionNFTConfig(output_dir=str(tmp_path), **{**ROLLOUTS, **options})


# ---- DPO ----


HALF = {"bf16": True, "use_cpu": not torch.cuda.is_available()}


@pytest.mark.parametrize(("lora", "precision"), [(True, {}), (False, {}), (False, HALF)])
def test_dpo_begins_at_ln_2(tmp_path, lora, precision):
    run = dpo(tmp_path, lora=lora, learning_rate=1e-4, **precision)
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(run, "loss")[1] != pytest.approx(math.log(2), abs=1e-5)


def test_dpo_evaluates_alike_each_time(tmp_path):
    run = dpo(tmp_path, max_steps=1)
    run.train()
    rows = run.train_dataset
    first, second = run.evaluate(rows), run.evaluate(rows)
    assert first["eval_loss"] == second["eval_loss"]
    assert first["eval_rewards/accuracies"] == second["eval_rewards/accuracies"]


def test_dpo_prefers_what_is_preferred(tmp_path):
    """Eight pairs by heart: the share of them that the policy ranks right, and its loss."""
    run = dpo(tmp_path, "sd", lora=False, max_steps=12, learning_rate=3e-3, beta=200.0, per_device_train_batch_size=8)
    run.train()
    assert sum(logged(run, "rewards/accuracies")[-3:]) / 3 >= 0.9
    assert sum(logged(run, "loss")[-3:]) / 3 < 0.5


def test_pictures_as_they_come():
    red = Image.new("RGBA", (8, 4), (255, 0, 0, 255))
    found = as_tensor(red, (16, 16))
    assert found.shape == (3, 16, 16)
    assert found[0].min() > 0.999
    assert found[1:].max() < 0.001
    same = torch.rand(3, 16, 16)
    assert torch.equal(as_tensor(same, (16, 16)), same)
    with pytest.raises(DataError, match=r"has the shape \(16, 16\)"):
        as_tensor(torch.zeros(16, 16), (16, 16))
    with pytest.raises(DataError, match="values from 0 to 255"):
        as_tensor(torch.tensor([0.0, 255.0]).expand(3, 2, 2), (2, 2))
    with pytest.raises(DataError, match="is a list, which is no picture"):
        as_tensor(["a"], (16, 16))


def test_pictures_in_files(tmp_path):
    blue = Image.new("RGB", (16, 16), (0, 0, 255))
    blue.save(tmp_path / "blue.png")
    file = tmp_path / "blue.png"
    for stored in (str(file), file, file.read_bytes(), {"bytes": file.read_bytes(), "path": None}):
        assert torch.equal(as_tensor(stored, (16, 16)), as_tensor(blue, (16, 16)))
    assert torch.equal(as_tensor("blue.png", (16, 16), str(tmp_path)), as_tensor(blue, (16, 16)))


@pytest.mark.parametrize("picture", [None, "missing.png", "no.png", "cut.png"])
@pytest.mark.parametrize("kind", ["paths", "images"])
def test_dpo_finds_a_picture_that_is_none_before_training(tmp_path, monkeypatch, picture, kind):
    """What is cut off behind the head of its file is found in training alone."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16), (0, 0, 255)).save("blue.png")
    Path("no.png").write_text("nothing")
    Path("cut.png").write_bytes(Path("blue.png").read_bytes()[:40])
    rows = Dataset.from_dict(
        {"prompt": ["a"] * 3, "chosen": ["blue.png"] * 3, "rejected": ["blue.png"] * 2 + [picture]}
    )
    rows = rows if kind == "paths" else rows.cast_column("rejected", datasets.Image())
    with pytest.raises(RowError, match="^Row 3, column 'rejected': "):
        dpo(tmp_path, rows=rows, shuffle_dataset=False, per_device_train_batch_size=3).train()
    if picture != "cut.png":
        for check in (check_pictures, partial(DiffusionDPOTrainer.check_rows, args=DiffusionDPOConfig(str(tmp_path)))):
            with pytest.raises(RowError, match="^Row 3, column 'rejected': "):
                check(rows, "train")


def test_a_picture_stands_upright():
    lying = Image.new("RGB", (16, 16), (0, 0, 255))
    lying.paste((255, 255, 0), (0, 0, 8, 16))
    exif = lying.getexif()
    exif[ORIENTATION] = 6
    file = BytesIO()
    lying.save(file, format="PNG", exif=exif)
    found = as_tensor(file.getvalue(), (16, 16))
    assert found[0, :8].min() == 1, "its left half is above"
    assert found[0, 8:].max() == 0


def test_dpo_rows_without_pictures(tmp_path):
    with pytest.raises(DataError, match="train_dataset has no column 'rejected'"):
        dpo(tmp_path, rows=Dataset.from_dict({"prompt": ["a"], "chosen": [[[[0.0]]]]}))
    nameless = pairs(2).remove_columns("prompt").add_column("prompt", [None, "a"])
    with pytest.raises(RowError, match="Row 1, column 'prompt'"):
        dpo(tmp_path, rows=nameless)
    with pytest.raises(ConfigError, match="beta=0"):
        dpo(tmp_path, beta=0)


@pytest.mark.parametrize("options", [{"layout": "packed"}, {"image_folder": "images"}, {"cuda_graphs": True}])
def test_options_of_language_models_are_refused(tmp_path, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))}=.* has no effect on a diffusion model"):
        DiffusionNFTConfig(output_dir=str(tmp_path), **options)
