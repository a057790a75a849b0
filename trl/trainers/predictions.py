"""Logits of all tokens of evaluation rows, for metrics of a user's own. Nothing else here ever has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from trl.trainers.collate import IGNORE
from trl.types import Completion, Example


@torch.no_grad()
def predictions(model: nn.Module, examples: Sequence[Example], *, decoder_start: int | None) -> tuple[Tensor, Tensor]:
    """Logits `[N,T,V]` and labels `[N,T]` of N completions, with −100 where a token is not trained on.

    As `compute_metrics` knows them from `transformers`. A decoder's sequences are prompt and completion, and the logits at
    t are about the token at t + 1. Those of an encoder-decoder, which starts with the token `decoder_start`, are
    completions, and the logits at t are about the token at t.
    """
    pairs = [(list(example.prompt), completion) for example in examples for completion in example.completions]
    labels = [_labels(completion) for _, completion in pairs]
    if decoder_start is not None:
        inputs = _padded([prompt for prompt, _ in pairs])
        started = _padded([[decoder_start, *completion.ids[:-1]] for _, completion in pairs])
        inputs |= {f"decoder_{name}": values for name, values in started.items()}
    else:
        inputs = _padded([[*prompt, *completion.ids] for prompt, completion in pairs])
        labels = [[IGNORE] * len(prompt) + own for (prompt, _), own in zip(pairs, labels, strict=True)]
    device = next(model.parameters()).device
    logits = model(**{name: values.to(device) for name, values in inputs.items()}).logits
    return logits, pad_sequence(list(map(torch.tensor, labels)), batch_first=True, padding_value=IGNORE).to(device)


def _labels(completion: Completion) -> list[int]:
    mask = completion.mask or [1] * len(completion)
    return [token if trained else IGNORE for token, trained in zip(completion.ids, mask, strict=True)]


def _padded(sequences: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    rows = [torch.tensor(sequence) for sequence in sequences]
    present = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence(present, batch_first=True),
    }
