"""Dropout, which has many names, switched off."""

import pytest
import torch
from transformers import BartConfig, BartForCausalLM, BloomConfig, BloomForCausalLM, OPTConfig, OPTForCausalLM

from trl.models.load import disable_dropout

TOKENS = torch.arange(2, 10)[None]
BART = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16, "vocab_size": 20}
OPT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16, "vocab_size": 20}
MODELS = {
    "bart": lambda: BartForCausalLM(BartConfig(**BART, dropout=0.0, activation_dropout=0.5, decoder_layerdrop=0.5)),
    "bloom": lambda: BloomForCausalLM(
        BloomConfig(hidden_size=16, n_layer=2, n_head=2, vocab_size=20, hidden_dropout=0.5)
    ),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT, word_embed_proj_dim=16, dropout=0.0, layerdrop=0.5)),
}


@pytest.mark.parametrize("name", MODELS)
def test_no_dropout_is_left(name):
    """Of whatever name: of activations, of hidden states, of whole layers."""
    torch.manual_seed(0)
    model = MODELS[name]().train()

    def logits():
        return torch.stack([model(TOKENS).logits for _ in range(6)])

    assert not torch.equal(logits(), logits())
    disable_dropout(model)
    found = logits()
    assert torch.equal(found, found[:1].expand_as(found))
    torch.testing.assert_close(found[0], model.eval()(TOKENS).logits)
