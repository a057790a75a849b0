"""Rows that are not what they seem: each is named by row and column, in tables and in streams."""

from __future__ import annotations

import pytest
from datasets import IterableDataset

from tests.conftest import make_tokenizer
from trl.data.encode import EncodeSettings, encode_dataset
from trl.errors import DataError

TOKENIZER = make_tokenizer()
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def encode(rows, **settings):
    stream = IterableDataset.from_generator(lambda: iter(rows))
    return list(encode_dataset(stream, TOKENIZER, settings=EncodeSettings(vocabulary=50, **settings)).dataset)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input_ids": [1, 50]}, "column 'input_ids': 50 at position 2 is not a token id: they go from 0 to 49"),
        ({"input_ids": [1, -1]}, "column 'input_ids': -1 at position 2 is not a token id"),
        ({"input_ids": [2**31]}, "column 'input_ids': 2147483648 at position 1 is not a token id"),
        ({"input_ids": [2**70]}, "column 'input_ids': expected a list of integers, found int 1180591620717411303424"),
        (
            {"input_ids": [1, None]},
            "column 'input_ids': expected a list of integers, found None at position 2",
        ),
        ({"input_ids": [1, 1.5]}, "column 'input_ids': expected a list of integers, found float 1.5 at position 2"),
        ({"input_ids": [1, "2"]}, "column 'input_ids': expected a list of integers, found str '2' at position 2"),
        ({"chosen_ids": [1], "rejected_ids": [99]}, "column 'rejected_ids': 99 at position 1 is not a token id"),
        ({"text": "a\ud800b"}, r"column 'text': '\\ud800' at position 2 is half of a character"),
        (
            {"messages": [{"role": "user", "content": "\udfff"}]},
            "column 'messages': message 1: .* is half of a character",
        ),
        ({"messages": CHAT, "tools": "{"}, "column 'tools': '{' is not JSON"),
        ({"messages": CHAT, "tools": "3"}, "column 'tools': expected a list of tools, found a int"),
        ({"messages": CHAT, "tools": "[" * 100_000}, "column 'tools': .* is not JSON"),
        ({**PAIR, "margin": float("nan")}, "column 'margin': expected a finite number, found nan"),
        ({**PAIR, "score": float("-inf")}, "column 'score': expected a finite number, found -inf"),
    ],
)
def test_they_are_named(row, words):
    good = {"tools": None, **PAIR, "messages": CHAT, "text": "a", "input_ids": [1, 2], "margin": 1.0, "score": 1.0}
    good |= {"chosen_ids": [1, 2], "rejected_ids": [1, 3]}
    rows = [{name: good[name] for name in row}, row]
    with pytest.raises(DataError, match=f"Row 2[:,] {words}"):
        encode(rows, keep_columns=("margin", "score"))


def test_good_ones_are_taken():
    assert len(encode([{"input_ids": [1, 49, 0]}, {"input_ids": [2, 3]}])) == 2
    assert len(encode([{**PAIR, "margin": 1.5}], keep_columns=("margin",))) == 1
