"""Online methods learn: the reward moves, within seconds."""

from __future__ import annotations

import pytest
from datasets import Dataset

from tests.conftest import make_tokenizer
from trl.trainers.grpo import GRPOConfig, GRPOTrainer
from trl.trainers.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
from trl.trainers.rloo import RLOOConfig, RLOOTrainer


def vowels(completions, **_):
    """The share of two letters of the alphabet."""
    return [sum(map(text.count, "ae")) / 6 for text in completions]


METHODS = {
    "grpo": (GRPOTrainer, GRPOConfig, {}),
    "gspo": (GRPOTrainer, GRPOConfig, {"importance_sampling_level": "sequence", "loss_type": "grpo"}),
    "cispo": (GRPOTrainer, GRPOConfig, {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2}),
    "rloo": (RLOOTrainer, RLOOConfig, {"beta": 0.0}),
    "online-dpo": (OnlineDPOTrainer, OnlineDPOConfig, {"per_device_train_batch_size": 8, "num_generations": 4}),
}


@pytest.mark.parametrize("method", METHODS)
def test_rewards_rise(make_model, tmp_path, method):
    trainer_class, config_class, own = METHODS[method]
    options = {
        "per_device_train_batch_size": 32,
        "num_generations": 8,
        "max_completion_length": 6,
        "max_steps": 20,
        "learning_rate": 3e-2,
        "temperature": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **own,
    }
    trainer = trainer_class(
        make_model("llama", num_hidden_layers=1),
        vowels,
        config_class(str(tmp_path), **options),
        train_dataset=Dataset.from_dict({"prompt": [f"Write {i}: " for i in range(4)]}),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert rewards[0] < 0.1
    assert rewards[-1] > 0.7
