"""Positions that models have embeddings for, by their tables; none of models that compute them."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    BartConfig,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    RobertaConfig,
    T5Config,
)

from tests.vision.support import FAMILIES
from trl.models.positions import learned_positions, pretrained_length

SMALL = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=32), 32),
        (OPTConfig(**SMALL, ffn_dim=8, word_embed_proj_dim=8, max_position_embeddings=32), 32),
        (BertConfig(**SMALL, intermediate_size=8, max_position_embeddings=32), 32),
        (RobertaConfig(**SMALL, intermediate_size=8, max_position_embeddings=34, pad_token_id=1), 32),
        (
            BartConfig(
                vocab_size=8,
                d_model=8,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=1,
                decoder_attention_heads=1,
                encoder_ffn_dim=8,
                decoder_ffn_dim=8,
                max_position_embeddings=32,
            ),
            32,
        ),
        (LlamaConfig(**SMALL, intermediate_size=8, max_position_embeddings=32), None),
        (BloomConfig(vocab_size=8, hidden_size=8, n_layer=1, n_head=1), None),
        (T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8), None),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_positions_of_families(config, positions):
    with torch.device("meta"):
        assert learned_positions(AutoModel.from_config(config)) == positions


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(**SMALL, intermediate_size=8, max_position_embeddings=32), 32),
        (LlamaConfig(**SMALL, intermediate_size=8, max_position_embeddings=32, rope_parameters=YARN), 128),
        (LlamaConfig(**SMALL, intermediate_size=8, max_position_embeddings=128, rope_parameters=YARN), 128),
        (GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1, n_positions=32), None),
        (T5Config(vocab_size=8, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8), None),
    ],
)
def test_sequences_that_a_model_with_computed_positions_is_made_for(config, length):
    with torch.device("meta"):
        assert pretrained_length(AutoModel.from_config(config)) == length


@pytest.mark.parametrize("name", FAMILIES)
def test_tables_of_image_encoders_are_of_places_in_images(name):
    assert learned_positions(FAMILIES[name]().model) is None
