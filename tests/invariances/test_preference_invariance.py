"""The gradient of a step on preferences depends on its rows, not on how they were split, ordered or laid out."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from tests.conftest import VOCABULARY, WIDTHS, make_tokenizer
from trl.models.value_heads.ilql import with_ilql_heads
from trl.trainers.cpo import ORPOTrainer
from trl.trainers.dpo import DPOTrainer
from trl.trainers.ilql import ILQLTrainer
from trl.trainers.kto import KTOTrainer
from trl.trainers.reward import RewardTrainer

TEXT = "the quick brown fox jumps over a lazy dog and then runs far away from the sleepy old farm"
WORDS = TEXT.split()
EIGHT = range(8)
PROMPTS = [" ".join(WORDS[: 3 + i % 5]) for i in EIGHT]
SHORT = [f" {WORDS[i]} {i}" * (1 + i % 3) for i in EIGHT]
LONG = [f" {WORDS[-i - 1]}" * (1 + i % 4) for i in EIGHT]


def pairs(**columns) -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "chosen": SHORT, "rejected": LONG, **columns})


def labelled() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "completion": SHORT, "label": [i % 3 > 0 for i in EIGHT]})


def scored() -> Dataset:
    return Dataset.from_dict({"prompt": PROMPTS, "completion": SHORT, "score": [i / 4 - 1 for i in EIGHT]})


def steps() -> Dataset:
    completions = [WORDS[i : i + 1 + i % 3] for i in EIGHT]
    labels = [[(i + k) % 2 == 0 for k in range(1 + i % 3)] for i in EIGHT]
    return Dataset.from_dict({"prompt": PROMPTS, "completions": completions, "labels": labels})


def dialogues() -> Dataset:
    """Prompts and outputs in turn, two or four, with a reward each."""
    turns = [[PROMPTS[i], SHORT[i], LONG[i], SHORT[-i - 1]][: 2 + 2 * (i % 2)] for i in EIGHT]
    return Dataset.from_dict({"dialogue": turns, "reward": [i / 4 - 1 for i in EIGHT]})


def token_rewards() -> Dataset:
    rewards = [[(i + t) % 3 / 2 for t in range(len(SHORT[i]))] for i in EIGHT]
    return Dataset.from_dict({"prompt": PROMPTS, "completion": SHORT, "reward": rewards})


def margins() -> Dataset:
    return pairs(margin=[0.1 * i for i in EIGHT])


def classifier(make_model):
    """A reward model whose rewards are of the size of one."""
    torch.manual_seed(3)
    return LlamaForSequenceClassification(LlamaConfig(**WIDTHS, num_labels=1))


def language_model(make_model):
    return make_model("llama", seed=1)


def with_q_values(make_model):
    model = language_model(make_model)
    torch.manual_seed(3)
    return with_ilql_heads(model)


def encoder_decoder(make_model):
    model = make_model("t5", seed=1)
    torch.manual_seed(3)
    return with_ilql_heads(model)


def encoder(make_model):
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes, **quiet))


CASES = {
    "dpo": (DPOTrainer, language_model, pairs, {"beta": 0.1}),
    "dpo, mixed": (
        DPOTrainer,
        language_model,
        pairs,
        {"loss_type": ["ipo", "apo_zero", "sft"], "ld_alpha": 0.5, "use_weighting": True},
    ),
    "orpo": (ORPOTrainer, language_model, pairs, {}),
    "kto": (KTOTrainer, language_model, labelled, {"undesirable_weight": 1.7}),
    "bco": (KTOTrainer, language_model, labelled, {"loss_type": "bco"}),
    "ilql": (ILQLTrainer, with_q_values, dialogues, {"beta": 1.0}),
    "ilql, rewards of tokens": (ILQLTrainer, with_q_values, token_rewards, {"two_qs": True}),
    "reward": (RewardTrainer, classifier, margins, {"center_rewards_coefficient": 0.1}),
    "reward, scores": (RewardTrainer, classifier, scored, {}),
    "reward, steps": (RewardTrainer, classifier, steps, {}),
}
REFERENCED = (DPOTrainer, KTOTrainer)
ORDER = 2e-6 if not torch.cuda.is_available() else 2e-4
"""What another order of sums may change, of the largest gradient: a GPU has another kernel for every shape, and units of a
value head that are nearly zero are on or off."""
WHOLE = {"per_device_train_batch_size": 8}


def gradient(case, make_model, tmp_path, *, order=EIGHT, model=None, **options):
    """(loss, gradients) of one optimizer step on all rows: with plain SGD at rate 1, what the step took away."""
    kind, make, rows, changed = CASES[case]
    model = model or make(make_model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = {
        "output_dir": str(tmp_path),
        "num_train_epochs": 1,
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "bf16": False,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changed,
        **(WHOLE if not any("batch" in name for name in options) else {}),
        **options,
    }
    other = {"ref_model": make_model("llama", seed=2)} if kind in REFERENCED else {}
    trainer = kind(
        model, args=kind.config_class(**config), train_dataset=rows().select(order), tokenizer=make_tokenizer(), **other
    )
    trainer.train()
    assert trainer.state.global_step == 1
    log = trainer.state.log_history[0]
    return log, {name: before[name] - p.detach().cpu() for name, p in model.named_parameters()}


METRICS = {
    "loss",
    "rewards/margins",
    "rewards/accuracies",
    "accuracy",
    "margin",
    "min_reward",
    "max_reward",
    "kl",
    "entropy",
    "loss/q",
    "loss/v",
    "loss/cql",
    "loss/awac",
}


def assert_same(found, expected):
    for name in METRICS & expected[0].keys():
        assert found[0][name] == pytest.approx(expected[0][name], rel=1e-4, abs=1e-6), name
    assert any(value.abs().max() > 1e-6 for value in expected[1].values())
    largest = max(value.abs().max().item() for value in expected[1].values())
    for name, value in expected[1].items():
        torch.testing.assert_close(
            found[1][name], value, rtol=1e-4, atol=ORDER * largest + 1e-8, msg=lambda m, n=name: n + m
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one padded forward pass of all rows gives, by case."""
    found = {}

    def of(case, make_model):
        if case not in found:
            found[case] = gradient(case, make_model, tmp_path_factory.mktemp("whole"), layout="padded")
        return found[case]

    return of


VARIATIONS = {
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "token budget": {"max_tokens_per_micro_batch": 100},
    "packed": {"layout": "packed"},
    "shared": {"layout": "shared"},
    "order": {"order": [3, 1, 7, 0, 2, 6, 5, 4]},
}


@pytest.mark.parametrize("variation", VARIATIONS)
@pytest.mark.parametrize("case", CASES)
def test_same_step(make_model, tmp_path, whole, case, variation):
    expected = whole(case, make_model)
    assert_same(gradient(case, make_model, tmp_path, **VARIATIONS[variation]), expected)


def test_encoders_in_micro_batches(make_model, tmp_path):
    expected = gradient("reward", make_model, tmp_path, model=encoder(make_model))
    splits = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_same(gradient("reward", make_model, tmp_path, model=encoder(make_model), **splits), expected)


def test_encoder_decoders_in_micro_batches(make_model, tmp_path, monkeypatch):
    monkeypatch.setitem(CASES, "t5", (ILQLTrainer, encoder_decoder, token_rewards, {"beta": 1.0}))
    expected = gradient("t5", make_model, tmp_path)
    splits = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "order": [3, 1, 7, 0, 2, 6, 5, 4]}
    assert_same(gradient("t5", make_model, tmp_path, **splits), expected)


def test_pad_token_plays_no_role(make_model, tmp_path, monkeypatch):
    expected = gradient("reward", make_model, tmp_path, layout="padded")
    bare = make_tokenizer()
    bare.pad_token = None
    monkeypatch.setattr("tests.invariances.test_preference_invariance.make_tokenizer", lambda: bare)
    model = classifier(make_model)
    model.config.pad_token_id = None
    assert_same(gradient("reward", make_model, tmp_path, layout="padded", model=model), expected)
