"""The settings of encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.data.formats import KINDS
from trl.data.trees import TRUNCATIONS
from trl.errors import ConfigError, unknown
from trl.option_bounds import check_bounds


@dataclass(frozen=True)
class EncodeSettings:
    """How rows become token ids."""

    kind: str | Sequence[str] | None = None
    """Row kinds to look for (see `trl.data.formats.KINDS`); None looks for all."""
    max_length: int | None = None
    """Most tokens of prompt and completion together (of each, with an encoder-decoder)."""
    max_prompt_length: int | None = None
    """Most tokens of a prompt; its beginning is cut."""
    truncation_mode: str = "keep_start"
    """What `max_length` keeps: `keep_start` cuts the end of completions, `keep_end` the beginning of the prompt."""
    completion_only_loss: bool | None = None
    """Train on completions only. None: wherever rows have a prompt. False: on prompts too."""
    assistant_only_loss: bool = False
    """Train only on what the assistant wrote in a conversation."""
    text_field: str = "text"
    """The column with the text of language modelling; `messages` and `conversations` come before it."""
    add_special_tokens: bool = True
    """Begin plain texts as the tokenizer begins them (with BOS)."""
    add_eos: bool = True
    """Close plain texts and completions with EOS. Conversations end as their template ends them."""
    needs_eos: bool = True
    """Refuse a tokenizer without a token that ends a text. False: texts stay open then, since a classifier never stops."""
    needs_prompt: bool = False
    """Refuse rows without a prompt, whose completions answer nothing."""
    eos_token: str | None = None
    """The token that closes a text; None is the tokenizer's."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Arguments for the chat template."""
    tools: Sequence[Any] | None = None
    """Tools (functions or JSON schemas) that the chat template shows; a column `tools` takes their place."""
    step_separator: str = "\n"
    """Text that closes each step of a stepwise row."""
    keep_columns: tuple[str, ...] = ()
    """Columns carried along where a dataset has them (margin, score, weight, …)."""
    token_signals: tuple[str, ...] = ()
    """Columns with one number for each token that is trained on (rewards, …); the token that ends a text may have none."""
    encoder_decoder: bool = False
    """The prompt goes to an encoder and the completion to a decoder."""
    token_mask: Callable[[Sequence[int], int], Sequence[bool]] | None = None
    """Which tokens of a text to train on, from its ids and its row (a `DataCollatorForCompletionOnlyLM`'s mask)."""
    num_proc: int | None = None
    """Processes that encode."""
    vocabulary: int | None = None
    """Rows of the model's embedding: token ids that come in columns have to be below. None: not known."""
    embedded: int | None = None
    """The same for the tokens of texts, which a tokenizer may have more of than the model. None: not known."""
    positions: int | None = None
    """Positions that the model has embeddings for: no sequence may be longer. None: no such limit."""
    pretrained_length: int | None = None
    """Tokens of the longest sequence that a model with computed positions is made for: longer rows are counted and said."""
    context: int | None = None
    """Tokens of prompt and completion that the sampler reads: prompts have to be shorter. None: no such limit."""

    def __post_init__(self) -> None:
        if self.truncation_mode not in TRUNCATIONS:
            raise ConfigError(unknown("truncation_mode", self.truncation_mode, TRUNCATIONS))
        for kind in self.kinds or ():
            if kind not in KINDS:
                raise ConfigError(unknown("row kind", kind, KINDS))
        check_bounds(self)

    @property
    def kinds(self) -> tuple[str, ...] | None:
        return (self.kind,) if isinstance(self.kind, str) else self.kind and tuple(self.kind)
