"""When a completion ends: a stop token, a stop string (over any token boundary), or the limit."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from trl.errors import ConfigError
from trl.rollouts.engine import FinishReason
from trl.rollouts.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARGIN = 4
"""Tokens decoded before a stop string could begin, so that half characters and word starts come out whole."""


class Stopper:
    """`tokens` end a completion, and so do the stop strings of `params`; neither before `min_new_tokens`."""

    def __init__(
        self, params: SamplingParams, tokens: Collection[int], tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        if params.stop and tokenizer is None:
            raise ConfigError(f"stop={params.stop!r} needs a tokenizer: give the engine one.")
        self.tokens = frozenset(tokens)
        self.strings, self.least, self.tokenizer = params.stop, params.min_new_tokens, tokenizer
        self.tail = MARGIN + max((len(string.encode()) for string in params.stop), default=0)

    def reason(self, ids: Sequence[int], limit: int) -> FinishReason | None:
        """Why a completion ends with the last of `ids`, or None."""
        if len(ids) >= self.least and (ids[-1] in self.tokens or (self.strings and self._ends_in_string(ids))):
            return "stop"
        return "length" if len(ids) >= limit else None

    def _ends_in_string(self, ids: Sequence[int]) -> bool:
        """Every token is at least a byte of text, so a string that ends here begins within the tail."""
        text = self._text(ids[-self.tail :])
        found = [text[: text.rfind(string) + len(string)] for string in self.strings if string in text]
        return bool(found) and not self._text(ids[-self.tail : -1]).startswith(max(found, key=len))

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
