"""What the tests of PPO share: four triplets, and a plain forward pass."""

from __future__ import annotations

import torch

QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]
RESPONSES = [[20, 21, 22], [30, 31, 32, 33, 34], [40], [50, 51, 52, 53]]
SCORES = [1.0, -0.5, 2.0, 0.25]


def tensors(rows):
    return [torch.tensor(row) for row in rows]


TRIPLETS = (tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found, expected, **tolerance):
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def plain_logprobs(model, query, response):
    """Logits, log-probabilities and values `[C]` of one response, from an ordinary forward pass."""
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        decoder = torch.tensor([start + response[:-1]])
        logits, _, values = model(input_ids=torch.tensor([query]), decoder_input_ids=decoder)
        logits, values = logits[0], values[0]
    else:
        logits, _, values = model(torch.tensor([query + response]))
        logits, values = logits[0, len(query) - 1 : -1], values[0, len(query) - 1 : -1]
    logp = logits.log_softmax(-1)
    return logp, logp[range(len(response)), response], values
