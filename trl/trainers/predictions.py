"""Logits of all tokens of evaluation rows, for metrics of a user's own. Nothing else here ever has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trl.data.examples import IGNORE
from trl.types import Batch
from trl.vision.encoder_outputs import with_encoder_outputs


@torch.no_grad()
def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[N,T,V]` and labels `[N,T]` of a batch with a sequence in each row; −100 where nothing is trained on.

    As `compute_metrics` knows them from `transformers`: the logits of a decoder at t are about the token at t + 1, those
    of an encoder-decoder about the token at t.
    """
    width = batch.inputs.get("decoder_input_ids", batch.inputs["input_ids"]).shape[1]
    logits = model(**with_encoder_outputs(batch.inputs)).logits[:, -width:]
    labels = torch.full(logits.shape[:2], IGNORE, device=logits.device)
    labels.view(-1)[batch.position.flatten()[batch.scored]] = batch.target.flatten()[batch.scored]
    return logits, labels
