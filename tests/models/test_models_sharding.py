"""Modules that share their weights, before weights become shards. Shards themselves: see tests/distributed."""

from __future__ import annotations

import torch

from trl.models.sharding import shards, share_modules

IDS = {"input_ids": torch.tensor([[5, 9, 7]]), "decoder_input_ids": torch.tensor([[2, 6]])}


def test_embeddings_of_encoder_and_decoder_become_one_module(make_model):
    model = make_model("bart")
    before, names = model(**IDS).logits, model.state_dict().keys()
    share_modules(model)
    assert model.model.encoder.embed_tokens is model.model.decoder.embed_tokens is model.model.shared
    assert torch.equal(model(**IDS).logits, before)
    assert model.state_dict().keys() == names


def test_modules_that_do_something_else_stay_apart(make_model):
    model = make_model("bart")
    model.model.decoder.embed_tokens.embed_scale = 2.0
    before = model(**IDS).logits
    share_modules(model)
    assert model.model.encoder.embed_tokens is model.model.shared is not model.model.decoder.embed_tokens
    assert torch.equal(model(**IDS).logits, before)


def test_of_a_model_in_one_process_shards_are_its_weights(make_model):
    model = make_model("llama")
    shards(model)["lm_head.weight"].zero_()
    assert not model.lm_head.weight.any()
