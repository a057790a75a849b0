"""From dataset rows to token ids: every row kind becomes the same tree of one prompt and its completions.

An encoded row holds

    prompt_ids       list[int32]         empty for a text or a whole conversation
    completion_ids   list[list[int32]]   K completions; chosen before rejected
    completion_mask  list[list[bool]]    the tokens to train on; the column is absent where all are
    step_label, …    list[list[float]]   numbers per token
    inputs           {name: array}       what else the model reads with the prompt, as it was; where rows have it
    keep_columns     as they were

Where the border between prompt and completion lies in tokens: what a model continues is ids(prompt), so a prompt is
tokenised alone and never shares a token with its completion. `decode` turns a row into Examples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.fingerprint import Hasher
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.data.columns import Columns
from trl.data.encoders import ENCODERS, Tokenization
from trl.data.formats import COLUMNS_READ, PICTURES, detect_kind
from trl.data.multimodal import FEATURE, IMAGES, STORED, place_images, stored, undecoded
from trl.data.prepacked import comes_packed, documents_of, refuse_packed
from trl.data.settings import EncodeSettings
from trl.data.trees import (
    IDENTICAL,
    KEPT,
    OVERLONG,
    TRUNCATIONS,
    UNSCORED,
    Tree,
    doubly_nested,
    keep_prompt_end,
    keep_sides,
    keep_whole,
    nested,
    with_token_signal,
)
from trl.errors import DataError
from trl.types import Completion, Example
from trl.vision.processing import ImageProcessing

logger = logging.getLogger(__name__)

FIRST_ROWS = 1000
"""Rows that are looked at to see whether their attention masks number documents."""
ROWS_NAMED = 5
"""Numbers of rows that a warning names."""

_FORMAT = 2
"""Number of the encoding, part of the cache key: raise it when encoded rows change."""

_COUNTS = ("status", "truncated", "tokens", "trained", "source_tokens")
"""Columns that the report is made of; they are taken off afterwards."""

NUMBERS = {"score", "margin", "weight", "chosen_score", "rejected_score"}
"""Columns that losses read: NaN in one would make a step NaN."""

INPUTS = "inputs"
"""Column with what else the model reads with a prompt: a dict of arrays, by the name of the forward's argument."""

_LAYOUT_COLUMNS = frozenset({"prompt_ids", "completion_ids", "completion_mask", INPUTS, "images", "image_counts"})


@dataclass(frozen=True)
class EncodingReport:
    """What became of a dataset's rows and tokens. `tokens` counts prompts once; `trained` counts completion tokens."""

    name: str = "train"
    rows_in: int = 0
    rows: int = 0
    truncated: int = 0
    unscored: int = 0
    identical: int = 0
    overlong: int = 0
    tokens: int = 0
    trained: int = 0

    @property
    def dropped(self) -> int:
        """Rows left without a token to train on, with chosen equal to rejected, or with images that do not fit."""
        return self.unscored + self.identical + self.overlong

    @classmethod
    def of(cls, counts: pa.Table, name: str) -> EncodingReport:
        """The report of encoded rows, from their counts."""
        column = {name: counts[name].to_numpy() for name in _COUNTS}
        status, kept = column["status"], column["status"] == KEPT
        return cls(
            name=name,
            rows_in=len(status),
            rows=int(kept.sum()),
            truncated=int((column["truncated"] & kept).sum()),
            unscored=int((status == UNSCORED).sum()),
            identical=int((status == IDENTICAL).sum()),
            overlong=int((status == OVERLONG).sum()),
            tokens=int(column["tokens"][kept].sum()),
            trained=int(column["trained"][kept].sum()),
        )

    def __add__(self, other: EncodingReport) -> EncodingReport:
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "name"}
        return replace(self, **counts)

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.rows:,} rows, {self.tokens:,} tokens"]
        # Rows that are kept without a token to train on are prompts.
        parts += [f"{self.trained:,} trained ({self.trained / self.tokens:.0%})"] if self.trained else []
        parts += [f"{self.truncated:,} truncated"] if self.truncated else []
        parts += [f"{self.unscored:,} dropped (no token left to train on)"] if self.unscored else []
        parts += [f"{self.identical:,} dropped (chosen equals rejected)"] if self.identical else []
        parts += [f"{self.overlong:,} dropped (images do not fit into max_length)"] if self.overlong else []
        return ", ".join(parts) + "."

    def log(self) -> None:
        """Log once: a warning when rows were dropped or truncated."""
        logger.log(logging.WARNING if self.dropped or self.truncated else logging.INFO, "%s", self)


@dataclass
class Encoded:
    """An encoded dataset, and the report of it.

    Of a stream the report counts what has been read so far in this process.
    """

    dataset: Dataset | IterableDataset
    kind: str
    report: EncodingReport = field(default_factory=EncodingReport)


def encode_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    settings: EncodeSettings | None = None,
    name: str = "train",
    images: ImageProcessing | None = None,
) -> Encoded:
    """Tokenise, mask and cut every row; drop those that are left without a token to train on.

    The result is cached with the dataset, by its rows, the settings and the tokenizer. A stream is encoded as it is
    read. The report is logged once. `images` reads images: the places of their tokens are counted from their sizes, and
    they stay in a column, undecoded.

    Raises DataError when the dataset is empty or its columns are not those of a row kind, for values that are not what
    the kind needs (with row and column), and when no row is left.
    """
    settings = settings or EncodeSettings()
    dataset = without_format(dataset, name)
    dataset = dataset if images is None else undecoded(dataset)
    columns = _columns(dataset, name)
    reads = images is not None
    kind = detect_kind(columns, allowed=settings.kinds, text_field=settings.text_field, reads_images=reads)
    has_inputs = INPUTS in columns and isinstance(next(iter(dataset))[INPUTS], Mapping)
    tokenization = Tokenization(tokenizer, settings, images)
    is_packed = kind == "tokenized" and comes_packed(columns, _first_rows(dataset))
    if kind == "tokenized_preference":
        refuse_packed(columns, kind)
    encoder = RowEncoder(tokenization, kind, tuple(columns), has_inputs=has_inputs, is_packed=is_packed)
    if isinstance(dataset, IterableDataset):
        return _encode_stream(dataset, encoder, columns, name)
    return _encode_table(dataset, encoder, name)


def without_format(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The rows as Python values. Raises DataError for rows that a function makes as they are read."""
    if isinstance(dataset, IterableDataset):
        return dataset
    form = dataset.format
    if form["type"] == "custom":
        raise DataError(
            f"The dataset {name!r} has a transform (with_transform, set_transform): what it makes as rows are read is not "
            "known beforehand, and what is trained on is encoded once. Use dataset.map(function) in its place, and "
            "dataset.with_format(None) to take the transform off."
        )
    shown = dataset if set(form["columns"]) == set(dataset.column_names) else dataset.select_columns(form["columns"])
    return shown if form["type"] is None else shown.with_format(None)


def _first_rows(dataset: Dataset | IterableDataset) -> list[Mapping[str, Any]]:
    """So many rows as decide on what all of them are: of a stream the first."""
    return list(dataset.take(1 if isinstance(dataset, IterableDataset) else FIRST_ROWS))


def _columns(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"The dataset {name!r} is empty: it has no rows. Check its split, filters and fractions.")
    return dataset.column_names or list(first)


def _encode_table(dataset: Dataset, encoder: RowEncoder, name: str) -> Encoded:
    encoded, counts = _mapped(dataset, encoder, name)
    report = EncodingReport.of(counts, name)
    if not report.rows:
        raise DataError(nothing_left(counts, encoder.settings, report))
    if report.overlong:
        first = np.flatnonzero(counts["status"].to_numpy() == OVERLONG)[:ROWS_NAMED] + 1
        logger.warning("Rows of %r whose images do not fit, the first of them: %s.", name, first.tolist())
    if report.dropped:
        kept = np.flatnonzero(counts["status"].to_numpy() == KEPT)
        encoded = encoded.select(kept).flatten_indices()
    report.log()
    return Encoded(encoded.remove_columns(list(_COUNTS)), encoder.kind, report)


def _mapped(dataset: Dataset, encoder: RowEncoder, name: str) -> tuple[Dataset, pa.Table]:
    """The encoded rows and their counts, from the cache where it is whole; a damaged one is made again, which is said."""

    def run(**more: Any) -> tuple[Dataset, pa.Table]:
        encoded = dataset.map(
            encoder,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            features=encoder.features(dataset.features),
            num_proc=encoder.settings.num_proc,
            new_fingerprint=encoder.fingerprint(dataset._fingerprint),
            desc=f"Encoding {name}",
            **more,
        )
        encoded.data.table.validate(full=True)
        return encoded, encoded.data.table.select(_COUNTS)

    try:
        return run()
    except (pa.ArrowException, OSError, KeyError) as error:
        if not dataset.cache_files:
            raise
        logger.warning(f"The cache of the encoded {name!r} is damaged ({error}): encoding anew.")
        return run(load_from_cache_file=False)


def _encode_stream(dataset: IterableDataset, encoder: RowEncoder, columns: list[str], name: str) -> Encoded:
    encoded = Encoded(dataset, encoder.kind, EncodingReport(name))

    def encode(batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        table = encoder(batch, rows)
        encoded.report += EncodingReport.of(table.select(_COUNTS), name)
        kept = table.filter(pa.array(table["status"].to_numpy() == KEPT))
        return kept.drop_columns(list(_COUNTS)).to_pydict()

    removed = [name for name in columns if name not in encoder.kept]
    encoded.dataset = dataset.map(encode, batched=True, with_indices=True, remove_columns=removed)
    return encoded


def nothing_left(counts: pa.Table, settings: EncodeSettings, report: EncodingReport) -> str:
    """Why no row of a dataset can be trained on."""
    if report.identical == report.rows_in:
        return f"All {report.rows_in:,} rows of {report.name!r} have chosen equal to rejected: nothing can be learned."
    shortest = int(counts["source_tokens"].to_numpy().min())
    return (
        f"No row of {report.name!r} has a token left to train on: {report.dropped:,} of {report.rows_in:,} rows were "
        f"dropped. max_length={settings.max_length}, max_prompt_length={settings.max_prompt_length}, and the shortest "
        f"row has {shortest:,} tokens. Raise max_length, choose truncation_mode='keep_end', or check the masks."
    )


class RowEncoder:
    """From a batch of rows to a table of encoded ones, row by row; the function that `map` calls."""

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
        wanted = self._needed() | {*keep, *settings.token_signals} | pictures
        self.columns = [name for name in columns if name in wanted]
        self.kept = [name for name in self.columns if name in keep - pictures]
        self.is_masked = self._is_masked()
        self.is_packed = is_packed
        if is_packed and (settings.encoder_decoder or settings.token_signals or self.kept):
            reads = (
                "encoder-decoders read"
                if settings.encoder_decoder
                else f"column {[*settings.token_signals, *self.kept][0]!r} is of"
            )
            raise DataError(
                f"The rows came packed, several documents in one, and {reads} one example: give the documents as rows."
            )

    def _needed(self) -> set[str]:
        text = {self.settings.text_field} if self.kind == "language_modeling" else set()
        return {name for name in COLUMNS_READ[self.kind] if name != "text"} | text

    def _is_masked(self) -> bool:
        if self.kind == "tokenized":
            return any(name in self.columns for name in ("labels", "completion_mask", "assistant_masks"))
        chosen_tokens = self.settings.assistant_only_loss or self.settings.token_mask is not None
        return self.kind in ("stepwise", "dialogue") or chosen_tokens

    def __call__(self, batch: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> pa.Table:
        given = columns = Columns({name: batch[name] for name in self.columns}, rows, is_packed=self.is_packed)
        for name in NUMBERS & set(self.kept):
            columns.check_finite(name)
        if (processing := self.tokenization.images) is not None:
            columns = place_images(columns, processing, has_template=processing.processor.chat_template is not None)
        trees = ENCODERS[self.kind](columns, self.tokenization)
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
        cut = [self._cut(tree, self._uncut(k, tree, columns)) for k, tree in enumerate(trees)]
        left = [_emptied(tree) if shorter is None else shorter for tree, shorter in zip(trees, cut, strict=True)]
        self._check_limits(left, columns)
        kept = replace(columns, values={**columns.values, **given.values})
        return self._table(trees, left, kept, overlong=[shorter is None for shorter in cut])

    def _check_limits(
        self, trees: Sequence[Tree], columns: Columns, documents: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Raises DataError for a row with a token or a position that the model has no embedding for."""
        s = self.settings
        for k, tree in enumerate(trees):
            sides = (len(tree.prompt), tree.longest)
            size = max(documents[k]) if documents else max(sides) if s.encoder_decoder else sum(sides)
            if s.positions is not None and size > s.positions:
                raise DataError(
                    f"Row {columns.rows[k] + 1}: {size:,} tokens, and the model has {s.positions:,} positions: set "
                    f"max_length={s.positions}, or less, or leave long rows out."
                )
            top = tree.highest_id
            if s.embedded is not None and columns.images is None and top >= s.embedded:
                token = self.tokenization.tokenizer.convert_ids_to_tokens(top)
                raise DataError(
                    f"Row {columns.rows[k] + 1}: token {token!r} ({top}) has no embedding, the model's has {s.embedded:,} "
                    "rows. If tokens were added, resize it (model.resize_token_embeddings(len(tokenizer)) and save the "
                    "model); else the tokenizer is another model's."
                )

    def _uncut(self, k: int, tree: Tree, columns: Columns) -> int:
        """Tokens of prompt and first completion that are not to be cut: those up to the end of the last image."""
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
        """The tree within the limits; None if its first `whole` tokens are not."""
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
        trained = [tree.trained(unpredicted=self._unpredicted(tree)) for tree in trees]
        tokens, source_tokens = [tree.tokens for tree in trees], [tree.tokens for tree in sources]
        counts = {
            "status": pa.array(self._statuses(trees, trained, overlong or [False] * len(trees)), pa.uint8()),
            "truncated": pa.array(np.not_equal(tokens, source_tokens)),
            "tokens": pa.array(tokens, pa.int32()),
            "trained": pa.array(map(sum, trained), pa.int32()),
            "source_tokens": pa.array(source_tokens, pa.int32()),
        }
        rows = self._rows(trees) if documents is None else self._documents(trees, documents)
        if columns.images is not None:
            rows[IMAGES] = pa.array([list(map(stored, own)) for own in columns.images], STORED)
        return pa.table({**rows, **{n: pa.array(columns[n]) for n in self.kept}, **counts})

    def _rows(self, trees: list[Tree]) -> dict[str, pa.Array]:
        """The columns of the encoded rows themselves."""
        rows = {"prompt_ids": nested([tree.prompt for tree in trees], pa.int32())}
        if self.kind != "prompt_only":
            rows["completion_ids"] = doubly_nested([tree.completions for tree in trees], pa.int32())
        if self.is_masked:
            rows["completion_mask"] = doubly_nested([tree.all_masks for tree in trees], pa.bool_())
        for name in trees[0].signals:
            rows[name] = doubly_nested([tree.signals[name] for tree in trees], pa.float32())
        return rows

    def _documents(self, trees: list[Tree], lengths: Sequence[Sequence[int]]) -> dict[str, pa.Array]:
        """The columns of rows that came packed."""
        ids = [tree.completions[0] for tree in trees]
        return {
            "input_ids": nested(ids, pa.int32()),
            "mask": nested([tree.masks[0] for tree in trees], pa.bool_()),
            "seq_lengths": nested(lengths, pa.int32()),
        }

    def _unpredicted(self, tree: Tree) -> int:
        return int(not self.settings.encoder_decoder and not tree.prompt)

    def _statuses(self, trees: list[Tree], trained: list[list[int]], overlong: Sequence[bool]) -> list[int]:
        rows = zip(trees, trained, overlong, strict=True)
        return [OVERLONG if too_long else self._status(tree, tokens) for tree, tokens, too_long in rows]

    def _status(self, tree: Tree, trained: list[int]) -> int:
        if 0 in trained:
            return UNSCORED
        return IDENTICAL if len(trained) == 2 and tree.completions[0] == tree.completions[1] else KEPT

    def features(self, source: Features) -> Features:
        """The columns of an encoded dataset, `source` being those of the original."""
        types = {"prompt_ids": "int32", "completion_ids": "int32", "completion_mask": "bool", "step_label": "float32"}
        types |= dict.fromkeys(self.settings.token_signals, "float32")
        rows = {name: List(List(Value(dtype))) for name, dtype in types.items()} | {"prompt_ids": List(Value("int32"))}
        absent = {
            "completion_ids": self.kind == "prompt_only",
            "completion_mask": not self.is_masked,
            "step_label": self.kind != "stepwise",
        }
        rows = {name: feature for name, feature in rows.items() if not absent.get(name)}
        if self.is_packed:
            rows = {
                n: List(Value(t)) for n, t in {"input_ids": "int32", "mask": "bool", "seq_lengths": "int32"}.items()
            }
        counts = dict(zip(_COUNTS, map(Value, ("uint8", "bool", "int32", "int32", "int32")), strict=True))
        images = {} if self.tokenization.images is None else {IMAGES: FEATURE}
        return Features({**rows, **images, **{name: source[name] for name in self.kept}, **counts})

    def fingerprint(self, source: str) -> str:
        """Cache key of the encoding of a dataset with fingerprint `source`."""
        tokenizer, images = self.tokenization.tokenizer, self.tokenization.images
        parts = (_FORMAT, source, self.kind, self.columns, self.settings, tokenizer_key(tokenizer))
        return Hasher.hash(parts if images is None else (*parts, images.settings()))


def _emptied(tree: Tree) -> Tree:
    return tree.sliced(slice(0), [slice(0)] * len(tree.completions))


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what a tokenizer makes of text; not of the padding and truncation that calls leave in it."""
    if not tokenizer.is_fast:
        return Hasher.hash(tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return Hasher.hash((backend.to_str(), tokenizer.chat_template, tokenizer.special_tokens_map))


def decode(row: Mapping[str, Any]) -> list[Example]:
    """An encoded row as Examples: one of a tree, one per document of a packed row.

    Further columns that hold numbers become signals: a number goes to every completion, a list gives one number to
    each completion, a list of lists one to each token.
    """
    if "seq_lengths" in row:
        return _documents(row)
    ids = row.get("completion_ids", ())
    masks = row["completion_mask"] if "completion_mask" in row else [None] * len(ids)
    signals = {name: _spread(value, len(ids)) for name, value in row.items() if _is_signal(name, value)}
    completions = tuple(
        Completion(ids[k], masks[k], {name: values[k] for name, values in signals.items()}) for k in range(len(ids))
    )
    return [Example(row["prompt_ids"], completions, _inputs(row.get(INPUTS)))]


def inputs_of(column: Sequence[Mapping[str, Any]] | None, count: int) -> list[dict[str, Tensor]]:
    """The column `inputs` of `count` rows as tensors; nothing where rows have none."""
    return [{}] * count if column is None else [_inputs(values) for values in column]


def _inputs(values: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Inputs of a row as tensors, those left out that it has not."""
    return {name: torch.as_tensor(value) for name, value in (values or {}).items() if value is not None}


def _is_signal(name: str, value: Any) -> bool:
    return name not in _LAYOUT_COLUMNS and isinstance(value, int | float | list)


def _spread(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, list) else [float(value)] * count


def _documents(row: Mapping[str, Any]) -> list[Example]:
    ids, mask = row["input_ids"], row["mask"]
    bounds = [0, *accumulate(row["seq_lengths"])]
    return [Example((), (Completion(ids[a:b], mask[a:b]),)) for a, b in pairwise(bounds)]
