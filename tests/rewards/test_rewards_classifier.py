"""A text classifier as a reward function: which label is meant, and what its log-odds are."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from tests.conftest import GPT2, MODELS, make_tokenizer
from trl.errors import ConfigError, DataError, ModelError
from trl.rewards.classifier import ClassifierReward, find_label, log_odds
from trl.rewards.reward import make_rewards


def bert(labels, **config):
    """A tiny encoder with these labels."""
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=99, pad_token_id=0, id2label=dict(enumerate(labels)), **widths, **config)
    )


def with_logits(model, logits):
    """The model, giving these logits whatever it reads."""
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(logits))
    return model


def test_two_labels_give_the_difference_of_their_logits():
    reward = ClassifierReward(with_logits(bert(["NEGATIVE", "POSITIVE"]), [1.0, 3.5]), make_tokenizer())
    assert reward(["p", "qq"], ["a", "b"]) == pytest.approx([2.5, 2.5])
    assert reward.label_name == "POSITIVE"


def test_several_labels_by_hand():
    # p = (1, 2, 1) / 4: the odds of the middle one are 2 : 2, of the first 1 : 3
    logits = torch.tensor([[0.0, math.log(2), 0.0]])
    assert log_odds(logits, 1).tolist() == pytest.approx([0.0], abs=1e-6)
    assert log_odds(logits, 0).tolist() == pytest.approx([math.log(1 / 3)])


def test_one_label_and_labels_that_do_not_exclude_each_other_give_a_logit():
    assert ClassifierReward(with_logits(bert(["score"]), [0.75]), make_tokenizer())(["p"], ["a"]) == [0.75]
    both = with_logits(bert(["toxic", "positive"], problem_type="multi_label_classification"), [9.0, 0.5])
    assert ClassifierReward(both, make_tokenizer())(["p"], ["a"]) == [0.5]


@pytest.mark.parametrize(
    ("labels", "wanted", "number"),
    [
        (["NEGATIVE", "POSITIVE"], None, 1),
        (["Positive", "neutral", "negative"], None, 0),
        (["neg", "pos"], None, 1),
        (["LABEL_0", "LABEL_1"], "label_1", 1),
        (["1 star", "5 stars"], "5 stars", 1),
        (["a", "b"], 0, 0),
        (["a", "b"], "1", 1),
        (["anything"], None, 0),
    ],
)
def test_the_label_that_is_meant(labels, wanted, number):
    assert find_label(dict(enumerate(labels)), wanted) == number


@pytest.mark.parametrize(
    ("labels", "wanted", "message"),
    [
        (["LABEL_0", "LABEL_1"], None, "labels are 'LABEL_0', 'LABEL_1', and none of them .* give positive_label"),
        (["positive", "very positive"], None, "and several of them are called positive"),
        (["NEGATIVE", "POSITIVE"], "POSTIVE", "Unknown positive_label 'POSTIVE'. Did you mean 'POSITIVE'"),
    ],
)
def test_labels_that_are_not_clear(labels, wanted, message):
    with pytest.raises(ConfigError, match=message):
        find_label(dict(enumerate(labels)), wanted)


def test_neither_batch_nor_padding_plays_a_role():
    prompts, completions = ["a", "bcd", "ef", "ghijk"], ["x", "yyy", "zzzzzz", ""]
    decoder = GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=2))
    for model in (bert(["neg", "pos"]), decoder):
        tokenizer = make_tokenizer()
        reward = ClassifierReward(model, tokenizer, positive_label=1, batch_size=3)
        alone = []
        for prompt, completion in zip(prompts, completions, strict=True):
            logits = model(torch.tensor([tokenizer(prompt + completion)["input_ids"]])).logits[0]
            alone.append((logits[1] - logits[0]).item())
        assert reward(prompts, completions) == pytest.approx(alone, abs=1e-5)


def test_a_decoder_without_a_pad_token():
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    model = GPT2ForSequenceClassification(GPT2Config(**{**GPT2, "pad_token_id": None}, num_labels=1))
    together = ClassifierReward(model, tokenizer)(["a", "bcd"], ["x", "yz"])
    assert together[0] == pytest.approx(ClassifierReward(model, tokenizer)(["a"], ["x"])[0], abs=1e-5)


def test_long_texts_are_cut_and_conversations_read():
    tokenizer = make_tokenizer(model_max_length=32)
    reward = ClassifierReward(bert(["neg", "pos"], max_position_embeddings=32), tokenizer)
    assert reward(["a" * 100], ["b" * 8]) == pytest.approx(reward(["a" * 24], ["b" * 8]))
    assert reward(["a" * 100], ["b" * 8]) != pytest.approx(reward(["a" * 100], ["c" * 8]))
    said = reward([[{"role": "user", "content": "Was it?"}]], [[{"role": "assistant", "content": "It was."}]])
    assert said == reward([""], ["It was."])


def test_by_name_with_a_name_in_logs(tmp_path):
    folder = tmp_path / "sentiment"
    bert(["neg", "pos"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (reward,) = make_rewards(ClassifierReward(str(folder)))
    assert reward.name == "sentiment"
    assert len(reward.function(prompts=["a"], completions=["b"])) == 1


def test_the_name_of_a_classifier_is_enough_where_a_label_is_called_positive(tmp_path):
    for name, labels in {"named": ["neg", "pos"], "stars": ["1 star", "2 stars", "3 stars"]}.items():
        bert(labels).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    (reward,) = make_rewards(str(tmp_path / "named"))
    assert reward.function.label_name == "pos"
    with pytest.raises(
        ConfigError, match=r"none of them are called positive: .* ClassifierReward\(model, positive_label="
    ):
        make_rewards(str(tmp_path / "stars"))


def test_a_model_without_a_head(tmp_path):
    MODELS["gpt2"]().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"is not a trained classifier: it has no score.weight, so that its rewards would be random"
    ):
        ClassifierReward(str(tmp_path))


def test_numbers_that_do_not_match():
    with pytest.raises(DataError, match="1 completions were given for 2 prompts"):
        ClassifierReward(bert(["neg", "pos"]), make_tokenizer())(["p", "q"], ["a"])
