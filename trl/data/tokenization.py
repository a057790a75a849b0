"""The tokenizer as encoding uses it: for texts, for prompts with continuations, and for conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from trl.data.chat import ChatTemplate
from trl.data.settings import EncodeSettings
from trl.data.tokens import TextEncoder
from trl.errors import DataError
from trl.vision.processing import ImageProcessing


@dataclass(frozen=True)
class Tokenization:
    """The tokenizer with the encoding settings and, for models that take images, the image processing."""

    tokenizer: PreTrainedTokenizerBase
    settings: EncodeSettings
    images: ImageProcessing | None = None

    @cached_property
    def text(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def chat(self) -> ChatTemplate:
        return ChatTemplate(
            self.tokenizer,
            tools=self.settings.tools,
            template_kwargs=self.settings.chat_template_kwargs,
            chat_template=None if self.images is None else self.images.processor.chat_template,
        )

    @cached_property
    def eos(self) -> int | None:
        """Id of the token that ends a text: EOS, or else the token that the tokenizer puts after every text ([SEP]).

        If there is neither, raises DataError, or is None if the settings do not need one.
        """
        token = self.settings.eos_token or self.tokenizer.eos_token
        if token is None and self.text.closing:
            return self.text.ids(["a"], add_special_tokens=True)[0][-1]
        if token is None and not self.settings.needs_eos:
            return None
        if token is None:
            raise DataError(
                f"The tokenizer {self.tokenizer.name_or_path!r} has no EOS token, and without one a model does not "
                "learn to stop. Set eos_token to a token of its vocabulary."
            )
        known = self.tokenizer.get_vocab()
        if token not in known:
            raise DataError(f"eos_token={token!r} is not in the vocabulary of {self.tokenizer.name_or_path!r}.")
        return known[token]

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain prompts: with all special tokens for an encoder, without those at the end for a decoder."""
        if self.settings.encoder_decoder:
            return self.text.ids(texts, add_special_tokens=True)
        return self.text.prompts(texts, add_special_tokens=True)

    def continuations(
        self, prompts: Sequence[str], answers: Sequence[Sequence[str]], *, add_special_tokens: bool
    ) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Token ids of prompts and of K columns of answers; in an encoder-decoder, answers do not continue the prompt's text."""
        if self.settings.encoder_decoder:
            prompt_ids = self.text.ids(prompts, add_special_tokens=add_special_tokens)
            return prompt_ids, [self.text.ids(column) for column in answers]
        return self.text.continuations(prompts, answers, add_special_tokens=add_special_tokens)

    @property
    def start(self) -> int:
        """Id of the token that begins a text: BOS, or EOS if the tokenizer has no BOS."""
        start = self.tokenizer.bos_token_id
        return self.eos if start is None else start

    def following(self, rows: Sequence[Sequence[str]]) -> list[list[int]]:
        """Token ids of all turns after the first of each row, as a flat list, tokenised as continuations of the turns before."""
        texts = [turn for turns in rows for turn in turns[1:]]
        if self.text.concatenates or self.settings.encoder_decoder:
            return self.text.ids(texts)
        before = ["".join(turns[:i]) for turns in rows for i in range(1, len(turns))]
        return self.text.continuations(before, [texts], add_special_tokens=True)[1][0]

    def append_eos(self, rows: list[list[int]]) -> list[list[int]]:
        """The rows with EOS appended to those that do not end with it, if the settings say so."""
        if not self.settings.add_eos or self.eos is None:
            return rows
        return [ids if ids and ids[-1] == self.eos else [*ids, self.eos] for ids in rows]
