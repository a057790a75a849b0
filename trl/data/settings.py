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
    """Most tokens of a prompt; longer prompts are cut at their beginning."""
    truncation_mode: str = "keep_start"
    """What `max_length` keeps: `keep_start` cuts the end of completions, `keep_end` the beginning of the prompt."""
    completion_only_loss: bool | None = None
    """Train on completions only. None: if rows have a prompt. False: on prompts too."""
    assistant_only_loss: bool = False
    """Train only on the assistant's turns of a conversation."""
    text_field: str = "text"
    """The column with the text for language modelling; by default, `messages` and `conversations` have precedence over it."""
    add_special_tokens: bool = True
    """Begin plain texts with the tokenizer's special tokens (BOS)."""
    add_eos: bool = True
    """End plain texts and completions with EOS. Conversations end as their chat template ends them."""
    needs_eos: bool = True
    """Refuse a tokenizer without EOS. False: texts then have no EOS, which classifiers do not need."""
    needs_prompt: bool = False
    """Refuse rows without a prompt."""
    eos_token: str | None = None
    """The token that ends a text; None: the tokenizer's EOS."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Arguments for the chat template."""
    tools: Sequence[Any] | None = None
    """Tools (functions or JSON schemas) for the chat template; a column `tools` overrides them."""
    step_separator: str = "\n"
    """Text after each step of a stepwise row."""
    keep_columns: tuple[str, ...] = ()
    """Columns to keep in encoded rows, if the dataset has them (margin, score, weight, …)."""
    token_signals: tuple[str, ...] = ()
    """Columns with one number per trained token (rewards, …); that of the final EOS may be missing."""
    encoder_decoder: bool = False
    """Whether the prompt goes to an encoder and the completion to a decoder."""
    token_mask: Callable[[Sequence[int], int], Sequence[bool]] | None = None
    """Function from token ids and row to the mask of tokens to train on (that of a `DataCollatorForCompletionOnlyLM`)."""
    num_proc: int | None = None
    """Number of processes that encode."""
    vocabulary: int | None = None
    """Number of rows of the model's embedding; token ids in columns have to be below it. None: unknown."""
    embedded: int | None = None
    """The same limit for tokens of texts: a tokenizer may have more tokens than the model. None: unknown."""
    positions: int | None = None
    """Number of the model's learned position embeddings; no sequence may be longer. None: no limit."""
    pretrained_length: int | None = None
    """Longest sequence, in tokens, that a model with computed positions (RoPE) was made for; longer rows are reported."""
    context: int | None = None
    """Most tokens of prompt and completion that can be sampled; prompts have to be shorter. None: no limit."""

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
