"""From film reviews to a taste: a reward model learns the sentiment, DPO and KTO make a model write to please it.

The policy has read all reviews, half of them positive. It continues neutral openings; the reward model says which of
two continuations is positive, and the policy learns from that. Success is judged by a bag of words, which the reward
model knows nothing of.
"""

from __future__ import annotations

import copy
import re

import pytest
import torch
from datasets import Dataset
from transformers import GPT2ForSequenceClassification

from trl import SFTConfig, SFTTrainer
from trl.demo.model import make_model, train_tokenizer
from trl.demo.reviews import is_grammatical, load_reviews
from trl.demo.sample import prompt_openings, sample
from trl.rewards.model import RewardModel
from trl.rollouts.engine import Prompt
from trl.rollouts.local import LocalEngine
from trl.rollouts.sampling import SamplingParams
from trl.trainers.dpo import DPOTrainer
from trl.trainers.kto import KTOTrainer
from trl.trainers.reward import RewardTrainer

pytestmark = pytest.mark.long

TRAIN, TEST = load_reviews("train"), load_reviews("test")
PROMPTS = prompt_openings(TRAIN.select(range(2000)))
HELD_OUT = prompt_openings(TEST.select(range(200)))
SCHEDULE = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "per_device_train_batch_size": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("out"))


@pytest.fixture(scope="module")
def quiet(folder):
    return {"output_dir": folder, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 25, **SCHEDULE}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TRAIN["text"])


@pytest.fixture(scope="module")
def policy(tokenizer, quiet):
    """A model that writes reviews, as many good as bad ones."""
    torch.manual_seed(0)
    model = make_model(tokenizer)
    args = SFTConfig(learning_rate=4e-3, num_train_epochs=2, adam_beta2=0.98, max_length=128, **quiet)
    SFTTrainer(model, args, train_dataset=TRAIN, processing_class=tokenizer).train()
    return model


def opposites(reviews: Dataset) -> Dataset:
    """Pairs of a positive and a negative review."""
    sides = {name: [r["text"] for r in reviews if r["label"] == label] for name, label in COLUMNS.items()}
    return Dataset.from_dict(sides)


COLUMNS = {"chosen": "positive", "rejected": "negative"}


@pytest.fixture(scope="module")
def reward_trainer(policy, tokenizer, quiet):
    torch.manual_seed(0)
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = GPT2ForSequenceClassification(config)
    model.transformer.load_state_dict(policy.transformer.state_dict())
    trainer = RewardTrainer(
        model, tokenizer=tokenizer, train_dataset=opposites(TRAIN), learning_rate=1e-3, max_steps=150, **quiet
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def reward(reward_trainer, tokenizer):
    return RewardModel(reward_trainer.model, tokenizer)


@pytest.fixture(scope="module")
def preferences(policy, tokenizer, reward):
    """Two continuations of every prompt, the positive one chosen; prompts where both agree are left out."""
    samples = two_continuations(policy, tokenizer)
    rewards = [reward(PROMPTS, texts) for texts in samples]
    rows = zip(PROMPTS, *samples, *rewards, strict=True)
    pairs = [(p, a, b) if x > 0 else (p, b, a) for p, a, b, x, y in rows if x * y < 0]
    prompts, chosen, rejected = map(list, zip(*pairs, strict=True))
    return Dataset.from_dict({"prompt": prompts, "chosen": chosen, "rejected": rejected})


def two_continuations(model, tokenizer) -> list[list[str]]:
    """Two columns of sampled continuations of the prompts."""
    params = SamplingParams(temperature=0.7, max_new_tokens=64, seed=1)
    rollouts = LocalEngine(model, tokenizer, progress=False).generate(
        [Prompt(tokenizer.encode(prompt)) for prompt in PROMPTS], params, 2
    )
    return [[tokenizer.decode(pair[k].ids, skip_special_tokens=True) for pair in rollouts] for k in range(2)]


# ---- a judge that no model here has to do with ----


@pytest.fixture(scope="module")
def share_positive():
    """`share_positive(texts)`: by a logistic regression on words."""
    judge = BagOfWords(TRAIN)
    labels = torch.tensor([label == "positive" for label in TEST["label"]])
    assert (judge.is_positive(TEST["text"]) == labels).float().mean() > 0.9
    return lambda texts: judge.is_positive(texts).float().mean().item()


class BagOfWords:
    """−log p(label | words) minimised over one weight per word."""

    def __init__(self, reviews: Dataset) -> None:
        self.vocabulary = {w: i for i, w in enumerate(sorted({w for text in reviews["text"] for w in words(text)}))}
        self.weight = torch.zeros(len(self.vocabulary) + 1, requires_grad=True)
        counts = self.counts(reviews["text"])
        labels = torch.tensor([float(label == "positive") for label in reviews["label"]])
        optimizer = torch.optim.LBFGS([self.weight], max_iter=60)

        def loss():
            optimizer.zero_grad()
            fit = torch.nn.functional.binary_cross_entropy_with_logits(counts @ self.weight, labels)
            total = fit + 1e-4 * self.weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)

    def counts(self, texts):
        table = torch.zeros(len(texts), len(self.vocabulary) + 1)
        table[:, -1] = 1
        for row, text in zip(table, texts, strict=True):
            row[[self.vocabulary[w] for w in words(text) if w in self.vocabulary]] = 1
        return table

    @torch.no_grad()
    def is_positive(self, texts):
        return self.counts(texts) @ self.weight > 0


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def share_grammatical(texts: list[str]) -> float:
    return sum(map(is_grammatical, texts)) / len(texts)


# ---- what is shown ----


def test_a_reward_model_tells_good_reviews_from_bad(reward_trainer):
    found = reward_trainer.evaluate(reward_trainer.encode(opposites(TEST), "eval", "test"))
    print(f"held-out accuracy {found['eval_accuracy']:.3f}")
    assert found["eval_accuracy"] >= 0.95


METHODS = {
    "dpo": (DPOTrainer, {"learning_rate": 3e-4, "beta": 0.5, "rpo_alpha": 0.75, "num_train_epochs": 3}),
    "kto": (KTOTrainer, {"learning_rate": 2.5e-4, "beta": 0.5, "num_train_epochs": 2}),
}


@pytest.mark.parametrize("method", METHODS)
def test_samples_become_positive_and_stay_grammatical(
    policy, tokenizer, preferences, quiet, share_positive, reward, method
):
    kind, options = METHODS[method]
    model = copy.deepcopy(policy)
    before = sample(model, tokenizer, HELD_OUT)
    assert 0.35 < share_positive(before) < 0.65
    kind(model, tokenizer=tokenizer, train_dataset=preferences, **options, **quiet).train()
    after = sample(model, tokenizer, HELD_OUT)
    judged = reward(HELD_OUT, [text[len(prompt) :] for text, prompt in zip(after, HELD_OUT, strict=True)])
    print(f"{method}: positive {share_positive(before):.2f} → {share_positive(after):.2f} (words),", end=" ")
    print(f"{sum(r > 0 for r in judged) / len(judged):.2f} (reward model); ", end="")
    print(f"grammatical {share_grammatical(before):.2f} → {share_grammatical(after):.2f}", *after[:10], sep="\n")
    assert share_positive(after) >= 0.9
    assert sum(r > 0 for r in judged) / len(judged) >= 0.9
    assert share_grammatical(after) >= share_grammatical(before) - 0.15
    assert len(set(after)) == len(after)
