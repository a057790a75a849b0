"""The function that `Dataset.map` calls to encode a batch of rows, and the fingerprint of its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from trl.data.columns import Columns
from trl.data.encoders import ENCODERS
from trl.data.formats import COLUMNS_READ, PICTURES, TEXT
from trl.data.multimodal import FEATURE, IMAGES, STORED, decoded, place_images, stored
from trl.data.prepacked import documents_of
from trl.data.tokenization import Tokenization
from trl.data.trees import (
    IDENTICAL,
    KEPT,
    OVERLONG,
    TRUNCATIONS,
    UNSCORED,
    Tree,
    keep_prompt_end,
    keep_sides,
    keep_whole,
    with_token_signal,
    without,
)
from trl.errors import DataError, RowError

FORMAT = 5
"""Version of the encoding, part of the cache key: increase it when encoded rows change."""

COUNTS = {
    "status": Value("uint8"),
    "truncated": Value("bool"),
    **dict.fromkeys(("tokens", "longest", "trained", "source_tokens"), Value("int32")),
}
"""Columns from which the report is computed; they are removed afterwards."""

NUMBERS = {"score", "margin", "weight", "chosen_score", "rejected_score"}
"""Columns that losses read: they have to be finite, since a NaN would make the loss NaN."""

INPUTS = "inputs"
"""Column of further model inputs for the prompt: a dict of arrays by the name of the forward's argument."""


class RowEncoder:
    """Encodes rows of one kind; called with a batch of columns and the indices of its rows."""

    def __init__(
        self,
        tokenization: Tokenization,
        kind: str,
        columns: Sequence[str],
        *,
        has_inputs: bool = False,
        is_packed: bool = False,
    ) -> None:
        self.tokenization = tokenization
        self.kind = kind
        self.settings = tokenization.settings
        settings = self.settings
        keep = {*settings.keep_columns, INPUTS} if has_inputs else {*settings.keep_columns}
        pictures = set() if tokenization.images is None else PICTURES
        text = {settings.text_field} if kind == "language_modeling" else set()
        wanted = ({*COLUMNS_READ[kind]} - {TEXT}) | text | {*keep, *settings.token_signals} | pictures
        self.columns = [name for name in columns if name in wanted]
        self.unread = tuple(name for name in columns if name not in wanted)
        self.kept = [name for name in self.columns if name in keep - pictures]
        self.hides_images = self._hides_images()
        self.is_masked = self._is_masked() or self.hides_images
        self.is_packed = is_packed
        self.has_run = False
        if is_packed and (settings.encoder_decoder or settings.token_signals or self.kept):
            reads = (
                "encoder-decoders read"
                if settings.encoder_decoder
                else f"column {[*settings.token_signals, *self.kept][0]!r} is of"
            )
            raise DataError(
                f"The rows are already packed, with several documents in one, but {reads} one example: give each document as a "
                "row."
            )

    def _is_masked(self) -> bool:
        if self.kind == "tokenized":
            return any(name in self.columns for name in ("labels", "completion_mask", "assistant_masks"))
        chosen_tokens = self.settings.assistant_only_loss or self.settings.token_mask is not None
        return self.kind in ("stepwise", "dialogue") or chosen_tokens

    def _hides_images(self) -> bool:
        """True for rows that are trained on as a whole, images included: nothing is to be learned from an image token."""
        reads = self.tokenization.images is not None
        return reads and self.kind in ("language_modeling", "tokenized") and not self._is_masked()

    def __call__(self, batch: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> pa.Table:
        self.has_run = True
        given = Columns({n: batch[n] for n in self.columns}, rows, is_packed=self.is_packed, source=self._source())
        columns = given.read()
        for name in NUMBERS & set(self.kept):
            columns.check_finite(name)
        if (processing := self.tokenization.images) is not None:
            columns = place_images(columns, processing, has_template=processing.processor.chat_template is not None)
        trees = ENCODERS[self.kind](columns, self.tokenization)
        if self.hides_images:
            trees = [without(tree, set(processing.processor.image_token_ids)) for tree in trees]
        if self.settings.token_mask is not None:
            trees = [self._masked(tree, row) for tree, row in zip(trees, rows, strict=True)]
        for name in self.settings.token_signals:
            trees = [self._with_signal(k, tree, name, columns) for k, tree in enumerate(trees)]
        if self.is_packed:
            trees, lengths = documents_of(trees, columns)
            cut = [self._cut(tree, 0) if len(n) == 1 else tree for tree, n in zip(trees, lengths, strict=True)]
            lengths = [[tree.tokens] if len(n) == 1 else n for tree, n in zip(cut, lengths, strict=True)]
            self._check_limits(cut, columns, lengths)
            return self._table(trees, cut, columns, documents=lengths)
        cut = [self._cut(tree, self._protected_tokens(k, tree, columns)) for k, tree in enumerate(trees)]
        pairs = zip(trees, cut, strict=True)
        left = [tree.sliced(slice(0), [slice(0)] * len(tree.completions)) if c is None else c for tree, c in pairs]
        self._check_limits(left, columns)
        kept = replace(columns, values={**columns.values, **given.values})
        return self._table(trees, left, kept, overlong=[shorter is None for shorter in cut])

    def _source(self) -> str:
        """The text of the chat template, or of all of them if there are several."""
        images = self.tokenization.images
        template = self.tokenization.tokenizer.chat_template if images is None else images.processor.chat_template
        return template if isinstance(template, str) else str(template or "")

    def _check_limits(
        self, trees: Sequence[Tree], columns: Columns, documents: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Raise RowError for a row that is too long for the model's positions or context, or has a token without embedding."""
        s = self.settings
        for k, (tree, size) in enumerate(zip(trees, self._longest(trees, documents), strict=True)):
            if s.positions is not None and size > s.positions:
                raise RowError(
                    columns.rows[k],
                    f": {size:,} tokens, but the model has {s.positions:,} positions: set {self._limit} to at most {s.positions}, "
                    "or remove long rows.",
                )
            if s.context is not None and len(tree.prompt) >= s.context:
                raise RowError(
                    columns.rows[k],
                    f": its prompt has {len(tree.prompt):,} tokens, and the model's context is {s.context:,}, which leaves no room "
                    f"for a completion: set max_prompt_length below {s.context}, or remove long rows.",
                )
            top = max(max(ids, default=-1) for ids in (tree.prompt, *tree.completions))
            if s.embedded is not None and columns.images is None and top >= s.embedded:
                token = self.tokenization.tokenizer.convert_ids_to_tokens(top)
                raise RowError(
                    columns.rows[k],
                    f": token {token!r} ({top}) has no embedding; the model's embedding has {s.embedded:,} rows. If tokens were "
                    "added, resize it (model.resize_token_embeddings(len(tokenizer)) and save the model); else the tokenizer "
                    "belongs to another model.",
                )

    @property
    def _limit(self) -> str:
        """The option that bounds a row: methods that sample bound the prompt."""
        return "max_prompt_length" if self.kind == "prompt_only" else "max_length"

    def _longest(self, trees: Sequence[Tree], documents: Sequence[Sequence[int]] | None) -> list[int]:
        """Number of tokens of each row's longest sequence: of prompt and completion, or of a packed document."""
        if documents is not None:
            return [max(lengths, default=0) for lengths in documents]
        whole = max if self.settings.encoder_decoder else sum
        return [whole((len(tree.prompt), tree.longest)) for tree in trees]

    def _protected_tokens(self, k: int, tree: Tree, columns: Columns) -> int:
        """Number of leading tokens that must not be cut: those up to the end of the last image, or a prompt with `inputs`."""
        if columns.images is not None and columns.images[k]:
            return self.tokenization.images.image_end(
                [*tree.prompt, *(tree.completions[0] if tree.completions else ())]
            )
        return len(tree.prompt) if INPUTS in columns and columns[INPUTS][k] else 0

    def _with_signal(self, k: int, tree: Tree, name: str, columns: Columns) -> Tree:
        try:
            return with_token_signal(tree, name, columns[name][k])
        except (TypeError, ValueError) as error:
            raise columns.error(k, name, f"{error}.") from error

    def _masked(self, tree: Tree, row: int) -> Tree:
        ids = [tree.prompt + completion for completion in tree.completions]
        return Tree([], ids, [list(self.settings.token_mask(row_ids, row)) for row_ids in ids])

    def _cut(self, tree: Tree, whole: int) -> Tree | None:
        """The tree truncated to the limits; None if its first `whole` tokens, which must not be cut, exceed them."""
        s = self.settings
        if whole:
            return keep_whole(tree, whole, s.max_prompt_length, s.max_length)
        if s.encoder_decoder:
            return keep_sides(tree, s.max_prompt_length or s.max_length, s.max_length, s.truncation_mode)
        if s.max_prompt_length is not None:
            tree = keep_prompt_end(tree, s.max_prompt_length)
        return tree if s.max_length is None else TRUNCATIONS[s.truncation_mode](tree, s.max_length)

    def _table(
        self,
        sources: list[Tree],
        trees: list[Tree],
        columns: Columns,
        *,
        overlong: Sequence[bool] = (),
        documents: Sequence[Sequence[int]] | None = None,
    ) -> pa.Table:
        begins_alone = not self.settings.encoder_decoder
        trained = [tree.trained(unpredicted=int(begins_alone and not tree.prompt)) for tree in trees]
        tokens, source_tokens = [tree.tokens for tree in trees], [tree.tokens for tree in sources]
        statuses = [*map(self._status, trees, trained, overlong or [False] * len(trees))]
        if self.settings.needs_prompt:
            check_prompts(sources, statuses, columns)
        values = {
            "status": statuses,
            "truncated": np.not_equal(tokens, source_tokens),
            "tokens": tokens,
            "longest": self._longest(trees, documents),
            "trained": list(map(sum, trained)),
            "source_tokens": source_tokens,
        }
        values |= self._rows(trees) if documents is None else self._documents(trees, documents)
        types = Features({**self._types(), **COUNTS}).arrow_schema
        columns_of_rows = {field.name: pa.array(values[field.name], field.type) for field in types}
        if columns.images is not None:
            columns_of_rows[IMAGES] = pa.array([list(map(stored, own)) for own in columns.images], STORED)
        return pa.table(columns_of_rows | {n: pa.array(columns[n]) for n in self.kept})

    def _types(self) -> dict[str, Any]:
        """The columns of encoded rows, without counts, images and kept columns, and their types."""
        if self.is_packed:
            return {"input_ids": List(Value("int32")), "mask": List(Value("bool")), "seq_lengths": List(Value("int32"))}
        types = {"prompt_ids": List(Value("int32"))}
        if self.kind != "prompt_only":
            types["completion_ids"] = List(List(Value("int32")))
        if self.is_masked:
            types["completion_mask"] = List(List(Value("bool")))
        signals = [*(["step_label"] if self.kind == "stepwise" else []), *self.settings.token_signals]
        return types | dict.fromkeys(signals, List(List(Value("float32"))))

    def _rows(self, trees: list[Tree]) -> dict[str, list[Any]]:
        """The values of the columns that come from the trees."""
        values = {
            "prompt_ids": [tree.prompt for tree in trees],
            "completion_ids": [tree.completions for tree in trees],
            "completion_mask": [tree.all_masks for tree in trees],
        }
        return values | {name: [tree.signals[name] for tree in trees] for name in trees[0].signals}

    def _documents(self, trees: list[Tree], lengths: Sequence[Sequence[int]]) -> dict[str, list[Any]]:
        """The values of the columns of rows that were already packed."""
        ids, masks = [tree.completions[0] for tree in trees], [tree.masks[0] for tree in trees]
        return {"input_ids": ids, "mask": masks, "seq_lengths": list(lengths)}

    def _status(self, tree: Tree, trained: list[int], is_overlong: bool) -> int:
        if is_overlong:
            return OVERLONG
        if 0 in trained:
            return UNSCORED
        return IDENTICAL if len(trained) == 2 and tree.completions[0] == tree.completions[1] else KEPT

    def features(self, source: Features) -> Features:
        """The columns of the encoded dataset and their types; `source` are those of the original dataset."""
        images = {} if self.tokenization.images is None else {IMAGES: FEATURE}
        return Features({**self._types(), **COUNTS, **images, **{name: decoded(source[name]) for name in self.kept}})

    def fingerprint(self, source: str) -> str:
        """Cache key of the encoding of a dataset with fingerprint `source`."""
        tokenizer, images = self.tokenization.tokenizer, self.tokenization.images
        parts = (FORMAT, source, self.kind, self.columns, self.settings, tokenizer_key(tokenizer))
        return Hasher.hash(parts if images is None else (*parts, images.settings()))


def check_prompts(trees: Sequence[Tree], statuses: Sequence[int], columns: Columns) -> None:
    """Raise RowError for a kept row without a prompt; `trees` are the rows before truncation."""
    for k, (tree, status) in enumerate(zip(trees, statuses, strict=True)):
        if status == KEPT and not tree.prompt:
            pair = ", or missing while chosen and rejected have no common beginning" if tree.completions else ""
            raise RowError(
                columns.rows[k],
                f" has no prompt: the column 'prompt' is empty{pair}. Give every row a prompt, or remove such rows.",
            )


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of how a tokenizer encodes text, independent of the padding and truncation state that earlier calls left in it."""
    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Hasher.hash((backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map))
