"""Logits of all tokens of evaluation rows, for `compute_metrics`. Nothing else in trl stores them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trl.data.examples import IGNORE
from trl.types import Batch
from trl.vision.encoder_outputs import with_encoder_outputs


@torch.no_grad()
def predictions(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits `[N,T,V]` and labels `[N,T]` of a padded batch; labels are −100 at tokens that are not trained on.

    They are aligned as in `transformers`: the logits of a decoder at t predict the token at t + 1, those of an
    encoder-decoder the token at t.
    """
    width = batch.inputs.get("decoder_input_ids", batch.inputs["input_ids"]).shape[1]
    logits = model(**with_encoder_outputs(batch.inputs)).logits[:, -width:]
    labels = torch.full(logits.shape[:2], IGNORE, device=logits.device)
    labels.view(-1)[batch.position.flatten()[batch.scored]] = batch.target.flatten()[batch.scored]
    return logits, labels
