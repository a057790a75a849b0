"""Batched tokenisation with token borders between prompt and completion, as at generation time.

At generation time a model reads ids(prompt) and continues them. So prompt and completion are tokenised separately, even
if a token of the joint text would cross the border ("is " + "blue" is not tokenised as "is" and " blue").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

_HEADER_CHARS = 64
_HEADER_TOKENS = 2
_HEADERS_KEPT = 4096


class TextEncoder:
    """Batched tokenisation by one tokenizer.

    concatenates   whether ids(a) + ids(b) is a tokenisation of a + b. It is not for tokenizers that put a space before every
                   text; these tokenise a continuation together with its prompt
    closing        number of special tokens that the tokenizer puts after a text, whichever token is EOS now
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.concatenates = self.ids(["a"])[0] + self.ids([" b"])[0] == self.ids(["a b"])[0]
        self.closing = self._closing()
        added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")
        self._header_ids: dict[str, list[int]] = {}

    def _closing(self) -> int:
        """Number of special tokens after a text, found by comparing two different texts with and without special tokens."""
        ends = [self.ids([letter], add_special_tokens=True)[0] for letter in ("a", "b")]
        plain = [self.ids([letter])[0] for letter in ("a", "b")]
        longest = min(map(len, ends)) - max(map(len, plain))
        for n in range(longest, 0, -1):
            if all(e[-len(p) - n : -n] == p for e, p in zip(ends, plain, strict=True)):
                return n
        return 0

    def ids(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        """Token ids of each text. With special tokens, a text that already begins with BOS does not get a second one."""
        if self.tokenizer.is_fast:
            encodings = self._backend().encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            rows = [encoding.ids for encoding in encodings]
        else:
            rows = [self.tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        twice = [self.tokenizer.bos_token_id] * 2
        return [ids[1:] if add_special_tokens and ids[:2] == twice else ids for ids in rows]

    def prompts(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[list[int]]:
        """Token ids of texts to be continued: without the special tokens that some tokenizers put after every text."""
        rows = self.ids(texts, add_special_tokens=add_special_tokens)
        return [ids[: -self.closing] for ids in rows] if add_special_tokens and self.closing else rows

    def continuations(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]], *, add_special_tokens: bool
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Token ids of the prompts, and of K columns of answers that continue them.

        `add_special_tokens` says whether prompts begin with special tokens.
        """
        prompt_ids = self.prompts(prompts, add_special_tokens=add_special_tokens)
        if self.concatenates:
            return prompt_ids, [self.ids(column) for column in answers]
        return prompt_ids, [self._tails(prompts, prompt_ids, column, add_special_tokens) for column in answers]

    def _tails(
        self, prompts: Sequence[str], prompt_ids: list[list[int]], answers: Sequence[str], add_special_tokens: bool
    ) -> list[list[int]]:
        """The answers' tokens in the joint tokenisation of prompt and answer; where this does not begin with the prompt's tokens,
        those of the answer alone."""
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        rows = zip(
            prompt_ids, self.prompts(texts, add_special_tokens=add_special_tokens), self.ids(answers), strict=True
        )
        return [whole[len(p) :] if whole[: len(p)] == p else alone for p, whole, alone in rows]

    def masked(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> tuple[list[list[int]], list[list[bool]]]:
        """Token ids of each text, and a mask of the tokens within its character spans [start, end).

        The ids are those of the whole text, unless their beginning would differ from ids(text[:start]) for a span: then the
        pieces between the borders of spans are tokenised separately.
        """
        if not self.tokenizer.is_fast:
            cut = [self._cut(text, spans_) for text, spans_ in zip(texts, spans, strict=True)]
            return [ids for ids, _ in cut], [mask for _, mask in cut]
        encodings = self._backend().encode_batch(list(texts), add_special_tokens=False)
        ids, masks = [], []
        for text, spans_, encoding in zip(texts, spans, encodings, strict=True):
            row = encoding.ids
            borders = [(_token_at(encoding, s, len(text)), _token_at(encoding, e, len(text))) for s, e in spans_]
            starts = zip(spans_, borders, strict=True)
            if self.concatenates and not all(self._continues(text, s, row[:b]) for (s, _), (b, _) in starts):
                row, mask = self._cut(text, spans_)
            else:
                mask = _mask(len(row), borders)
            ids.append(row)
            masks.append(mask)
        return ids, masks

    def _backend(self):
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        return backend

    def _continues(self, text: str, start: int, before: list[int]) -> bool:
        """True if the tokens before a border equal those of the text before it alone; only the last tokens are compared."""
        window = max(0, start - _HEADER_CHARS)
        for match in self._added.finditer(text, window, start):
            window = match.start()
        header = text[window:start]
        if header not in self._header_ids:
            if len(self._header_ids) >= _HEADERS_KEPT:
                self._header_ids.clear()
            self._header_ids[header] = self.ids([header])[0][-_HEADER_TOKENS:]
        expected = self._header_ids[header]
        return before[len(before) - len(expected) :] == expected

    def _cut(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[bool]]:
        """Ids and mask of a text whose pieces between the borders of its spans are tokenised separately."""
        ids: list[int] = []
        mask: list[bool] = []
        edges = [0, *(edge for span in spans for edge in span), len(text)]
        for i, (start, end) in enumerate(pairwise(edges)):
            piece = self.ids([text[start:end]])[0] if end > start else []
            ids += piece
            mask += [i % 2 == 1] * len(piece)
        return ids, mask


def _token_at(encoding: Encoding, char: int, chars: int) -> int:
    """Index of the first token that begins at or after a character."""
    token = next((t for c in range(char, chars) if (t := encoding.char_to_token(c)) is not None), len(encoding))
    reaches_over = token < len(encoding) and encoding.token_to_chars(token)[0] < char
    return token + reaches_over


def _mask(tokens: int, borders: Sequence[tuple[int, int]]) -> list[bool]:
    mask = [False] * tokens
    for start, end in borders:
        mask[start:end] = [True] * (end - start)
    return mask
