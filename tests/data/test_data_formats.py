"""Row kinds by their columns, and conversions between the forms of rows."""

import pytest
from datasets import Dataset, DatasetDict

from trl.data.formats import (
    COLUMNS_READ,
    KINDS,
    detect_kind,
    extract_prompt,
    is_conversational,
    is_conversational_from_value,
    maybe_convert_to_chatml,
    maybe_extract_prompt,
    maybe_unpair_preference_dataset,
    unpair_preference_dataset,
)
from trl.errors import DataError

ASK = [{"role": "user", "content": "sky"}]
BLUE, GREEN = [{"role": "assistant", "content": "blue"}], [{"role": "assistant", "content": "green"}]


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (["text", "label"], "language_modeling"),
        (["prompt", "prompt_id", "messages"], "language_modeling"),
        (["conversations"], "language_modeling"),
        (["prompt", "completion"], "prompt_completion"),
        (["prompt"], "prompt_only"),
        (["prompt", "chosen", "rejected", "messages", "score_chosen"], "preference"),
        (["chosen", "rejected"], "preference"),
        (["prompt", "completion", "label"], "unpaired_preference"),
        (["prompt", "completions", "labels"], "stepwise"),
        (["input_ids", "attention_mask", "labels"], "tokenized"),
        (["input_ids_chosen", "attention_mask_chosen", "input_ids_rejected"], "tokenized_preference"),
    ],
)
def test_kind_by_columns(columns, kind):
    assert detect_kind(columns) == kind


def test_only_allowed_kinds_are_found():
    columns = ["prompt", "completion", "label"]
    assert detect_kind(columns, allowed=("language_modeling", "prompt_completion")) == "prompt_completion"


def test_text_field():
    assert detect_kind(["review", "label"], text_field="review") == "language_modeling"


def test_every_kind_reads_what_it_needs():
    assert KINDS.keys() == COLUMNS_READ.keys()
    assert all({c for needed in KINDS[kind] for c in needed} <= set(COLUMNS_READ[kind]) for kind in KINDS)


def test_unknown_columns_name_what_is_there_and_what_is_needed():
    with pytest.raises(DataError) as error:
        detect_kind(["prompts", "chosn", "id"])
    message = str(error.value)
    assert "['chosn', 'id', 'prompts']" in message
    assert "preference: chosen, rejected" in message
    assert "language_modeling: text | messages | conversations" in message
    assert "For 'chosn': Did you mean 'chosen'" in message


def test_is_conversational():
    assert is_conversational({"prompt": ASK})
    assert is_conversational({"messages": ASK})
    assert not is_conversational({"prompt": "sky"})
    assert not is_conversational({"messages": []})
    assert is_conversational_from_value({"conversations": [{"from": "user", "value": "sky"}]})
    assert not is_conversational_from_value({"messages": ASK})


def test_from_value_messages_become_role_content():
    row = {"conversations": [{"from": "user", "value": "sky"}], "id": 1}
    assert maybe_convert_to_chatml(row) == {"id": 1, "messages": ASK}
    row = {"prompt": [{"from": "user", "value": "sky", "weight": 0}], "completion": "blue"}
    assert maybe_convert_to_chatml(row) == {"prompt": [{**ASK[0], "weight": 0}], "completion": "blue"}
    assert maybe_convert_to_chatml({"text": "sky"}) == {"text": "sky"}


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("the sky is blue", "the sky is green", ("the sky is", " blue", " green")),
        ("sky is blue", "sky isx", ("sky is", " blue", "x")),
        ("same", "same", ("sam", "e", "e")),
        ("s", "same", ("", "s", "same")),
        (ASK + BLUE, ASK + GREEN, (ASK, BLUE, GREEN)),
    ],
)
def test_extract_prompt(chosen, rejected, expected):
    row = {"chosen": chosen, "rejected": rejected}
    assert extract_prompt(row) == dict(zip(("prompt", "chosen", "rejected"), expected, strict=True))


def test_maybe_extract_prompt_leaves_explicit_prompts_and_other_kinds():
    for row in ({"prompt": "p", "chosen": "pa", "rejected": "pb"}, {"text": "sky"}, {"prompt": ASK}):
        assert maybe_extract_prompt(row) == row
    row = {"prompt": ASK, "chosen": BLUE, "rejected": GREEN}
    assert maybe_extract_prompt(row) == row


def test_a_text_prompt_beside_conversations():
    expected = {"prompt": ASK, "chosen": BLUE, "rejected": GREEN}
    assert maybe_extract_prompt({"prompt": "sky", "chosen": ASK + BLUE, "rejected": ASK + GREEN}) == expected
    assert maybe_extract_prompt({"prompt": "sky", "chosen": BLUE, "rejected": GREEN}) == expected


def test_unpair():
    paired = {"prompt": ["a", "b"], "chosen": ["1", "2"], "rejected": ["3", "4"], "id": [7, 8]}
    unpaired = {
        "prompt": ["a", "b", "a", "b"],
        "id": [7, 8, 7, 8],
        "completion": ["1", "2", "3", "4"],
        "label": [True, True, False, False],
    }
    dataset = Dataset.from_dict(paired)
    assert unpair_preference_dataset(dataset)[:] == unpaired
    assert maybe_unpair_preference_dataset(dataset)[:] == unpaired
    assert maybe_unpair_preference_dataset(DatasetDict(train=dataset))["train"][:] == unpaired
    assert len(list(maybe_unpair_preference_dataset(dataset.to_iterable_dataset()))) == 4


def test_maybe_unpair_leaves_other_kinds():
    dataset = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "label": [True]})
    assert maybe_unpair_preference_dataset(dataset) is dataset
