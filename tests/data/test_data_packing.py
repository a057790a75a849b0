"""Packing: what goes where, and that nothing is lost without being counted."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from trl.data.encode import decode
from trl.data.packing import best_fit_decreasing, pack_dataset, pack_examples, ranges
from trl.errors import ConfigError, DataError

ROWS = {
    "input_ids": [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10], [11]],
    "attention_mask": [[1, 1, 1, 0, 0], [1, 0], [1, 1, 0], [1]],
}
TREES = {"prompt_ids": [[1, 2], [], [7]], "completion_ids": [[[3]], [[4, 5, 6]], [[8, 9, 10, 11]]]}


def test_ranges():
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]


def test_best_fit_takes_the_fullest_row_with_room():
    assert best_fit_decreasing(np.array([3, 6, 4, 2, 5]), 8) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize("capacity", [1, 7, 64])
def test_best_fit_places_each_document_once_and_overfills_no_row(capacity):
    lengths = np.random.default_rng(0).integers(0, capacity + 1, 500)
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= capacity
    assert len(rows) <= np.ceil(11 / 9 * lengths.sum() / capacity) + 1 or capacity == 7


def test_best_fit_takes_documents_of_no_tokens():
    """Two rows have room for the last two; the emptier one keeps it."""
    assert best_fit_decreasing(np.array([0, 0]), 4) == [[0, 1]]
    assert best_fit_decreasing(np.array([3, 3, 1, 0]), 5) == [[0], [1, 2, 3]]


def test_bfd_cuts_long_documents():
    assert pack_dataset(Dataset.from_dict(ROWS), 4)[:] == {
        "input_ids": [[1, 2, 3, 4], [8, 9, 10, 11], [6, 7]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0]],
        "seq_lengths": [[4], [3, 1], [2]],
    }


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_a_document_without_a_token_is_none(strategy):
    packed = pack_dataset(Dataset.from_dict({"input_ids": [[1], [], [2, 3]]}), 3, strategy)
    assert sorted(packed["seq_lengths"][0]) == [1, 2]


def test_bfd_split_keeps_every_token():
    assert pack_dataset(Dataset.from_dict(ROWS), 4, "bfd_split")[:] == {
        "input_ids": [[1, 2, 3, 4], [8, 9, 10, 5], [6, 7, 11]],
        "attention_mask": [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1]],
        "seq_lengths": [[4], [3, 1], [2, 1]],
    }


def test_wrapped_fills_rows_and_keeps_documents_apart():
    assert pack_dataset(Dataset.from_dict(ROWS), 4, "wrapped")[:] == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11]],
        "attention_mask": [[1, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1]],
        "seq_lengths": [[4], [1, 2, 1], [2, 1]],
    }


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_streams_and_dictionaries_pack_alike(strategy):
    dataset = Dataset.from_dict(ROWS)
    packed = pack_dataset(dataset, 4, strategy)
    assert pack_dataset(DatasetDict(train=dataset), 4, strategy)["train"][:] == packed[:]
    assert list(pack_dataset(dataset.to_iterable_dataset(), 4, strategy)) == list(packed)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_no_token_is_lost(strategy):
    rng = np.random.default_rng(1)
    ids = [rng.integers(0, 1000, n).tolist() for n in rng.integers(1, 40, 60)]
    packed = pack_dataset(Dataset.from_dict({"input_ids": ids}), 16, strategy)
    tokens = lambda rows: sorted(t for row in rows for t in row)  # noqa: E731
    assert tokens(packed["input_ids"]) == tokens(ids)
    assert [sum(n) for n in packed["seq_lengths"]] == [len(row) for row in packed["input_ids"]]
    assert max(map(len, packed["input_ids"])) <= 16


def test_packing_happens_within_the_batches_of_map():
    packed = pack_dataset(Dataset.from_dict(ROWS), 5, map_kwargs={"batch_size": 1})
    assert packed["seq_lengths"][:] == [[5], [2], [3], [1]]


def test_unknown_strategy():
    with pytest.raises(ConfigError, match=r"Unknown packing strategy 'bdf'\. Did you mean 'bfd'"):
        pack_dataset(Dataset.from_dict(ROWS), 4, "bdf")
    with pytest.raises(ConfigError, match=r"Unknown packing strategy 'bdf'\. Did you mean 'bfd'"):
        pack_examples(Dataset.from_dict(TREES), 4, "bdf")


def test_rows_that_hold_nothing():
    with pytest.raises(ConfigError, match="seq_length=0 leaves no room"):
        pack_dataset(Dataset.from_dict(ROWS), 0)
    assert pack_dataset(Dataset.from_dict(ROWS), 1, "wrapped").num_rows == 11


def test_columns_that_are_no_lists_or_of_other_lengths():
    with pytest.raises(DataError, match="lists of tokens in every column, but 'id' holds int64"):
        pack_dataset(Dataset.from_dict({**ROWS, "id": [1, 2, 3, 4]}), 4)
    with pytest.raises(DataError, match="Row 2 of a batch has 1 values in 'labels' and 2 in 'input_ids'"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [[1], [2]]}), 4)


def documents(packed):
    return [(list(c.ids), list(map(bool, c.mask))) for row in packed for e in decode(row) for c in e.completions]


def test_packed_examples_become_documents_with_their_prompts_masked():
    packed, report = pack_examples(Dataset.from_dict(TREES), 8)
    assert packed["seq_lengths"][:] == [[5, 3], [3]]
    assert documents(packed) == [
        ([7, 8, 9, 10, 11], [False, True, True, True, True]),
        ([1, 2, 3], [False, False, True]),
        ([4, 5, 6], [False, True, True]),
    ]
    assert (report.documents, report.tokens, report.trained, report.lost) == (3, 11, 7, 0)
    assert "68.8% filled" in str(report)


def test_what_packing_cuts_off_is_counted_and_said(caplog):
    _, report = pack_examples(Dataset.from_dict(TREES), 4)
    assert (report.tokens_in, report.tokens, report.lost) == (11, 10, 1)
    assert "packed 3 rows into 3 of 4 tokens, 83.3% filled, 1 tokens cut off." in caplog.text


def test_a_document_cut_before_its_answer_is_dropped():
    rows = {"prompt_ids": [[1, 2, 3, 4], [5]], "completion_ids": [[[6, 7]], [[8]]]}
    packed, report = pack_examples(Dataset.from_dict(rows), 4)
    assert documents(packed) == [([5, 8], [False, True])]
    assert report.lost == 6
    with pytest.raises(DataError, match="Packing to 1 tokens left no document"):
        pack_examples(Dataset.from_dict(rows), 1)


def test_masks_are_packed_with_their_tokens():
    rows = {"prompt_ids": [[], []], "completion_ids": [[[1, 2, 3]], [[4, 5]]]}
    masks = {"completion_mask": [[[False, False, True]], [[False, True]]]}
    packed, _ = pack_examples(Dataset.from_dict({**rows, **masks}), 5)
    assert packed[0] == {
        "input_ids": [1, 2, 3, 4, 5],
        "mask": [False, False, True, False, True],
        "seq_lengths": [3, 2],
    }


def test_a_stream_of_examples_packs_alike():
    dataset = Dataset.from_dict(TREES)
    stream, report = pack_examples(dataset.to_iterable_dataset(), 8)
    assert list(stream) == list(pack_examples(dataset, 8)[0])
    assert report is None


def test_preferences_cannot_be_packed():
    rows = Dataset.from_dict({"prompt_ids": [[1]], "completion_ids": [[[2], [3]]]})
    with pytest.raises(DataError, match=r"rows of one completion.*packing=False"):
        pack_examples(rows, 4)
    mixed = Dataset.from_dict({"prompt_ids": [[1], [1]], "completion_ids": [[[2]], [[2], [3]]]})
    with pytest.raises(DataError, match="rows of one completion"):
        pack_examples(mixed, 4)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
def test_a_document_without_a_token_is_dropped(strategy):
    rows = {"prompt_ids": [[1], []], "completion_ids": [[[2]], [[]]]}
    packed, _ = pack_examples(Dataset.from_dict(rows), 4, strategy)
    assert documents(packed) == [([1, 2], [False, True])]
