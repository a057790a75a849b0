"""The demo's tokenizer, model and samples."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from trl.demo.model import make_model, train_tokenizer
from trl.demo.reviews import load_reviews
from trl.demo.sample import prompt_openings, sample


@pytest.fixture(scope="module")
def reviews():
    return load_reviews("test")


@pytest.fixture(scope="module")
def tokenizer(reviews):
    return train_tokenizer(reviews["text"], vocab_size=512)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return make_model(tokenizer, width=32, depth=1)


def test_round_trip(tokenizer, reviews):
    for text in [*reviews["text"][:50], "  Größe, 日本 🙂\n\ttabs ", ""]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_padding_and_end_are_different_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert len(tokenizer) == 512


def test_saved_tokenizer_is_the_same(tokenizer, reviews, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again(reviews["text"][:20])["input_ids"] == tokenizer(reviews["text"][:20])["input_ids"]
    assert (again.pad_token_id, again.eos_token_id, again.model_max_length) == (0, 1, 128)


def test_most_words_are_one_token_at_the_default_size():
    texts = load_reviews("train")["text"]
    tokenizer = train_tokenizer(texts)
    known = {word.strip(".,;") for text in texts for word in text.split()[1:]}
    split = [word for word in known if len(tokenizer(f" {word}")["input_ids"]) > 1]
    assert len(split) < 0.05 * len(known)
    assert max(len(tokenizer(text)["input_ids"]) for text in texts) < 80


def test_default_model_has_one_to_three_million_parameters(tokenizer):
    assert 1e6 < make_model(train_tokenizer(load_reviews("train")["text"])).num_parameters() < 3e6


def test_a_fresh_model_knows_nothing(model, tokenizer, reviews):
    ids = tokenizer(reviews["text"][0], return_tensors="pt")["input_ids"]
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(torch.log(torch.tensor(512.0)).item(), abs=0.1)


def test_openings_are_the_first_words():
    rows = [{"text": "In Salt Anchor, a nurse returns home."}, {"text": "Skip it."}]
    assert prompt_openings(rows, words=3) == ["In Salt Anchor,", "Skip it."]


def test_an_opening_is_tokenized_as_in_its_review(tokenizer, reviews):
    for text, opening in zip(reviews["text"], prompt_openings(reviews, words=4), strict=True):
        ids = tokenizer(opening)["input_ids"]
        assert tokenizer(text)["input_ids"][: len(ids)] == ids


def test_samples_continue_their_prompts(model, tokenizer):
    prompts = ["In Salt Anchor,", "We watched The Ferry and the Garden, the second"]
    samples = sample(model, tokenizer, prompts, max_new_tokens=5)
    assert all(text.startswith(prompt) for text, prompt in zip(samples, prompts, strict=True))
    assert samples != prompts


def test_same_seed_same_samples(model, tokenizer):
    prompts = ["In Salt Anchor,"] * 4
    first = sample(model, tokenizer, prompts, max_new_tokens=8, seed=3)
    assert sample(model, tokenizer, prompts, max_new_tokens=8, seed=3) == first
    assert sample(model, tokenizer, prompts, max_new_tokens=8, seed=4) != first


def test_sampling_leaves_random_state_and_mode_alone(model, tokenizer):
    model.train()
    before = torch.get_rng_state()
    sample(model, tokenizer, ["In"], max_new_tokens=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
