"""What text encoders say of prompts, computed once per prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from trl.diffusion.denoiser import Denoiser, Text

KEPT_BYTES = 2**31
"""Of texts that are remembered: 1.3 MB is one of SDXL in single precision, 8 MB one of Flux."""


class PromptEmbeddings:
    """Texts of prompts, on the host; those that were asked for last are remembered.

    Each is encoded alone, so that its last bits do not depend on the prompts beside it: a run that is resumed meets
    prompts in other company.
    """

    def __init__(self, denoiser: Denoiser, *, kept_bytes: int = KEPT_BYTES) -> None:
        self.denoiser, self.kept_bytes = denoiser, kept_bytes
        self.texts: OrderedDict[str, Text] = OrderedDict()
        self.bytes = 0
        self._negative: Text | None = None

    def __call__(self, prompts: Sequence[str]) -> list[Text]:
        """The texts of `prompts`; those that are not known are encoded."""
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
        """The text that guidance leads away from, on the device of the model; None without guidance."""
        if self._negative is None and self.denoiser.is_guided:
            self._negative = self.denoiser.encode_negative()
        return self._negative


def size_of(text: Text) -> int:
    """Bytes."""
    return sum(value.numel() * value.element_size() for value in text.values())
