"""When a completion ends: at a stop token, at a stop string (also across token boundaries), or at the token limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from trl.errors import ConfigError
from trl.rollouts.engine import FinishReason
from trl.rollouts.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 4
"""Extra tokens decoded before the earliest start of a stop string: split characters and word starts then decode correctly."""


class Stopper:
    """Says when a completion ends: at one of `tokens` or a stop string of `params`, not before `min_new_tokens`."""

    def __init__(
        self, params: SamplingParams, tokens: Collection[int], tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        if params.stop and tokenizer is None:
            raise ConfigError(f"stop={params.stop!r} needs a tokenizer: pass one to the engine.")
        self.tokens = frozenset(tokens)
        self.strings, self.least, self.tokenizer = params.stop, params.min_new_tokens, tokenizer
        self.tail = MARGIN + max((len(string.encode()) for string in params.stop), default=0)

    def reason(self, ids: Sequence[int], limit: int) -> FinishReason | None:
        """Why a completion ends with the last of `ids`, or None."""
        if len(ids) >= self.least and (ids[-1] in self.tokens or (self.strings and self._ends_in_string(ids))):
            return "stop"
        return "length" if len(ids) >= limit else None

    def _ends_in_string(self, ids: Sequence[int]) -> bool:
        """True if the last token completes a stop string.

        Each token is at least one byte of text, so that a string that ends here begins within the last `tail` tokens.
        """
        text = self._text(ids[-self.tail :])
        found = [text[: text.rfind(string) + len(string)] for string in self.strings if string in text]
        return bool(found) and not self._text(ids[-self.tail : -1]).startswith(max(found, key=len))

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
