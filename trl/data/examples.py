"""Collators that convert dataset rows to the examples of a training step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, ClassVar

import datasets
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import DataCollatorForSeq2Seq

from trl.data.encode import decode
from trl.data.multimodal import IMAGES
from trl.errors import ConfigError, DataError
from trl.types import Completion, Example, ListNotDict
from trl.vision.processing import ImageProcessing

logger = logging.getLogger(__name__)

IGNORE = -100
SHOWN = 40
"""Most tokens of a row that an error message quotes."""

ENCODED = {"prompt_ids", "completion_ids", "seq_lengths"}
"""Columns by which encoded rows are recognised."""


def columns_of(rows: datasets.Dataset | datasets.IterableDataset) -> list[str]:
    """The columns of a dataset; some streams know them only from their first row."""
    return rows.column_names or list(next(iter(rows)))


def check_datasets(train: Any, evaluation: Any) -> None:
    """Raise ConfigError for arguments of a trainer that are not datasets; `evaluation` may be a dict of datasets by name."""
    sets = {f"eval_dataset[{k!r}]": rows for k, rows in evaluation.items()} if isinstance(evaluation, Mapping) else {}
    for argument, rows in {"train_dataset": train, **(sets or {"eval_dataset": evaluation})}.items():
        if rows is not None:
            _check_rows(rows, argument)


def _check_rows(rows: Any, argument: str) -> None:
    if isinstance(rows, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ConfigError(f"{argument} has the splits {list(rows)}: give one of them, dataset[{next(iter(rows))!r}].")
    if not isinstance(rows, datasets.Dataset | datasets.IterableDataset):
        raise ConfigError(
            f"{argument} has to be a Dataset or IterableDataset of the library datasets, got {type(rows).__name__}: "
            "datasets.Dataset.from_list(rows) makes one of a list of dicts, Dataset.from_generator of anything else."
        )


class Examples(ListNotDict):
    """The examples of a batch of the data loader."""

    no_dict: ClassVar[str] = (
        "A batch of the data loader is a list of examples, not a dict of input_ids and labels: `trainer.preview()` shows them. "
        "batch[0] has token ids in `prompt` and `completions[0].ids`, and in `completions[0].mask` which of these are trained on."
    )


def collate_examples(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
    """The examples of encoded rows; a packed row has several."""
    return Examples(example for row in rows for example in decode(row))


Collate = Callable[[Sequence[Mapping[str, Any]]], list[Example]]

PLAIN = {"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids", "mm_token_type_ids", "seq_idx"}
PLAIN |= {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
"""Keys of a collator's batch that describe tokens; of these, token types, positions and sequence starts are recomputed."""


class ImageCollator:
    """Collates encoded rows to examples with the model inputs of their images; runs in the workers of the data loader."""

    def __init__(self, processing: ImageProcessing) -> None:
        self.processing = processing

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        return Examples(chain.from_iterable(map(self.examples, rows)))

    def examples(self, row: Mapping[str, Any]) -> list[Example]:
        """The examples of a row; the images of a packed row are distributed to its documents."""
        examples, images = decode(row), list(row.get(IMAGES) or ())
        counts = row.get("image_counts") or [len(images)]
        found, at = [], 0
        for example, own in zip(examples, counts, strict=True):
            try:
                found.append(self.processing.with_images(example, images[at : at + own]))
            except DataError as error:
                tokens = [token for token in _flat(example) if token != self.processing.token_id][:SHOWN]
                beginning = self.processing.processor.tokenizer.decode(tokens)
                raise DataError(f"{error} It is in the row that begins with {beginning!r}.") from error
            at += own
        return found


def check_collator(data_collator: Callable | None, *, encoder_decoder: bool) -> Callable | None:
    """The collator of a script; None for one that pads batches of encoder-decoders, since these are padded anyway.

    Raises ConfigError for other collators of encoder-decoders: their batches do not tell prompts from completions.
    """
    if not encoder_decoder or data_collator is None:
        return data_collator
    if (
        isinstance(data_collator, DataCollatorForSeq2Seq)
        and type(data_collator).__call__ is DataCollatorForSeq2Seq.__call__
    ):
        return None
    raise ConfigError(
        f"data_collator is a {type(data_collator).__name__}, but batches for an encoder-decoder are made by the trainer: leave it "
        "out. Rows with input_ids and labels need none."
    )


def examples_from(data_collator: Callable, images: ImageProcessing | None = None) -> Collate:
    """Make a function from rows to examples out of a user's collator: see `examples_of`.

    For encoded rows, the collator is passed `input_ids`, with `labels` if not all tokens are trained on. Else it is passed the
    raw rows: with a processor one at a time, so that the image inputs in its batch belong to that row.
    """

    pads_labels, said = isinstance(data_collator, DataCollatorForSeq2Seq), set[str]()

    def collate(rows: Sequence[Mapping[str, Any]]) -> list[Example]:
        if isinstance(rows[0], Mapping) and ENCODED & rows[0].keys():
            rows = [_labelled(example, always=pads_labels) for example in collate_examples(rows)]
        elif images is not None:
            return Examples(example for row in rows for example in _with_inputs(data_collator([row]), images))
        batch = data_collator(rows)
        if images is None and isinstance(batch, Mapping) and "pixel_values" in batch:
            raise ConfigError(
                "The batch of data_collator has pixel_values, but processing_class does not process images: give the processor, "
                "not its tokenizer."
            )
        _say_unread(batch, said)
        return Examples(examples_of(batch, source="data_collator"))

    return collate


def _say_unread(batch: Any, said: set[str]) -> None:
    """Warn once about keys of a collator's batch that are not used."""
    unread = sorted(set(batch) - PLAIN - said) if isinstance(batch, Mapping) else []
    if unread:
        said.update(unread)
        logger.warning(
            f"The batch of data_collator has {', '.join(unread)}, which is not passed to the model: remove it."
        )


def _with_inputs(batch: Any, images: ImageProcessing) -> list[Example]:
    """The examples of a collator's batch of one row, with the image inputs in the batch."""
    examples = examples_of(batch, source="data_collator")
    if not isinstance(batch, Mapping):
        return examples
    given = {name: value for name, value in batch.items() if name in images.family.joins}
    unread = sorted(batch.keys() - images.family.joins.keys() - PLAIN)
    if unread:
        raise DataError(
            f"The batch of data_collator has {', '.join(unread)}, which models of this family do not take: remove it."
        )
    return [images.placed(example, given) for example in examples]


class TokenizedRow(dict[str, list[int]]):
    """A row of token ids in the form that collators take. Labels and mask can be read even if they are all ids and all 1."""

    def __missing__(self, name: str) -> list[int]:
        if name == "labels":
            return list(self["input_ids"])
        if name == "attention_mask":
            return [1] * len(self["input_ids"])
        raise KeyError(name)


def _labelled(example: Example, *, always: bool) -> TokenizedRow:
    """An example with one completion as a row: with labels if not all tokens are trained on, or `always`.

    Raises ConfigError for an example that is more than tokens: pairs, and completions with a label or score.
    """
    if len(example.completions) != 1 or example.completions[0].signals:
        raise ConfigError(
            "A data_collator makes batches of tokens, but these rows are pairs, or have labels or scores of completions: leave it out. "
            "The trainer pads by itself."
        )
    ids, (completion,) = _flat(example), example.completions
    if not always and not example.prompt and completion.mask is None:
        return TokenizedRow(input_ids=ids)
    mask = [1] * len(completion) if completion.mask is None else completion.mask
    trained = [0] * len(example.prompt) + list(mask)
    labels = [i if kept else IGNORE for i, kept in zip(ids, trained, strict=True)]
    return TokenizedRow(input_ids=ids, labels=labels)


def _flat(example: Example) -> list[int]:
    return [*example.prompt, *(example.completions[0].ids if example.completions else ())]


def examples_of(batch: Sequence[Example] | Mapping[str, Any], *, source: str) -> list[Example]:
    """The examples of a batch, which is a list of examples, or a dict of tensors as the collators of `transformers` return.

    The tensors are padded `input_ids`, `attention_mask` and `labels` `[B,T]`, or without padding `input_ids`, `labels` and
    `position_ids` that restart with each sequence `[1,T]`. Tokens with the label −100 are not trained on.

    Raises DataError, which names the `source`, for anything else.
    """
    if not isinstance(batch, Mapping):
        return list(batch)
    if missing := {name for name in ("input_ids", "labels") if batch.get(name) is None}:
        raise DataError(
            f"The batch of {source} has no {' and no '.join(sorted(missing))}, only {sorted(batch)}: give input_ids, "
            "attention_mask and labels [B,T], with the label −100 for tokens that are not trained on."
        )
    ids, labels = batch["input_ids"], batch["labels"]
    if ids.shape != labels.shape or ((labels != ids) & (labels != IGNORE)).any():
        raise DataError(
            f"The labels of {source} have to equal input_ids, or be {IGNORE} for tokens that are not trained on. For an "
            "encoder-decoder leave the collator out: rows with input_ids and labels need none."
        )
    return [
        Example([], (Completion(ids[row][here].tolist(), (labels[row][here] != IGNORE).long().tolist()),))
        for row, here in _sequences(batch)
    ]


def _sequences(batch: Mapping[str, Any]) -> Iterator[tuple[int, Tensor]]:
    """Row and mask of positions of every sequence in a batch."""
    everything = torch.ones_like(batch["input_ids"], dtype=torch.bool)
    present = batch.get("attention_mask", everything).bool()
    restarts = batch["position_ids"] == 0 if "position_ids" in batch and "attention_mask" not in batch else ~everything
    for row, document in enumerate(restarts.cumsum(1)):
        for number in document.unique():
            yield row, present[row] & (document == number)


def row_numbers(rows: Any, examples: Sequence[Example], collate: Collate = collate_examples) -> list[int | None]:
    """The row numbers of examples in the encoded dataset; None for examples that are not in it (samples, rows of a stream).

    `collate` makes examples of rows, so that further model inputs of an example are compared as well as its token ids.
    """
    if not isinstance(rows, datasets.Dataset) or not {"completion_ids", "seq_lengths"} & set(rows.column_names):
        return [None] * len(examples)
    wanted: dict[tuple, list[int]] = {}
    for i, example in enumerate(examples):
        wanted.setdefault(_ids(example), []).append(i)
    found: list[int | None] = [None] * len(examples)
    for number, row in enumerate(rows):
        for place, example in enumerate(decode(row)):
            for i in wanted.get(_ids(example), ()):
                same = not examples[i].inputs or collate([row])[place].key == examples[i].key
                found[i] = number if found[i] is None and same else found[i]
    return found


def _ids(example: Example) -> tuple:
    return tuple(example.prompt), tuple(tuple(c.ids) for c in example.completions)


class Endless(IterableDataset):
    """A stream of rows that starts again when it ends: a single endless epoch, in which every batch is full.

    So the position of training in it is given by the number of batches alone. A shuffled stream has a new order each time.
    """

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        for epoch in count():
            self.rows.set_epoch(epoch)
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty:
                raise DataError("The stream of training rows is empty: it has no rows, or all of them were dropped.")
