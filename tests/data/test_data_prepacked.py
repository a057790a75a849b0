"""Rows that came packed: every way to say where documents begin gives the same documents, or is refused by name."""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from tests.conftest import make_tokenizer
from trl.data.encode import EncodeSettings, decode, encode_dataset
from trl.errors import DataError

TOKENIZER = make_tokenizer()
IDS = [4, 5, 6, 7, 8]


def documents(*rows, **settings):
    encoded = encode_dataset(Dataset.from_list(list(rows)), TOKENIZER, settings=EncodeSettings(**settings)).dataset
    return [[(e.completions[0].ids, e.completions[0].mask) for e in decode(row)] for row in encoded]


@pytest.mark.parametrize(
    "how",
    [
        {"seq_lengths": [3, 2]},
        {"position_ids": [0, 1, 2, 0, 1]},
        {"attention_mask": [1, 1, 1, 2, 2]},
        {"document_ids": [7, 7, 7, 9, 9]},
        {"seq_idx": [0, 0, 0, 1, 1]},
        {"position_ids": [0, 1, 2, 0, 1], "seq_lengths": [3, 2], "attention_mask": [1] * 5},
    ],
)
def test_documents_are_told_apart(how):
    expected = [([4, 5, 6], [False, True, True]), ([7, 8], [False, True])]
    assert documents({"input_ids": IDS, **how}) == [expected]


@pytest.mark.parametrize(
    "how",
    [{"attention_mask": [1, 1, 1, 2, 2, 0]}, {"attention_mask": [1] * 5 + [0], "position_ids": [0, 1, 2, 0, 1, 1]}],
)
def test_padding_is_taken_off_and_labels_count(how):
    row = {"input_ids": [*IDS, 0], "labels": [4, -100, 6, 7, 8, -100], **how}
    assert documents(row) == [[([4, 5, 6], [False, False, True]), ([7, 8], [False, True])]]


def test_rows_of_one_document_are_cut_as_others():
    assert documents({"input_ids": IDS, "position_ids": [0, 1, 2, 3, 4]}, max_length=3) == [
        [([4, 5, 6], [False, True, True])]
    ]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"position_ids": [0, 1, 2, 4, 5]}, "column 'position_ids': position id 4 of token 4: they have to count up"),
        ({"position_ids": [3, 4, 0, 1, 2]}, "column 'position_ids': position id 3 of token 1"),
        ({"position_ids": [0, 1, 0]}, "column 'position_ids': its documents have 3 tokens together, but the row has 5"),
        ({"document_ids": [1, 1, 2, 2, 1]}, "column 'document_ids': document 1 is interrupted"),
        (
            {"position_ids": [0, 1, 2, 0, 1], "seq_lengths": [2, 3]},
            r"column 'position_ids': its documents have \[3, 2\] tokens, but those of 'seq_lengths' have \[2, 3\]",
        ),
        (
            {"cu_seqlens": [0, 3, 5]},
            "Column 'cu_seqlens' .* is not supported: give the lengths of the documents in a column 'seq_lengths'",
        ),
        ({"attention_mask": [1, 1]}, "column 'attention_mask': 2 values for the 5 tokens"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(how, words):
    with pytest.raises(DataError, match=words):
        documents({"input_ids": IDS, **how})


def test_numbers_of_documents_in_a_later_row_of_a_stream_are_not_lost():
    rows = [{"input_ids": IDS, "attention_mask": [1] * 5}, {"input_ids": IDS, "attention_mask": [1, 1, 2, 2, 2]}]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(DataError, match="Row 2, column 'attention_mask': 2 numbers a document of a packed row"):
        list(encode_dataset(stream, TOKENIZER).dataset)


def test_rows_that_are_one_example_are_refused_when_they_came_packed():
    packed = {"input_ids": IDS, "position_ids": [0, 1, 2, 0, 1], "reward": 1.0}
    with pytest.raises(DataError, match="column 'reward' is of one example: give each document as a row"):
        documents(packed, keep_columns=("reward",))
    with pytest.raises(DataError, match="encoder-decoders read one example"):
        documents(packed, encoder_decoder=True)
    pair = {"input_ids_chosen": IDS, "input_ids_rejected": IDS[::-1]}
    with pytest.raises(DataError, match="Column 'position_ids' .* kind tokenized_preference hold one example"):
        documents(pair | {"position_ids": [0, 1, 2, 0, 1]})
    with pytest.raises(DataError, match="column 'attention_mask_chosen': 2 numbers a document of a packed row"):
        documents(pair | {"attention_mask_chosen": [1, 1, 1, 2, 2], "attention_mask_rejected": [1] * 5})


def test_transforms_are_refused_and_other_formats_are_read():
    rows = Dataset.from_list([{"text": "a b", "more": 1}])
    with pytest.raises(DataError, match=r"has a transform .*dataset\.map\(function\)"):
        encode_dataset(rows.with_transform(lambda batch: batch), TOKENIZER)
    assert len(encode_dataset(rows.with_format("numpy", columns=["text"]), TOKENIZER).dataset) == 1
