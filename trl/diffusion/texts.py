"""A cache of the text encoders' outputs for prompts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from trl.diffusion.denoiser import Denoiser, Text

KEPT_BYTES = 2**31
"""Maximal size of the cache. A prompt takes 1.3 MB for SDXL in float32, and 8 MB for Flux."""


class PromptEmbeddings:
    """Encodes prompts, with a least-recently-used cache on the host.

    Each prompt is encoded alone, so that its result does not depend in the last bits on other prompts: a resumed run may encode
    prompts in other batches.
    """

    def __init__(self, denoiser: Denoiser, *, kept_bytes: int = KEPT_BYTES) -> None:
        self.denoiser, self.kept_bytes = denoiser, kept_bytes
        self.texts: OrderedDict[str, Text] = OrderedDict()
        self.bytes = 0
        self._negative: Text | None = None

    def __call__(self, prompts: Sequence[str]) -> list[Text]:
        """The encoded `prompts`, from the cache if possible."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.texts:
                (text,) = self.denoiser.encode([prompt])
                self.texts[prompt] = {name: value.cpu() for name, value in text.items()}
                self.bytes += size_of(self.texts[prompt])
        for prompt in prompts:
            self.texts.move_to_end(prompt)
        found = [self.texts[prompt] for prompt in prompts]
        while self.bytes > self.kept_bytes:
            self.bytes -= size_of(self.texts.popitem(last=False)[1])
        return found

    def negative(self) -> Text | None:
        """The encoded negative prompt of guidance, on the device of the model; None without guidance."""
        if self._negative is None and self.denoiser.is_guided:
            self._negative = self.denoiser.encode_negative()
        return self._negative


def size_of(text: Text) -> int:
    """Bytes of a text's tensors."""
    return sum(value.numel() * value.element_size() for value in text.values())
