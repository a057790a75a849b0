"""What the tests of PPO share: four triplets, prompts and a reward, a small classifier, a plain forward pass."""

from __future__ import annotations

import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2ForSequenceClassification

QUERIES = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14]]
RESPONSES = [[20, 21, 22], [30, 31, 32, 33, 34], [40], [50, 51, 52, 53]]
SCORES = [1.0, -0.5, 2.0, 0.25]

PROMPTS = Dataset.from_dict({"prompt": [f"{letter}b" for letter in "abcdefgh"] * 4})
WANTED = 42


def wanted(completion_ids, **_):
    """How many of a completion's tokens are the wanted one."""
    return [float(ids.count(WANTED)) for ids in completion_ids]


def classifier(labels=1):
    torch.manual_seed(5)
    sizes = {"vocab_size": 99, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "pad_token_id": 0}
    return GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=labels))


def tensors(rows):
    return [torch.tensor(row) for row in rows]


TRIPLETS = (tensors(QUERIES), tensors(RESPONSES), tensors(SCORES))


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(found, expected, **tolerance):
    """Parameters are close, wherever they are."""
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].cpu(), value.cpu(), msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def plain_logprobs(model, query, response):
    """Logits, log-probabilities and values `[C]` of one response, from an ordinary forward pass."""
    device = next(model.parameters()).device
    if model.config.is_encoder_decoder:
        start = [model.config.decoder_start_token_id]
        decoder = torch.tensor([start + response[:-1]], device=device)
        logits, _, values = model(input_ids=torch.tensor([query], device=device), decoder_input_ids=decoder)
        logits, values = logits[0], values[0]
    else:
        logits, _, values = model(torch.tensor([query + response], device=device))
        logits, values = logits[0, len(query) - 1 : -1], values[0, len(query) - 1 : -1]
    logp = logits.log_softmax(-1)
    return logp, logp[range(len(response)), response], values
