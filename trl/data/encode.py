"""Encode dataset rows to token ids: every row kind becomes a tree of one prompt and its completions.

An encoded row has the columns

    prompt_ids       list[int32]         empty for a text or a whole conversation
    completion_ids   list[list[int32]]   K completions; chosen before rejected
    completion_mask  list[list[bool]]    the tokens to train on; absent if all tokens are trained on
    step_label, …    list[list[float]]   numbers per token
    inputs           {name: array}       further model inputs for the prompt, unchanged; only if rows have them
    keep_columns     unchanged

A prompt is tokenised separately and never shares a token with its completion, since at generation time the model continues
ids(prompt). `decode` turns an encoded row into Examples.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trl.counts import counted, percent
from trl.data.formats import COLUMNS_READ, TEXT, detect_kind
from trl.data.multimodal import check_image_columns, undecoded
from trl.data.prepacked import comes_packed, refuse_packed
from trl.data.row_encoder import COUNTS, INPUTS, RowEncoder
from trl.data.settings import EncodeSettings
from trl.data.shown import ALIKE
from trl.data.tokenization import Tokenization
from trl.data.trees import (
    IDENTICAL,
    KEPT,
    OVERLONG,
    UNSCORED,
)
from trl.errors import DataError
from trl.types import Completion, Example
from trl.vision.processing import ImageProcessing

logger = logging.getLogger(__name__)

ROWS_WARNED_OF = 100
"""Rows that are encoded again, if all come from the cache, for the warnings about them."""

FIRST_ROWS = 1000
"""Number of rows that are inspected to see whether attention masks number the documents of packed rows."""
ROWS_NAMED = 5
"""Most row numbers that a warning lists."""

_LAYOUT_COLUMNS = frozenset({"prompt_ids", "completion_ids", "completion_mask", INPUTS, "images", "image_counts"})


@dataclass(frozen=True)
class EncodingReport:
    """Counts of a dataset's kept, truncated and dropped rows, and of its tokens.

    `tokens` counts a prompt once; `trained` counts the tokens that are trained on.
    """

    name: str = "train"
    rows_in: int = 0
    rows: int = 0
    truncated: int = 0
    unscored: int = 0
    identical: int = 0
    overlong: int = 0
    tokens: int = 0
    trained: int = 0
    long: int = 0
    """Number of rows longer than `pretrained_length`, the longest sequence that the model supports."""
    longest: int = 0
    """Number of tokens of the longest sequence."""
    pretrained_length: int | None = None
    unread: tuple[str, ...] = ()
    """Columns that are not used."""

    @property
    def dropped(self) -> int:
        """Number of rows dropped: with no token left to train on, chosen equal to rejected, or images that do not fit."""
        return self.unscored + self.identical + self.overlong

    @classmethod
    def of(cls, counts: pa.Table, name: str, pretrained_length: int | None = None) -> EncodingReport:
        """The report of encoded rows, from their `COUNTS` columns."""
        column = {name: counts[name].to_numpy() for name in COUNTS}
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
            long=0 if pretrained_length is None else int((column["longest"][kept] > pretrained_length).sum()),
            longest=int(column["longest"][kept].max(initial=0)),
            pretrained_length=pretrained_length,
        )

    def __add__(self, other: EncodingReport) -> EncodingReport:
        same = ("name", "unread", "pretrained_length", "longest")
        counts = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name not in same}
        return replace(self, **counts, longest=max(self.longest, other.longest))

    def __str__(self) -> str:
        parts = [f"{self.name}: {counted(self.rows, 'row')}, {counted(self.tokens, 'token')}"]
        # Rows that consist of a prompt alone have no token to train on, and are kept.
        parts += [f"{self.trained:,} trained ({percent(self.trained, self.tokens)})"] if self.trained else []
        parts += [f"{self.truncated:,} truncated"] if self.truncated else []
        parts += [f"{self.unscored:,} dropped (no token left to train on)"] if self.unscored else []
        parts += [f"{self.identical:,} dropped (chosen equals rejected)"] if self.identical else []
        parts += [f"{self.overlong:,} dropped (images do not fit into max_length)"] if self.overlong else []
        if self.long:
            parts += [
                f"{self.long:,} longer than the model's context of {self.pretrained_length:,} tokens (the longest has "
                f"{self.longest:,}: max_length={self.pretrained_length} cuts such rows, rope_parameters extend the context)"
            ]
        unread = f" Not read: {', '.join(self.unread)}." if self.unread else ""
        return ", ".join(parts) + "." + unread

    def log(self) -> None:
        """Log the report: as a warning if rows were dropped, truncated, or are longer than the model's context."""
        is_worth_a_warning = self.dropped or self.truncated or self.long
        logger.log(logging.WARNING if is_worth_a_warning else logging.INFO, "%s", self)


@dataclass
class Encoded:
    """An encoded dataset with its report. For a stream, the report counts the rows read so far in this process."""

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
    """Tokenise, mask and truncate every row, and drop rows with no token left to train on.

    The result is cached by the dataset's fingerprint, the settings and the tokenizer. A stream is encoded while it is read.
    The report is logged once. With `images`, image tokens are counted from the sizes of images, which stay in a column,
    undecoded.

    Raises DataError if the dataset is empty, if its columns do not fit any row kind, if a value is invalid for the kind (with
    row and column), and if no row is left.
    """
    settings = settings or EncodeSettings()
    dataset = without_format(dataset, name)
    dataset = dataset if images is None else undecoded(dataset)
    columns = _columns(dataset, name)
    reads = images is not None
    kind = detect_kind(columns, allowed=settings.kinds, text_field=settings.text_field, reads_images=reads)
    has_inputs = INPUTS in columns and isinstance(next(iter(dataset))[INPUTS], Mapping)
    tokenization = Tokenization(tokenizer, settings, images)
    deciding = 1 if isinstance(dataset, IterableDataset) else FIRST_ROWS
    is_packed = kind == "tokenized" and comes_packed(columns, list(first_rows(dataset, deciding)))
    if kind == "tokenized_preference":
        refuse_packed(columns, kind)
    encoder = RowEncoder(tokenization, kind, tuple(columns), has_inputs=has_inputs, is_packed=is_packed)
    if images is not None:
        check_image_columns(dataset, encoder.unread, encoder.kept)
    _say_unread(columns, encoder, name)
    if isinstance(dataset, IterableDataset):
        return _encode_stream(dataset, encoder, columns, name)
    return _encode_table(dataset, encoder, name)


def _say_unread(columns: Sequence[str], encoder: RowEncoder, name: str) -> None:
    """Warn if the column `dataset_text_field` does not exist or is not used, and of unused columns that look like typing errors."""
    field = encoder.settings.text_field
    if (
        field in encoder.unread
        and "language_modeling" in (encoder.settings.kinds or ())
        and encoder.kind != "tokenized"
    ):
        logger.warning(
            f"The column {field!r} of {name!r} is not trained on, since the rows also have {', '.join(encoder.columns)}. To train on "
            f"it, remove the other columns: dataset.select_columns([{field!r}])."
        )
    if field != TEXT and field not in columns and encoder.kind != "tokenized":
        logger.warning(
            f"dataset_text_field={field!r} is not a column of {name!r}: the columns {list(encoder.columns)} are used instead."
        )
    read = {*COLUMNS_READ[encoder.kind], *encoder.settings.keep_columns}
    for column in encoder.unread:
        if near := difflib.get_close_matches(column.lower(), read - {*columns}, n=1, cutoff=ALIKE):
            logger.warning(f"The column {column!r} of {name!r} is not used. Did you mean {near[0]!r}?")


def without_format(dataset: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
    """The dataset with rows as Python values. Raises DataError for a dataset with a transform."""
    if isinstance(dataset, IterableDataset):
        return dataset
    form = dataset.format
    if form["type"] == "custom":
        raise DataError(
            f"The dataset {name!r} has a transform (with_transform, set_transform), which changes rows each time they are read, "
            "but rows are encoded once, before training. Use dataset.map(function) instead, and dataset.with_format(None) to "
            "remove the transform."
        )
    shown = dataset if set(form["columns"]) == set(dataset.column_names) else dataset.select_columns(form["columns"])
    return shown if form["type"] is None else shown.with_format(None)


def first_rows(dataset: Dataset | IterableDataset, count: int) -> Dataset | IterableDataset:
    """The first `count` rows, or all if there are fewer, for which `Dataset.take` raises before datasets 5."""
    return dataset.take(count if isinstance(dataset, IterableDataset) else min(count, len(dataset)))


def _columns(dataset: Dataset | IterableDataset, name: str) -> list[str]:
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"The dataset {name!r} is empty: it has no rows. Check its split, filters and fractions.")
    return dataset.column_names or list(first)


def _encode_table(dataset: Dataset, encoder: RowEncoder, name: str) -> Encoded:
    encoded, counts = _mapped(dataset, encoder, name)
    if not encoder.has_run:  # in this process: the rows come from the cache, which has no warnings
        first = first_rows(dataset, ROWS_WARNED_OF)
        encoder(first[:], range(len(first)))
    report = EncodingReport.of(counts, name, encoder.settings.pretrained_length)
    report = replace(report, unread=encoder.unread)
    if not report.rows:
        raise DataError(nothing_left(counts, encoder.settings, report))
    if report.overlong:
        first = np.flatnonzero(counts["status"].to_numpy() == OVERLONG)[:ROWS_NAMED] + 1
        logger.warning(
            "The images of some rows of %r do not fit into the limits. The first such rows: %s.", name, first.tolist()
        )
    if report.dropped:
        kept = np.flatnonzero(counts["status"].to_numpy() == KEPT)
        encoded = encoded.select(kept).flatten_indices()
    report.log()
    return Encoded(encoded.remove_columns(list(COUNTS)), encoder.kind, report)


def _mapped(dataset: Dataset, encoder: RowEncoder, name: str) -> tuple[Dataset, pa.Table]:
    """The encoded rows and their counts, from the cache if there is one; a damaged cache is rebuilt, with a warning."""

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
        return encoded, encoded.data.table.select(list(COUNTS))

    try:
        return run()
    except (pa.ArrowException, OSError, KeyError) as error:
        if not dataset.cache_files:
            raise
        logger.warning(f"The cache of the encoded dataset {name!r} is damaged ({error}): encoding it again.")
        return run(load_from_cache_file=False)


def _encode_stream(dataset: IterableDataset, encoder: RowEncoder, columns: list[str], name: str) -> Encoded:
    most = encoder.settings.pretrained_length
    encoded = Encoded(dataset, encoder.kind, EncodingReport(name, pretrained_length=most, unread=encoder.unread))

    def encode(batch: Mapping[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        table = encoder(batch, rows)
        before = encoded.report.long
        encoded.report += EncodingReport.of(table, name, most)
        if encoded.report.long and not before:
            logger.warning("Of the rows of the stream read so far: %s", encoded.report)
        kept = table.filter(pa.array(table["status"].to_numpy() == KEPT))
        return kept.drop_columns(list(COUNTS)).to_pydict()

    removed = [name for name in columns if name not in encoder.kept]
    encoded.dataset = dataset.map(encode, batched=True, with_indices=True, remove_columns=removed)
    return encoded


def nothing_left(counts: pa.Table, settings: EncodeSettings, report: EncodingReport) -> str:
    """The error message for a dataset of which no row can be trained on."""
    if report.identical == report.rows_in:
        return f"Every row of {report.name!r} has chosen equal to rejected: nothing can be learned."
    limits = f"max_length={settings.max_length}, max_prompt_length={settings.max_prompt_length}"
    shortest = int(counts["source_tokens"].to_numpy().min())
    if report.overlong == report.rows_in:
        return (
            f"No row of {report.name!r} fits: images, and the tokens before them, are never cut, and the shortest row has "
            f"{shortest:,} tokens with its images, but {limits}. Raise these limits, or bound the size of images by max_pixels."
        )
    return (
        f"No row of {report.name!r} has a token left to train on: {report.dropped:,} of {counted(report.rows_in, 'row')} were "
        f"dropped. {limits}, and the shortest row has {shortest:,} tokens. Raise max_length, choose "
        "truncation_mode='keep_end', or check the masks."
    )


def not_encoded(columns: Iterable[str]) -> DataError:
    """The error for rows with these columns, where a trainer reads encoded rows."""
    return DataError(
        f"This row is not encoded: it has the columns {', '.join(columns)}. A trainer encodes the rows that it is made with; "
        "a dataset that replaces trainer.train_dataset later needs the columns of the dataset that it replaces."
    )


def decode(row: Mapping[str, Any]) -> list[Example]:
    """Convert an encoded row to Examples: one per row, or one per document of a packed row.

    Further columns with numbers become signals: a number holds for every completion, a list has one number per completion,
    and a list of lists has one number per token.
    """
    if "seq_lengths" in row:
        return _documents(row)
    if "prompt_ids" not in row:
        raise not_encoded(row)
    ids = row.get("completion_ids", ())
    masks = row["completion_mask"] if "completion_mask" in row else [None] * len(ids)
    numbers = {n: v for n, v in row.items() if n not in _LAYOUT_COLUMNS and isinstance(v, int | float | list)}
    signals = {name: _spread(value, len(ids)) for name, value in numbers.items()}
    completions = tuple(
        Completion(ids[k], masks[k], {name: values[k] for name, values in signals.items()}) for k in range(len(ids))
    )
    return [Example(row["prompt_ids"], completions, _inputs(row.get(INPUTS)))]


def inputs_of(column: Sequence[Mapping[str, Any]] | None, count: int) -> list[dict[str, Tensor]]:
    """The column `inputs` of `count` rows as dicts of tensors, empty for rows without inputs."""
    return [{}] * count if column is None else [_inputs(values) for values in column]


def _inputs(values: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The inputs of a row as tensors, without those that are None."""
    return {name: torch.as_tensor(value) for name, value in (values or {}).items() if value is not None}


def _spread(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, list) else [float(value)] * count


def _documents(row: Mapping[str, Any]) -> list[Example]:
    ids, mask = row["input_ids"], row["mask"]
    bounds = [0, *accumulate(row["seq_lengths"])]
    return [Example((), (Completion(ids[a:b], mask[a:b]),)) for a, b in pairwise(bounds)]
