"""Configurations and triplets that PPO takes, and those that it refuses, with the words."""

from __future__ import annotations

import pytest
import torch

from tests.trainers.ppo_support import (
    TRIPLETS,
    tensors,
)
from trl.errors import ConfigError, DataError
from trl.models.value_heads.auto_models import with_value_head
from trl.trainers.ppo.trainer import PPOConfig, PPOTrainer

pytestmark = pytest.mark.usefixtures("own_folder")


# ---- configuration ----


def test_classic_defaults():
    config = PPOConfig()
    expected = {
        "seed": 0,
        "log_with": None,
        "task_name": None,
        "model_name": "gpt2",
        "query_dataset": "imdb",
        "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb",
        "remove_unused_columns": True,
        "tracker_kwargs": {},
        "accelerator_kwargs": {},
        "project_kwargs": {},
        "tracker_project_name": "trl",
        "push_to_hub_if_best_kwargs": {},
        "compare_steps": 1,
        "steps": 20_000,
        "learning_rate": 1.41e-5,
        "batch_size": 128,
        "mini_batch_size": 128,
        "forward_batch_size": None,
        "gradient_accumulation_steps": 1,
        "ppo_epochs": 4,
        "max_grad_norm": None,
        "optimize_device_cache": False,
        "gradient_checkpointing": False,
        "adap_kl_ctrl": True,
        "init_kl_coef": 0.2,
        "kl_penalty": "kl",
        "target": 6,
        "horizon": 10_000,
        "gamma": 1,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "early_stopping": False,
        "target_kl": 1,
        "ratio_threshold": 10,
        "use_score_scaling": False,
        "use_score_norm": False,
        "score_clip": None,
        "whiten_rewards": False,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.exp_name


def test_older_and_standard_names():
    config = PPOConfig(optimize_cuda_cache=True, kl_coef=0.1, accelerator_kwargs={"cpu": True}, output_dir="x")
    assert (config.optimize_device_cache, config.init_kl_coef, config.use_cpu) == (True, 0.1, True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 8, "mini_batch_size": 3}, "batch_size=8 must be a multiple of .* = 3 × 1 = 3"),
        ({"batch_size": 8, "mini_batch_size": 4, "gradient_accumulation_steps": 4}, "4 × 4 = 16"),
        ({"batch_size": 0}, "batch_size=0: give 1 or more"),
        ({"batch_size": "4"}, "batch_size='4' is text: give an int"),
        ({"kl_penalty": "ful"}, "Unknown kl_penalty 'ful'. Did you mean 'full'"),
        ({"use_score_norm": True}, "set use_score_scaling=True as well"),
        ({"push_to_hub_if_best_kwargs": {"private": True}}, 'needs a "repo_id"'),
        ({"accelerator_kwargs": {"mixed": "bf16"}}, "accelerator_kwargs has no entry 'mixed'"),
        ({"horizon": 0}, "horizon=0: give more than 0"),
        ({"batchsize": 8}, "PPOConfig has no option 'batchsize'. Did you mean 'batch_size'"),
    ],
)
def test_options_that_cannot_be(options, words):
    with pytest.raises(ConfigError, match=words):
        PPOConfig(**options)


# ---- bad input ----


@pytest.fixture(scope="module")
def patient():
    """A trainer that is only ever given what it refuses."""
    from tests.conftest import MODELS, make_tokenizer

    return PPOTrainer(PPOConfig(batch_size=4), with_value_head(MODELS["llama"]()), None, make_tokenizer())


def changed(part, index, value):
    lists = [list(entries) for entries in TRIPLETS]
    lists[part][index] = value
    return lists


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((TRIPLETS[0][:3], *TRIPLETS[1:]), "queries has 3 entries, but batch_size=4.*set batch_size=3 in PPOConfig"),
        ((TRIPLETS[0], TRIPLETS[1][:2], TRIPLETS[2]), "responses has 2 entries, but batch_size=4"),
        ((*TRIPLETS[:2], TRIPLETS[2][:1]), "scores has 1 entries, but batch_size=4"),
        ((torch.zeros(4, 3).long(), *TRIPLETS[1:]), "queries has to be a list with one tensor per sample, got Tensor"),
        (changed(0, 2, torch.tensor([], dtype=torch.long)), r"queries\[2\] is empty"),
        (changed(1, 1, torch.tensor([], dtype=torch.long)), r"responses\[1\] is empty: sample at least one token"),
        (changed(1, 1, [5, 6]), r"responses\[1\] has to be a tensor of token ids, got list"),
        (changed(1, 3, torch.zeros(2, 3).long()), r"responses\[3\] has shape \(2, 3\)"),
        (changed(0, 0, torch.tensor([500])), r"queries\[0\] holds the token 500, but those of the model are 0 to 98"),
        (changed(1, 0, torch.tensor([5, -100])), r"responses\[0\] holds the token -100.*padded with -100"),
        (changed(0, 0, torch.tensor([1.0])), r"queries\[0\] holds torch.float32 numbers: token ids are integers"),
        (changed(2, 2, torch.tensor([1.0, 2.0])), r"scores\[2\] has shape \(2,\): a score is one number per response"),
        (changed(2, 1, torch.tensor(float("nan"))), r"scores\[1\] is nan: give a finite number"),
        (changed(2, 0, float("inf")), r"scores\[0\] is inf"),
    ],
)
def test_triplets_that_cannot_be_learned_from(patient, arguments, words):
    with pytest.raises(DataError, match=words):
        patient.step(*arguments)


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        ([[1, 1, 1], [1] * 5, [1]], "response_masks has 3 entries, but batch_size=4"),
        (
            [[1, 1, 1], [1] * 5, [1, 1], [1] * 4],
            r"response_masks\[2\] has 2 entries for the 1 tokens of responses\[2\]",
        ),
        ([[1, 1, 1], [0] * 5, [1], [1] * 4], r"response_masks\[1\] masks all 5 tokens"),
    ],
)
def test_masks_that_cannot_be(patient, masks, words):
    with pytest.raises(DataError, match=words):
        patient.step(*TRIPLETS, tensors(masks))


def test_trainers_that_cannot_be(make_model, tokenizer):
    model = with_value_head(make_model("llama"))
    with pytest.raises(ConfigError, match="model and ref_model are the same object"):
        PPOTrainer(PPOConfig(), model, model, tokenizer)
    with pytest.raises(ConfigError, match="model is missing"):
        PPOTrainer(PPOConfig())
    with pytest.raises(ConfigError, match="config and args are two names"):
        PPOTrainer(PPOConfig(), model, args=PPOConfig())
    with pytest.raises(ConfigError, match="lr_scheduler was given without the optimizer"):
        PPOTrainer(PPOConfig(), model, None, tokenizer, lr_scheduler=object())
    with pytest.raises(ConfigError, match="quantization_config was given, but the model is an object"):
        PPOTrainer(PPOConfig(), model, None, tokenizer, quantization_config=object())
